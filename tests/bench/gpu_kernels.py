"""Each kernel's jobs at a shape, ours and the others' ways, on synthetic tensors made on the device.

A function makes the inputs of a case once and gives what makes the job of each way. A way that cannot run here is a
text that says why. Shapes are those of `foedus_kernels.roofline`, smaller ones in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import gpu_triton_kernels
import torch
from foedus_kernels import backend, log_sparse, mxfp4
from foedus_kernels.clip import clipped_gradient_torch, segment_offsets, unit_square_norms_torch
from foedus_kernels.cross_entropy import cross_entropy_torch
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.log_sparse import log_sparse_decode_torch, log_sparse_torch
from foedus_kernels.roofline import Shape
from foedus_kernels.sink import sink_attention_torch
from gpu_routing import routed
from torch import nn
from torch.nn import functional

OURS, REFERENCE, GROUPED, EAGER, THEIRS = "ours", "reference", "dequantise + grouped_mm", "eager", "triton_kernels"
WAYS = (OURS, REFERENCE, GROUPED, EAGER, THEIRS)
STOCK = "stock full attention"
RECORD_WAYS = (OURS, REFERENCE, STOCK)
LONGEST_EAGER = 8192  # Eager's scores are n x n for each of 64 heads: 17 GB in float32 at this length.

Job = Callable[[], object]
Jobs = dict[str, "Callable[[], Job] | str"]
"""By way: what makes the job, when its turn comes, so that no way holds another's memory; or why it cannot run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and in what type a case runs."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def generator(self) -> torch.Generator:
        """The case's own."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        """Gaussian values."""
        return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)


def stack(place: Place, experts: int, outs: int, ins: int, generator: torch.Generator) -> mxfp4.Mxfp4Weights:
    """Random codes, and scale bytes 117 to 123 as trained weights have them."""
    blocks = torch.empty(experts, outs, ins // 32, 16, dtype=torch.uint8, device=place.device)
    scales = torch.empty(experts, outs, ins // 32, dtype=torch.uint8, device=place.device)
    return mxfp4.Mxfp4Weights(
        blocks.random_(0, 256, generator=generator), scales.random_(117, 124, generator=generator)
    )


def packed_layer(place: Place, shape: Shape) -> PackedExperts:
    """One layer's experts."""
    generator = place.generator()
    return PackedExperts(
        stack(place, shape.experts, 2 * shape.inner, shape.hidden, generator),
        place.normal(shape.experts, 2 * shape.inner, generator=generator),
        stack(place, shape.experts, shape.hidden, shape.inner, generator),
        place.normal(shape.experts, shape.hidden, generator=generator),
    )


def fused_or_why(place: Place) -> str | None:
    """Why the fused path cannot run, or None."""
    return backend.missing_for_kernels(place.device)


class _Decoded(torch.autograd.Function):
    """``rows W^T`` by the library's grouped product over matrices that are decoded for it, again in the backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: mxfp4.Mxfp4Weights, offsets: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        ctx.save_for_backward(offsets)
        dense = mxfp4.decode(*weights.tensors(), rows.dtype)  # (E, N, K)
        return grouped_mm(rows, dense.mT, offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return grouped_mm(grad.contiguous(), mxfp4.decode(*ctx.weights.tensors(), grad.dtype), offsets), None, None


def grouped_mm(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The library's grouped product, under the name that this torch has."""
    function = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return function(left, right, offs=offsets)


