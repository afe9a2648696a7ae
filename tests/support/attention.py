"""Dense masked attention with sinks, the oracle of every attention kernel, and the peak of a job's memory.

Patterns are written here as conditions on positions, independently of the code under test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# From how many tokens (and blocks) back a key may be seen: (query, key) places in their record -> bool.
Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def attention_inputs(
    rows: int, keys: int, queries: int, *, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype: torch.dtype
) -> Inputs:
    """Random q, k, v and sinks that require gradients."""
    generator = torch.Generator().manual_seed(1000 * keys + queries)
    shapes = [(rows, heads, queries, width), (rows, kv_heads, keys, width), (rows, kv_heads, keys, width), (heads,)]
    q, k, v, sinks = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v, sinks


def dense_attention(inputs: Inputs, scale: float, sees: Sees, offsets: list[int] | None = None) -> torch.Tensor:
    """softmax([q k scale | sink]) v under a mask of every pair."""
    q, k, v, sinks = inputs
    rows, heads, queries, _ = q.shape
    keys = k.shape[2]
    place = torch.arange(rows * keys)
    cuts = torch.tensor(sorted({*(offsets or []), *range(0, rows * keys + 1, keys)}))
    record = torch.bucketize(place, cuts, right=True) - 1
    local = place - cuts[record]  # (B * T,) place in the record
    back = local.unsqueeze(1) - local
    allowed = (record.unsqueeze(1) == record) & (back >= 0) & sees(local.unsqueeze(1), local)
    allowed = allowed.view(rows, keys, rows, keys).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (B, T, T)
    key, value = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = (q @ key.mT * scale).masked_fill(~allowed[:, None, keys - queries :], -float("inf"))
    logits = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(rows, -1, queries, 1)], -1)
    return torch.softmax(logits, -1)[..., :-1] @ value


def everything(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Full attention."""
    return torch.ones_like(query - key, dtype=torch.bool)


def last(window: int) -> Sees:
    """The last `window` keys, the query's own included."""
    return lambda query, key: query - key < window


def log_sparse(block: int, window: int, first: int) -> Sees:
    """Near blocks, blocks at powers of two, first blocks."""

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        back = query // block - key // block
        power = (back > 0) & (back & (back - 1) == 0)
        return (back < window) | power | (key // block < first)

    return sees


def peak_bytes(job: Callable[[], object]) -> int:
    """The most memory that a job's CPU tensors held at once, counted at torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
