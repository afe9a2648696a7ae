"""A layer of routed experts over frozen weights in any codec: the torch reference, forward and backward (K1, K2).

Rows are sorted by expert, each hit expert multiplies its own segment, and the results are gathered back in top-k order.
gpt-oss's expert (transformers `GptOssExperts`)::

    gate, up = even, odd columns of  x W_gate_up + b_gate_up
    y        = ((up clamped to +-limit) + 1) * gate * sigmoid(alpha * gate)   with gate clamped above at limit
    out      = sum over the token's experts of  expert_weight * (y W_down + b_down)

The weights are frozen: the backward yields gradients for the activations, the router's expert weights and the low-rank
pairs (`expert_lora.py`), none for the matrices, and decodes the matrices again instead of keeping them. Only the first
projection's output is kept; everything else is computed again from it. A router weight's gradient needs no output
either: ``<grad, y W_down + b> = <grad W_down, y> + <grad, b>``, whose first product the backward makes anyway.

Forward and backward are operators of `torch.library`, so that tracers see their shapes without running them. The path
``fused`` has the same operators run device code that never writes a decoded matrix (`device/experts.py`); `backend.py`
chooses between the two, once a run.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from foedus_kernels import weights
from foedus_kernels.backend import DEQUANTISED, FUSED, PATHS
from foedus_kernels.expert_lora import ExpertLora, Pair, Segments
from foedus_kernels.grouped import Routing, add_bias_, add_products_with_, product
from foedus_kernels.weights import ExpertWeights


class PackedExperts(NamedTuple):
    """The frozen matrices of a layer's experts, each stack in its codec.

    Attributes:
        gate_up: [E, 2N, K], gate in even and up in odd rows.
        gate_up_bias: [E, 2N] in the type of the activations.
        down: [E, K, N].
        down_bias: [E, K] in the type of the activations.
    """

    gate_up: ExpertWeights
    gate_up_bias: torch.Tensor
    down: ExpertWeights
    down_bias: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Constants of the clamped SwiGLU."""

    alpha: float = 1.702
    limit: float = 7.0


def experts_torch(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    packed: PackedExperts,
    gate: Gate,
    lora: ExpertLora | None = None,
    *,
    row_multiple: int = 1,
    path: str = DEQUANTISED,
) -> torch.Tensor:
    """Apply each token's experts and sum their outputs by weight.

    Args:
        hidden: [T, K], float32 or bfloat16; float64 for gradient checks.
        expert_ids: int64 [T, experts_per_token], each in [0, E).
        expert_weights: [T, experts_per_token].
        packed: The layer's matrices.
        gate: The activation's constants.
        lora: Low-rank pairs, or None. They are computed with in the type of `hidden`.
        row_multiple: Each expert's rows are padded with zeros to a multiple of this. With 16 a CPU's products do not
            depend on how many rows an expert has (`docs/model.md`); 1 pads nothing. The fused path needs no padding,
            and makes none.
        path: ``dequantised`` or ``fused``, as `backend.choose` chose for the run.

    Returns:
        [T, K] in the type of `hidden`. Differentiable once in `hidden`, `expert_weights` and the matrices of `lora`.
        The bits are the same with a gradient to come and without.

    Raises:
        ValueError: Shapes that do not fit.
    """
    matrices = (None, None, None, None) if lora is None else lora.matrices()
    _check(hidden, expert_ids, expert_weights, packed, matrices, None if lora is None else lora.units)
    if path not in PATHS:
        raise ValueError(f"expected a path among {PATHS}, got {path!r}")
    out, _ = experts_forward(
        *(hidden, expert_weights, expert_ids),
        *(weights.codec_of(packed.gate_up), list(packed.gate_up.tensors()), packed.gate_up_bias),
        *(weights.codec_of(packed.down), list(packed.down.tensors()), packed.down_bias),
        *matrices,
        *(0.0 if lora is None else lora.scale, gate.alpha, gate.limit, row_multiple, path),
    )
    return out