def grouped_experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, packed: PackedExperts
) -> torch.Tensor:
    """A layer of experts with every matrix decoded before the library's product: what others do."""
    flat, experts = ids.flatten(), packed.gate_up.shape[0]
    order = flat.argsort(stable=True)  # (S,)
    chosen = flat[order]
    offsets = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)  # (E,)
    found = _Decoded.apply(hidden[order // ids.shape[1]], packed.gate_up, offsets) + packed.gate_up_bias[chosen]
    gate, up = found[:, 0::2].clamp(max=7.0), found[:, 1::2].clamp(-7.0, 7.0)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)  # (S, N)
    out = _Decoded.apply(inner, packed.down, offsets) + packed.down_bias[chosen]
    out = (out * weights.flatten()[order].unsqueeze(1))[order.argsort()]
    return out.view(*ids.shape, -1).sum(1)


def eager_layer(packed: PackedExperts, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """transformers' module with its matrices decoded once; its loop over experts."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sizes = {"num_local_experts": shape.experts, "hidden_size": shape.hidden, "intermediate_size": shape.inner}
    with torch.device("meta"):
        layer = GptOssExperts(GptOssConfig(**sizes))
    layer.config._experts_implementation = "eager"
    values = {
        "gate_up_proj": mxfp4.decode(*packed.gate_up.tensors(), dtype).mT.contiguous(),
        "gate_up_proj_bias": packed.gate_up_bias,
        "down_proj": mxfp4.decode(*packed.down.tensors(), dtype).mT.contiguous(),
        "down_proj_bias": packed.down_bias,
    }
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return layer


def decode_jobs(place: Place, shape: Shape, tokens: int) -> Jobs:
    """K0."""
    packed = packed_layer(place, shape)
    stacks = [one.tensors() for one in (packed.gate_up, packed.down)]
    missing = fused_or_why(place)

    def run(decode: Callable[..., torch.Tensor]) -> Callable[[], Job]:
        return lambda: lambda: [decode(*tensors, place.dtype) for tensors in stacks]

    def theirs() -> Job:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return lambda: [convert_moe_packed_tensors(*tensors, dtype=place.dtype) for tensors in stacks]

    return {
        OURS: missing if missing else run(mxfp4.decode),
        REFERENCE: run(mxfp4.decode_torch),
        EAGER: theirs,
    }


def experts_jobs(place: Place, shape: Shape, tokens: int, *, backward: bool) -> Jobs:
    """K1, or K2 alone: the gradient by the hidden states of a forward that was made before."""
    packed, generator = packed_layer(place, shape), place.generator()
    hidden = place.normal(tokens, shape.hidden, generator=generator).requires_grad_(backward)
    ids = torch.from_numpy(routed(tokens, shape.experts, shape.top_k, place.seed)).to(place.device)
    weights = torch.softmax(place.normal(tokens, shape.top_k, generator=generator).float(), -1).to(place.dtype)
    upstream = place.normal(tokens, shape.hidden, generator=generator)

    def ours(path: str) -> Callable[[], torch.Tensor]:
        return lambda: experts_torch(hidden, ids, weights, packed, Gate(), path=path)

    def job(forward: Callable[[], torch.Tensor]) -> Job:
        if not backward:
            return forward
        out = forward()
        return lambda: torch.autograd.grad(out, hidden, upstream, retain_graph=True)

    def eager() -> Job:
        layer = eager_layer(packed, shape, place.dtype)
        return job(lambda: layer(hidden, ids, weights))

    missing = fused_or_why(place)
    found: Jobs = {
        OURS: missing if missing else lambda: job(ours(backend.FUSED)),
        REFERENCE: lambda: job(ours(backend.DEQUANTISED)),
        GROUPED: lambda: job(lambda: grouped_experts(hidden, ids, weights, packed)),
        EAGER: eager,
    }
    if not backward:
        found[THEIRS] = (
            gpu_triton_kernels.missing()
            or missing
            or (lambda: gpu_triton_kernels.checked_forward(hidden, ids, weights, packed, ours(backend.DEQUANTISED)))
        )
    return found


def unit_jobs(place: Place, shape: Shape, tokens: int, *, norms: bool) -> Jobs:
    """K3: squared norms of (expert, unit)s, or the sum of scaled gradients; B of both projections."""
    generator, units = place.generator(), shape.units
    ids = torch.from_numpy(routed(tokens, shape.experts, shape.top_k, place.seed)).to(place.device)
    offsets = segment_offsets(ids, units, shape.experts)
    rows = ids.numel()
    pairs = [
        (place.normal(rows, out, generator=generator), place.normal(rows, shape.rank, generator=generator))
        for out in (2 * shape.inner, shape.hidden)
    ]
    factors = torch.rand(units, generator=generator, device=place.device)
    spread = factors.repeat(shape.experts).repeat_interleave(offsets.diff(), output_size=rows).to(place.dtype)
    step = 1 if norms else units
    ends = offsets[step::step].to(torch.int32)  # (E * U,) or (E,)

    def ours() -> object:
        if norms:
            return [unit_square_norms_torch(left, right, offsets) for left, right in pairs]
        return [clipped_gradient_torch(left, right, offsets, factors) for left, right in pairs]

    def grouped() -> object:
        if norms:
            return [grouped_mm(left.T, right, ends).float().square().sum((1, 2)) for left, right in pairs]
        return [grouped_mm((left * spread.unsqueeze(1)).T, right, ends) for left, right in pairs]

    # On CUDA the operators run the device code, on a CPU the reference: one of the two names says which.
    missing = fused_or_why(place)
    return {
        OURS: missing or (lambda: ours),
        REFERENCE: (lambda: ours) if missing else "the operator runs the device code",
        GROUPED: lambda: grouped,
    }


def attention_jobs(place: Place, shape: Shape, tokens: int, *, kind: str) -> Jobs:
    """K5 and sinks: `kind` is ``log-sparse forward``, ``log-sparse backward``, ``full`` or ``sliding`` (both ways)."""
    generator, scale = place.generator(), shape.width**-0.5
    q = place.normal(1, shape.heads, tokens, shape.width, generator=generator)
    k, v = (place.normal(1, shape.kv_heads, tokens, shape.width, generator=generator) for _ in range(2))
    sinks = place.normal(shape.heads, generator=generator)
    upstream = place.normal(*q.shape, generator=generator)
    inputs = tuple(one.requires_grad_(kind != "log-sparse forward") for one in (q, k, v, sinks))
    window = shape.window if kind == "sliding" else None

    def eager() -> torch.Tensor:
        back = torch.arange(tokens, device=place.device).unsqueeze(1) - torch.arange(tokens, device=place.device)
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        groups = shape.heads // shape.kv_heads
        keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ keys.mT * scale).masked_fill(hidden, -float("inf"))
        joined = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, tokens, 1)], -1)
        return torch.softmax(joined.float(), -1).to(q.dtype)[..., :-1] @ values

    def job(forward: Callable[[], torch.Tensor]) -> Job:
        if kind == "log-sparse forward":
            return forward
        if kind == "log-sparse backward":
            out = forward()
            return lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        return lambda: torch.autograd.grad(forward(), inputs, upstream)

    if kind.startswith("log-sparse"):
        found = _log_sparse_jobs(place, lambda: job(lambda: log_sparse_torch(*inputs, scale=scale)))
    else:
        found = {OURS: lambda: job(lambda: sink_attention_torch(*inputs, scale=scale, window=window))}
    if tokens > LONGEST_EAGER:
        found[EAGER] = f"its scores are {tokens:,} x {tokens:,}"
    else:
        found[EAGER] = lambda: job(eager)
    return found


@contextmanager
def by_reference() -> Iterator[None]:
    """Inside, log-sparse attention is computed by its reference, wherever its tensors lie."""
    kept = log_sparse._device_code
    log_sparse._device_code = lambda q, block: None
    try:
        yield
    finally:
        log_sparse._device_code = kept


def _log_sparse_jobs(place: Place, make: Callable[[], Job]) -> Jobs:
    """One job twice: by device code, and by the reference."""

    def reference() -> Job:
        with by_reference():
            job = make()

        def run() -> object:
            with by_reference():
                return job()

        return run

    return {OURS: fused_or_why(place) or make, REFERENCE: reference}


def record_jobs(place: Place, shape: Shape, tokens: int, *, kind: str) -> Jobs:
    """K5 over one long record: `kind` is ``forward``, ``forward and backward`` or ``decode`` (one more token).

    Beside it the library's own kernel over every earlier key: no sinks, which it does not know, and n^2 products.
    """
    generator, scale = place.generator(), shape.width**-0.5
    decode, trained = kind == "decode", kind == "forward and backward"
    q = place.normal(1, shape.heads, 1 if decode else tokens, shape.width, generator=generator)
    k, v = (place.normal(1, shape.kv_heads, tokens, shape.width, generator=generator) for _ in range(2))
    sinks = place.normal(shape.heads, generator=generator)
    upstream = place.normal(*q.shape, generator=generator)
    inputs = tuple(one.requires_grad_(trained) for one in (q, k, v, sinks))
    ours = log_sparse_decode_torch if decode else log_sparse_torch

    def stock() -> torch.Tensor:
        # The causal mask would begin at the first key; the newest token sees them all.
        return functional.scaled_dot_product_attention(q, k, v, is_causal=not decode, scale=scale, enable_gqa=True)

    def job(forward: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Job:
        return (lambda: torch.autograd.grad(forward(), leaves, upstream)) if trained else forward

    return _log_sparse_jobs(place, lambda: job(lambda: ours(*inputs, scale=scale), *inputs)) | {
        STOCK: lambda: job(stock, q, k, v)
    }


def cross_entropy_jobs(place: Place, shape: Shape, tokens: int) -> Jobs:
    """The head's losses and their gradient by the hidden states."""
    generator = place.generator()
    hidden = place.normal(tokens, shape.hidden, generator=generator).requires_grad_()
    head = place.normal(shape.vocabulary, shape.hidden, generator=generator).mul_(0.02)
    targets = torch.randint(0, shape.vocabulary, (tokens,), generator=generator, device=place.device)

    def ours() -> object:
        return torch.autograd.grad(cross_entropy_torch(hidden, head, targets).sum(), hidden)

    def eager() -> object:
        losses = functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
        return torch.autograd.grad(losses.sum(), hidden)

    return {OURS: lambda: ours, EAGER: lambda: eager}


def link_jobs(place: Place, shape: Shape, tokens: int) -> Jobs:
    """K4's link: one layer's bytes from pinned memory."""
    size = shape.gate_up_bytes + shape.down_bytes
    there = torch.empty(size, dtype=torch.uint8, device=place.device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=place.device.type == "cuda")
    return {OURS: lambda: lambda: there.copy_(pinned, non_blocking=True)}


JOBS: dict[str, Callable[[Place, Shape, int], Jobs]] = {
    "K0 decode": decode_jobs,
    "K1 experts, forward": lambda place, shape, tokens: experts_jobs(place, shape, tokens, backward=False),
    "K2 experts, backward": lambda place, shape, tokens: experts_jobs(place, shape, tokens, backward=True),
    "K3 norms": lambda place, shape, tokens: unit_jobs(place, shape, tokens, norms=True),
    "K3 weight gradient": lambda place, shape, tokens: unit_jobs(place, shape, tokens, norms=False),
    "K5 log-sparse, forward": lambda *case: attention_jobs(*case, kind="log-sparse forward"),
    "K5 log-sparse, backward": lambda *case: attention_jobs(*case, kind="log-sparse backward"),
    "sinks, full layer": lambda *case: attention_jobs(*case, kind="full"),
    "sinks, sliding layer": lambda *case: attention_jobs(*case, kind="sliding"),
    "cross-entropy": cross_entropy_jobs,
    "K4 link": link_jobs,
    "K5 record, forward": lambda *case: record_jobs(*case, kind="forward"),
    "K5 record, forward and backward": lambda *case: record_jobs(*case, kind="forward and backward"),
    "K5 record, decode": lambda *case: record_jobs(*case, kind="decode"),
}
"""By the names of `foedus_kernels.roofline.KERNELS` and `RECORD_KERNELS`."""


def small(shape: Shape) -> Shape:
    """The shape with widths for a CPU's test."""
    return replace(
        shape, experts=8, top_k=2, hidden=64, inner=32, heads=4, kv_heads=2, width=16, window=16, vocabulary=50, units=2
    )
