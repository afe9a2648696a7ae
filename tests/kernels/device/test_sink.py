"""Sinks on stock attention where the model runs: against the CPU's float32, and memory linear in the tokens."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels.sink import sink_attention_torch
from foedus_kernels.testing import assert_close
from support.attention import attention_inputs


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("queries", [150, 37, 1])
@pytest.mark.parametrize("offsets", [None, [0, 5, 150, 151, 300]])
def test_equals_the_cpu(window, queries, offsets, place, close) -> None:
    exact = attention_inputs(2, 150, queries, heads=8, width=16, dtype=torch.float32)
    rounded = [x.detach().to(place[1]).to(place[0]).requires_grad_() for x in exact]
    packed = None if offsets is None else torch.tensor(offsets)
    results = []
    for given in (rounded, [x.detach().float().cpu().requires_grad_() for x in rounded]):
        out = sink_attention_torch(*given, scale=0.25, window=window, offsets=packed)
        results.append([out, *torch.autograd.grad(out.sum(), given)])  # A gradient that is one number, expanded.
    for name, got, want in zip(["out", "q", "k", "v", "sinks"], *results, strict=True):
        assert_close(got, want, **close, what=name)


@pytest.mark.parametrize("window", [None, 40])
def test_a_rows_bits_twice_alone_and_among_others(window, place) -> None:
    """Forward and backward, of rows long enough for several tiles of keys."""
    made = attention_inputs(5, 700, 700, heads=8, width=16, dtype=torch.float32)
    given = [x.detach().to(place[1]).to(place[0]) for x in made]
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(given[0])

    def found(*rows: int) -> list[torch.Tensor]:
        own = [x[list(rows)].requires_grad_() for x in given[:3]]
        out = sink_attention_torch(*own, given[3], scale=0.25, window=window)
        return [out.detach(), *torch.autograd.grad(out, own, upstream[list(rows)])]

    together = found(0, 1, 2, 3, 4)
    for again, row in ((found(0, 1, 2, 3, 4), 2), (found(4, 3, 2), 2), (found(2), 0)):
        for name, one, other in zip(["out", "q", "k", "v"], again, together, strict=True):
            assert torch.equal(one[row], other[2]), name


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 128])
def test_memory_grows_like_the_sequence(window) -> None:
    def peak(length: int) -> int:
        made = attention_inputs(1, length, length, heads=8, kv_heads=1, width=64, dtype=torch.bfloat16)
        given = [x.detach().cuda().requires_grad_() for x in made]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sink_attention_torch(*given, scale=0.125, window=window).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(128)  # What torch allocates once.
    assert peak(16384) < 2.2 * peak(8192)
    assert peak(16384) < 16384 * 16384 * 2, "not the scores of one head of eight"