@torch.library.custom_op("foedus::experts_forward", mutates_args=())
def experts_forward(
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up_codec: str,
    gate_up: Sequence[torch.Tensor],
    gate_up_bias: torch.Tensor,
    down_codec: str,
    down: Sequence[torch.Tensor],
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    scale: float,
    alpha: float,
    limit: float,
    row_multiple: int,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`experts_torch` as an operator: the output [T, K], and what the backward needs, gate and up of each row."""
    if path == FUSED:
        return _fused().forward(
            *(hidden, expert_weights, expert_ids),
            *(weights.codec(gate_up_codec, gate_up), gate_up_bias, weights.codec(down_codec, down), down_bias),
            *(gate_up_a, gate_up_b, down_a, down_b, scale, alpha, limit),
        )
    routing = Routing.of(expert_ids, down_bias.shape[0], multiple=row_multiple)
    rows = routing.gather(hidden)  # (S, K)
    found = product(rows, weights.codec(gate_up_codec, gate_up), routing.rows_of)  # (S, 2N)
    if pair := Pair.of(gate_up_a, gate_up_b, scale, rows.dtype):
        pair.add_(found, rows, routing.rows_of)
    del rows
    add_bias_(found, gate_up_bias, routing.rows_of)
    inner = _activate(found, alpha, limit)  # (S, N)
    outputs = product(inner, weights.codec(down_codec, down), routing.rows_of)  # (S, K)
    if pair := Pair.of(down_a, down_b, scale, inner.dtype):
        pair.add_(outputs, inner, routing.rows_of)
    del inner
    add_bias_(outputs, down_bias, routing.rows_of)
    chosen = routing.by_token(outputs).view(*expert_ids.shape, hidden.shape[1])  # (T, top-k, K)
    del outputs
    return chosen.mul_(expert_weights.unsqueeze(-1).to(chosen.dtype)).sum(1), found


@experts_forward.register_fake
def _(
    hidden: torch.Tensor, expert_weights: torch.Tensor, expert_ids: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up_bias, row_multiple, path = rest[2], rest[13], rest[14]
    # How many places padding adds is known when the rows are counted.
    places = expert_ids.numel() if row_multiple == 1 or path == FUSED else torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(hidden), hidden.new_empty(places, gate_up_bias.shape[1])


@torch.library.custom_op("foedus::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    gate_up_rows: torch.Tensor,
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up_codec: str,
    gate_up: Sequence[torch.Tensor],
    down_codec: str,
    down: Sequence[torch.Tensor],
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    scale: float,
    alpha: float,
    limit: float,
    row_multiple: int,
    path: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients of hidden, expert weights and the four low-rank matrices; an empty tensor where not needed."""
    if path == FUSED:
        return _fused().backward(
            *(grad, gate_up_rows, hidden, expert_weights, expert_ids),
            *(weights.codec(gate_up_codec, gate_up), weights.codec(down_codec, down), down_bias),
            *(gate_up_a, gate_up_b, down_a, down_b, scale, alpha, limit, needs),
        )
    routing = Routing.of(expert_ids, down_bias.shape[0], multiple=row_multiple)
    found = [grad.new_empty(0) for _ in range(6)]
    sorted_grad = routing.gather(grad)  # (S, K)
    inner, slopes = _activation_and_slopes(gate_up_rows, alpha, limit)  # (S, N), (S, 2N)
    adjoint = product(sorted_grad, weights.codec(down_codec, down), routing.rows_of, adjoint=True)  # (S, N)
    pair = Pair.of(down_a, down_b, scale, grad.dtype)
    outer = pair.outer(sorted_grad, routing.rows_of) if pair else None  # (S, R)
    if pair and outer is not None:
        pair.add_adjoint_(adjoint, outer, routing.rows_of)
    if needs[1]:
        by_row = add_products_with_(  # (S,), row by row: a product of few tokens would sum in another order
            (adjoint * inner).sum(1), sorted_grad, down_bias.to(grad.dtype), routing.rows_of
        )
        found[1] = routing.by_token(by_row).view(expert_weights.shape).to(expert_weights.dtype)  # (T, top-k)
    row_weights = routing.scattered(expert_weights.to(grad.dtype)).unsqueeze(1)  # (S, 1)
    adjoint.mul_(row_weights)
    if pair and outer is not None and (needs[4] or needs[5]):
        segments = Segments.of(routing, expert_ids, down_a, down_bias.shape[0])
        outer.mul_(row_weights)
        found[4:6] = segments.gradients(pair, sorted_grad.mul_(row_weights), outer, inner, needs[4:6])
    del sorted_grad, inner
    if not any((needs[0], needs[2], needs[3])):
        return found
    slopes.unflatten(1, (-1, 2)).mul_(adjoint.unsqueeze(2))  # (S, 2N), now the gradient of gate_up_rows
    del adjoint
    pair = Pair.of(gate_up_a, gate_up_b, scale, grad.dtype)
    outer = pair.outer(slopes, routing.rows_of) if pair else None
    if pair and outer is not None and (needs[2] or needs[3]):
        segments = Segments.of(routing, expert_ids, gate_up_a, down_bias.shape[0])
        found[2:4] = segments.gradients(pair, slopes, outer, routing.gather(hidden), needs[2:4])
    if needs[0]:
        rows_grad = product(slopes, weights.codec(gate_up_codec, gate_up), routing.rows_of, adjoint=True)  # (S, K)
        if pair and outer is not None:
            pair.add_adjoint_(rows_grad, outer, routing.rows_of)
        found[0] = routing.by_token(rows_grad).view(*expert_ids.shape, hidden.shape[1]).sum(1)
    return found


@experts_backward.register_fake
def _(
    grad: torch.Tensor,
    gate_up_rows: torch.Tensor,
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor]:
    matrices, needs = rest[6:10], rest[15]
    shaped = (hidden, expert_weights, *matrices)
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format) if need else grad.new_empty(0)
        for one, need in zip(shaped, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, expert_weights, expert_ids, gate_up_codec, gate_up, _, down_codec, down, down_bias = inputs[:9]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], hidden, expert_weights, expert_ids, down_bias, *inputs[9:13], *gate_up, *down)
    ctx.codecs, ctx.constants, ctx.stored = (gate_up_codec, down_codec), inputs[13:18], len(gate_up)


