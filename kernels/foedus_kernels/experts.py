"""A layer of routed experts over packed MXFP4 weights: the torch reference, forward and gradient of the activations.

Rows are sorted by expert, each hit expert multiplies its own segment, and the results are gathered back in top-k order.
gpt-oss's expert (transformers `GptOssExperts`)::

    gate, up = even, odd columns of  x W_gate_up + b_gate_up
    y        = ((up clamped to +-limit) + 1) * gate * sigmoid(alpha * gate)   with gate clamped above at limit
    out      = sum over the token's experts of  expert_weight * (y W_down + b_down)

The weights are frozen: the backward yields gradients for the activations and the expert weights of the router, none
for the matrices, and decodes the matrices again instead of keeping them. All experts that a call hits are decoded at
once where they fit `DECODE_BYTES`. On a CPU this costs about what the same layer over dense weights does from 256
tokens (`docs/benchmarks.md`). Counting the rows of each expert brings one list to the host, which stalls a GPU; the
fused Triton kernel is the heavier alternative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from foedus_kernels import mxfp4

# Decoded weights alive at once. All 16 experts of the tiny shape take 2 MiB of it; one gate_up of gpt-oss 66 MiB.
DECODE_BYTES = 256 << 20


Order = Literal["stored", "library", "adjoint"]


class PackedExperts(NamedTuple):
    """The frozen matrices of a layer's experts, in the released layout.

    Attributes:
        gate_up_blocks: uint8 [E, 2N, K/32, 16], gate in even and up in odd rows.
        gate_up_scales: uint8 [E, 2N, K/32].
        gate_up_bias: [E, 2N] in the type of the activations.
        down_blocks: uint8 [E, K, N/32, 16].
        down_scales: uint8 [E, K, N/32].
        down_bias: [E, K] in the type of the activations.
    """

    gate_up_blocks: torch.Tensor
    gate_up_scales: torch.Tensor
    gate_up_bias: torch.Tensor
    down_blocks: torch.Tensor
    down_scales: torch.Tensor
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
) -> torch.Tensor:
    """Apply each token's experts and sum their outputs by weight.

    Args:
        hidden: [T, K], float32 or bfloat16.
        expert_ids: int64 [T, experts_per_token], each in [0, E).
        expert_weights: [T, experts_per_token].
        packed: The layer's matrices.
        gate: The activation's constants.

    Returns:
        [T, K]. Differentiable once in `hidden` and `expert_weights`. On a CPU, where no gradient is asked for, the bits
        are those of transformers' ``grouped_mm`` path over the decoded matrices.
    """
    return _Experts.apply(hidden, expert_weights, expert_ids, packed, gate)


class _Routing(NamedTuple):
    """Rows sorted by expert: M = T * experts_per_token of them. A row is one (token, choice)."""

    order: torch.Tensor  # (M,) the row that stands at each sorted place
    places: torch.Tensor  # (M,) the sorted place of each row
    tokens: torch.Tensor  # (M,) the token at each sorted place
    rows: list[int]  # rows of each expert, (E,)

    @classmethod
    def of(cls, expert_ids: torch.Tensor, num_experts: int) -> _Routing:
        flat = expert_ids.reshape(-1)
        # The same unstable sort as transformers': a row's place within its expert can change its last bits on a CPU.
        order = torch.argsort(flat)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        tokens = order.div(expert_ids.shape[1], rounding_mode="floor")
        return cls(order, places, tokens, torch.bincount(flat, minlength=num_experts).tolist())


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        expert_weights: torch.Tensor,
        expert_ids: torch.Tensor,
        packed: PackedExperts,
        gate: Gate,
    ) -> torch.Tensor:
        # Without a gradient to come, logits shall equal transformers' to the bit (see `_product`).
        order: Order = "library" if hidden.device.type == "cpu" and not any(ctx.needs_input_grad) else "stored"
        routing = _Routing.of(expert_ids, packed.down_bias.shape[0])
        rows = hidden.index_select(0, routing.tokens)  # (M, K)
        experts = expert_ids.reshape(-1).index_select(0, routing.order)  # (M,) the expert of each sorted row
        gate_up = _product(rows, packed.gate_up_blocks, packed.gate_up_scales, routing.rows, order)  # (M, 2N)
        gate_up += packed.gate_up_bias.index_select(0, experts)
        inner = _activate(gate_up, gate)  # (M, N)
        outputs = _product(inner, packed.down_blocks, packed.down_scales, routing.rows, order)  # (M, K)
        outputs += packed.down_bias.index_select(0, experts)
        outputs = outputs.index_select(0, routing.places).view(*expert_ids.shape, -1)  # (T, top-k, K)
        ctx.routing, ctx.packed, ctx.gate = routing, packed, gate
        ctx.save_for_backward(gate_up, outputs, expert_weights)
        return (outputs * expert_weights.unsqueeze(-1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, outputs, expert_weights = ctx.saved_tensors
        routing, packed, gate = ctx.routing, ctx.packed, ctx.gate
        weights_grad = (outputs * grad.unsqueeze(1)).sum(-1) if ctx.needs_input_grad[1] else None  # (T, top-k)
        if not ctx.needs_input_grad[0]:
            return None, weights_grad, None, None, None
        sorted_grad = grad.index_select(0, routing.tokens)  # (M, K)
        sorted_grad *= expert_weights.reshape(-1).index_select(0, routing.order).unsqueeze(-1)
        inner = _product(sorted_grad, packed.down_blocks, packed.down_scales, routing.rows, "adjoint")  # (M, N)
        inner = _activate_backward(inner, gate_up, gate)  # (M, 2N)
        rows_grad = _product(inner, packed.gate_up_blocks, packed.gate_up_scales, routing.rows, "adjoint")  # (M, K)
        hidden_grad = rows_grad.index_select(0, routing.places).view(*expert_weights.shape, -1).sum(1)  # (T, K)
        return hidden_grad, weights_grad, None, None, None


def _product(
    rows: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, rows_of: list[int], order: Order
) -> torch.Tensor:
    """Each expert's segment of sorted rows times its matrix: ``x W^T``, or ``y W`` for the adjoint.

    A CPU's product of fewer than about 16 rows sums in an order that depends on how the matrix lies in memory.
    ``library`` turns it round into transformers' order first, for about 2 ns an element; ``stored`` takes it as it
    is.
    """
    pieces = []
    start = 0
    outs, ins = scales.shape[1], scales.shape[2] * mxfp4.GROUP
    for experts in _chunks(rows_of, outs * ins * rows.element_size()):
        offsets = list(accumulate(rows_of[expert] for expert in experts))
        weights = mxfp4.decode(_pick(blocks, experts), _pick(scales, experts), rows.dtype)  # (hit, outs, ins)
        pieces.append(
            functional.grouped_mm(
                rows[start : start + offsets[-1]],
                _oriented(weights, order),
                offs=torch.tensor(offsets, dtype=torch.int32, device=rows.device),
            )
        )
        start += offsets[-1]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _oriented(weights: torch.Tensor, order: Order) -> torch.Tensor:
    if order == "adjoint":
        return weights
    return weights.mT.contiguous() if order == "library" else weights.mT


def _chunks(rows_of: list[int], expert_bytes: int) -> Iterator[list[int]]:
    """The experts that have rows, as many at a time as may be decoded at once."""
    hit = [expert for expert, count in enumerate(rows_of) if count]
    size = max(1, DECODE_BYTES // expert_bytes)
    for start in range(0, len(hit), size):
        yield hit[start : start + size]


def _pick(stack: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """The given experts of a stack, without a copy where they are neighbours."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return stack[experts[0] : experts[-1] + 1]
    return stack.index_select(0, torch.tensor(experts, device=stack.device))