def _backward(ctx: Any, grad: torch.Tensor | None, _: object) -> tuple[Any, ...]:
    gate_up_rows, hidden, expert_weights, expert_ids, down_bias, *rest = ctx.saved_tensors
    matrices, stacks, split = rest[:4], rest[4:], ctx.stored
    # A list of tensors among the inputs wants a list in its place.
    frozen = (None, None, [None] * split, None, None, [None] * (len(stacks) - split), None)
    if grad is None:
        return (None, None, *frozen, *(None,) * 9)
    needs = [bool(ctx.needs_input_grad[place]) for place in (0, 1, 9, 10, 11, 12)]
    found = experts_backward(
        *(grad.contiguous(), gate_up_rows, hidden, expert_weights, expert_ids),
        *(ctx.codecs[0], stacks[:split], ctx.codecs[1], stacks[split:], down_bias),
        *(*matrices, *ctx.constants, needs),
    )
    kept = [one if need else None for one, need in zip(found, needs, strict=True)]
    return (*kept[:2], *frozen, *kept[2:], *(None,) * 5)


experts_forward.register_autograd(_backward, setup_context=_setup_context)


def _fused() -> ModuleType:
    """The device code, which imports Triton."""
    return importlib.import_module("foedus_kernels.device.experts")


def _activate(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """The clamped SwiGLU: (S, 2N) -> (S, N). The order of operations is transformers', to the bit."""
    gate = gate_up[:, 0::2].clamp(max=limit)
    up = gate_up[:, 1::2].clamp(-limit, limit)
    return gate.mul_((gate * alpha).sigmoid_()).mul_(up.add_(1))


def _activation_and_slopes(gate_up: torch.Tensor, alpha: float, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`_activate` again (S, N), and its derivatives by gate and by up, interleaved (S, 2N).

    A clamp passes the gradient at its limit, as torch's does.
    """
    raw_gate, raw_up = gate_up[:, 0::2], gate_up[:, 1::2]
    scaled = raw_gate.clamp(max=limit).mul_(alpha)
    up = raw_up.clamp(-limit, limit).add_(1)
    glu = functional.silu(scaled).div_(alpha)  # gate * sigmoid(alpha * gate), whose derivative is silu'(alpha * gate)
    slopes = torch.empty_like(gate_up)
    slopes[:, 0::2] = torch.ops.aten.silu_backward(up, scaled).masked_fill_(raw_gate > limit, 0.0)
    slopes[:, 1::2] = torch.where(raw_up.abs() > limit, 0.0, glu)
    return glu.mul_(up), slopes


def _check(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    packed: PackedExperts,
    matrices: tuple[torch.Tensor | None, ...],
    units: int | None,
) -> None:
    experts, twice, ins = packed.gate_up.shape
    if packed.down.shape != (experts, ins, twice // 2):
        raise ValueError(
            f"expected down matrices {(experts, ins, twice // 2)} beside gate_up {packed.gate_up.shape}, "
            f"got {packed.down.shape}"
        )
    if hidden.dim() != 2 or hidden.shape[1] != ins:
        raise ValueError(f"expected hidden states (T, {ins}), got {tuple(hidden.shape)}")
    if expert_ids.shape != expert_weights.shape or expert_ids.dim() != 2 or expert_ids.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"expected expert ids and weights ({hidden.shape[0]}, experts_per_token), got {tuple(expert_ids.shape)} "
            f"and {tuple(expert_weights.shape)}"
        )
    if units is not None and hidden.shape[0] % units:
        raise ValueError(f"expected the tokens of {units} units of one length, got {hidden.shape[0]} tokens")
    frozen = (*packed.gate_up.tensors(), packed.gate_up_bias, *packed.down.tensors(), packed.down_bias)
    if any(tensor.requires_grad for tensor in frozen):
        raise ValueError("expected frozen matrices and biases, got some that require a gradient: none is computed")
    for matrix, width, axis in zip(matrices, (ins, twice, twice // 2, ins), (-1, -2, -1, -2), strict=True):
        if matrix is not None and (matrix.shape[axis] != width or matrix.shape[-3] not in (1, experts)):
            raise ValueError(
                f"expected low-rank matrices of 1 or {experts} pairs and width {width}, got {tuple(matrix.shape)}"
            )