def _activate(gate_up: torch.Tensor, constants: Gate) -> torch.Tensor:
    """The clamped SwiGLU: (M, 2N) -> (M, N). The order of operations is transformers', to the bit."""
    gate = gate_up[:, 0::2].clamp(max=constants.limit)
    up = gate_up[:, 1::2].clamp(-constants.limit, constants.limit)
    return gate.mul_((gate * constants.alpha).sigmoid_()).mul_(up.add_(1))


def _activate_backward(grad: torch.Tensor, gate_up: torch.Tensor, constants: Gate) -> torch.Tensor:
    """The gradient of `_activate`: (M, N) -> (M, 2N). A clamp passes the gradient at its limit, as torch's does."""
    raw_gate, raw_up = gate_up[:, 0::2], gate_up[:, 1::2]
    scaled = raw_gate.clamp(max=constants.limit).mul_(constants.alpha)
    slope = raw_up.clamp(-constants.limit, constants.limit).add_(1).mul_(grad)
    glu = functional.silu(scaled).div_(constants.alpha)
    result = torch.empty_like(gate_up)
    # gate * sigmoid(alpha * gate) = silu(alpha * gate) / alpha, whose derivative by gate is silu'(alpha * gate).
    torch.mul(torch.ops.aten.silu_backward(slope, scaled), raw_gate <= constants.limit, out=result[:, 0::2])
    torch.mul(glu.mul_(grad), raw_up.abs() <= constants.limit, out=result[:, 1::2])
    return result
