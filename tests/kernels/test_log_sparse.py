"""Log-sparse attention: the five checks of its design, and what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from foedus_kernels import log_sparse
from foedus_kernels.log_sparse import Pattern, count_tiles, log_sparse_decode_torch, log_sparse_torch, tile_count
from support.attention import attention_inputs, dense_attention, peak_bytes
from support.attention import log_sparse as sees

SCALE = 0.3
DEFAULT: dict[str, Any] = {"block": 64, "window": 3, "first": 1}
SMALL: dict[str, Any] = {"block": 4, "window": 3, "first": 1}


@pytest.mark.parametrize(
    ("rows", "keys", "queries", "offsets"),
    [
        (1, 1, 1, None),
        (1, 3, 3, None),
        (1, 64, 64, None),
        (1, 101, 101, None),
        (3, 50, 50, None),
        (2, 33, 33, [0, 1, 5, 33, 34, 66]),  # records of 1, 4, 28, 1 and 32 tokens
        (1, 67, 67, list(range(68))),  # one-token records only
        (2, 50, 20, None),  # a cache: the queries are the last 20 of 50
        (2, 33, 7, [0, 30, 33, 34, 66]),  # a cache and left padding; a record without queries
        (3, 70, 1, [0, 5, 70, 140, 209, 210]),
    ],
)
@pytest.mark.parametrize(
    "pattern", [SMALL, {"block": 3, "window": 1, "first": 0}, {"block": 2, "window": 2, "first": 5}]
)
def test_equals_the_dense_masked_oracle(
    rows: int, keys: int, queries: int, offsets: list[int] | None, pattern: dict[str, int]
) -> None:
    inputs = attention_inputs(rows, keys, queries, dtype=torch.float64)
    packed = None if offsets is None else torch.tensor(offsets)
    got = log_sparse_torch(*inputs, scale=SCALE, offsets=packed, **pattern)
    want = dense_attention(inputs, SCALE, sees(**pattern), offsets)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (got, want))
    for name, ours, theirs in zip(["q", "k", "v", "sinks"], *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_default_pattern_in_float32() -> None:
    inputs = attention_inputs(1, 300, 300, width=16, dtype=torch.float32)
    got, want = log_sparse_torch(*inputs, scale=0.25), dense_attention(inputs, 0.25, sees(**DEFAULT))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_close_to_float32() -> None:
    exact = attention_inputs(1, 200, 200, width=32, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    got, want = (log_sparse_torch(*inputs, scale=0.2, **SMALL) for inputs in (half, exact))
    assert got.dtype == torch.bfloat16
    gradients = (torch.autograd.grad(out.float().sum(), x) for out, x in ((got, half), (want, exact)))
    for ours, theirs in [(got, want), *zip(*gradients, strict=True)]:
        assert float(((ours.float() - theirs).norm() / theirs.norm()).detach()) < 2e-2


def test_gradient_by_finite_differences() -> None:
    inputs = attention_inputs(1, 9, 9, width=3, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 9])
    assert torch.autograd.gradcheck(
        lambda *x: log_sparse_torch(*x, scale=SCALE, block=2, window=1, first=1, offsets=offsets), inputs
    )


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 5, 24])])
def test_the_registered_ops_are_sound(offsets: torch.Tensor | None) -> None:
    inputs = attention_inputs(2, 12, 12, width=4, dtype=torch.float32)
    torch.library.opcheck(log_sparse.log_sparse_forward, (*inputs, offsets, SCALE, 4, 2, 1))
    plain = [x.detach() for x in inputs]
    out, lse = log_sparse.log_sparse_forward(*plain, offsets, SCALE, 4, 2, 1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        log_sparse.log_sparse_backward, (out, *plain, out, lse, offsets, SCALE, 4, 2, 1), test_utils=tests
    )


@pytest.mark.parametrize("begins", [[0, 0, 0], [0, 3, 68], [69, 20, 1]])
@pytest.mark.parametrize("pattern", [SMALL, {"block": 5, "window": 2, "first": 0}])
def test_decoding_equals_the_last_row(begins: list[int], pattern: dict[str, int]) -> None:
    inputs = attention_inputs(3, 70, 1, dtype=torch.float64)
    offsets = sorted({0, 210, *(70 * row + begin for row, begin in enumerate(begins))})
    got = log_sparse_decode_torch(*inputs, scale=SCALE, starts=torch.tensor(begins), **pattern)
    want = dense_attention(inputs, SCALE, sees(**pattern), offsets)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_a_record_is_the_same_alone_and_packed() -> None:
    q, k, v, sinks = (x.detach() for x in attention_inputs(1, 150, 150, width=16, dtype=torch.float32))
    packed = log_sparse_torch(q, k, v, sinks, scale=SCALE, offsets=torch.tensor([0, 40, 110, 150]), **SMALL)
    alone = log_sparse_torch(*(x[:, :, 40:110] for x in (q, k, v)), sinks, scale=SCALE, **SMALL)
    torch.testing.assert_close(packed[:, :, 40:110], alone, rtol=0, atol=1e-6)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(1, 90, 90, dtype=torch.float64)
    whole = log_sparse_torch(*inputs, scale=SCALE, **SMALL)
    want = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr(log_sparse, "GATHERED", 1)  # one query block at a time
    single = log_sparse_torch(*inputs, scale=SCALE, **SMALL)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(single.square().sum(), inputs), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "tiles"), [(4096, 442), (8192, 1017), (16384, 2296), (32768, 5111), (131072, 24565)]
)
def test_the_formula_gives_the_published_counts_within_the_bound(length: int, tiles: int) -> None:
    assert tile_count(length) == tiles
    assert tiles <= length / 64 * (3 + 1 + 1 + math.log2(length / 64))


@pytest.mark.parametrize("pattern", list(itertools.product([1, 64], [1, 2, 3, 5, 9], [0, 1, 4])))
def test_the_formula_is_the_size_of_the_sets(pattern: tuple[int, int, int]) -> None:
    described = Pattern(block=pattern[0], window=pattern[1], first=pattern[2])
    total = 0
    for i in range(70):
        total += len(described.key_blocks(i))
        assert tile_count((i + 1) * described.block, described) == total
    assert tile_count(70 * described.block - described.block + 1, described) == total, "a block begun counts in full"


@pytest.mark.parametrize("offsets", [None, [0, 1, 64, 65, 700, 1100]])
def test_the_kernel_multiplies_as_many_tiles_as_the_formula_says(offsets: list[int] | None) -> None:
    q, k, v, sinks = attention_inputs(1, 1100, 1100, width=4, dtype=torch.float32)
    packed = None if offsets is None else torch.tensor(offsets)
    with count_tiles() as count:
        log_sparse_torch(q, k, v, sinks, scale=SCALE, offsets=packed).sum().backward()
    lengths = [b - a for a, b in itertools.pairwise(offsets or [0, 1100])]
    assert count.forward == count.backward == sum(tile_count(length) for length in lengths)


def test_the_kernel_counts_442_tiles_at_4096_tokens() -> None:
    q, k, v, sinks = (
        x.detach() for x in attention_inputs(1, 4096, 4096, heads=1, kv_heads=1, width=4, dtype=torch.float32)
    )
    with count_tiles() as count:
        log_sparse_torch(q, k, v, sinks, scale=SCALE)
    assert (count.forward, count.backward) == (442, 0)


@pytest.mark.parametrize("blocks", [2, 3, 7, 64, 100, 512])
def test_every_earlier_block_is_reachable_in_log2_layers(blocks: int) -> None:
    reads = torch.zeros(blocks, blocks)
    for i in range(blocks):
        reads[i, Pattern().key_blocks(i)] = 1
    reached = torch.eye(blocks)
    for _ in range(math.ceil(math.log2(blocks))):
        reached = (reads @ reached).clamp(max=1)
    assert torch.equal(reached, torch.ones(blocks, blocks).tril())


def test_memory_grows_like_the_sequence_and_holds_no_square() -> None:
    def job(length: int) -> int:
        q, k, v, sinks = attention_inputs(1, length, length, heads=2, kv_heads=1, width=8, dtype=torch.float32)
        return peak_bytes(lambda: log_sparse_torch(q, k, v, sinks, scale=SCALE).sum().backward())

    job(128)  # What torch allocates once.
    short, long = job(4096), job(8192)
    assert long < 2.2 * short
    assert long < 8192 * 8192 // 2, "not even an eighth of the n x n scores of one head in float32"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block": 0}, "block >= 1"),
        ({"window": 0}, "window >= 1"),
        ({"first": -1}, "first >= 0"),
        ({"offsets": torch.tensor([0, 4])}, "ascend from 0 to 8"),
        ({"offsets": torch.tensor([0, 4, 4, 8])}, "ascend from 0 to 8"),
        ({"offsets": torch.tensor([1, 8])}, "ascend from 0 to 8"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    inputs = attention_inputs(1, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=text):
        log_sparse_torch(*inputs, scale=SCALE, **change)


def test_shapes_and_starts_that_do_not_fit_are_refused() -> None:
    q, k, v, sinks = attention_inputs(1, 8, 8, dtype=torch.float32)
    for bad in ((q[:, :3], k, v, sinks), (q, k, v[:, :, 1:], sinks), (q, k, v, sinks[1:]), (q, k.double(), v, sinks)):
        with pytest.raises(ValueError, match="H a multiple of Hkv"):
            log_sparse_torch(*bad, scale=SCALE)
    with pytest.raises(ValueError, match="Tq <= T"):
        log_sparse_torch(q, k[:, :, 1:], v[:, :, 1:], sinks, scale=SCALE)
    with pytest.raises(ValueError, match="got 8 queries"):
        log_sparse_decode_torch(q, k, v, sinks, scale=SCALE)
    with pytest.raises(ValueError, match=r"starts \[8\]"):
        log_sparse_decode_torch(q[:, :, :1], k, v, sinks, scale=SCALE, starts=torch.tensor([8]))


def test_the_log_sum_exp_takes_no_gradient() -> None:
    inputs = attention_inputs(1, 8, 8, dtype=torch.float32)
    out, lse = log_sparse.log_sparse_forward(*inputs, None, SCALE, 4, 2, 1)
    assert out.requires_grad
    assert not lse.requires_grad, "a gradient that the fused backward would drop"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offsets", [None, [0, 1, 65, 500]])
def test_cuda_equals_the_cpu(offsets: list[int] | None) -> None:
    exact = attention_inputs(1, 500, 500, heads=8, width=64, dtype=torch.float32)
    moved = [x.detach().cuda().requires_grad_() for x in exact]
    packed = None if offsets is None else torch.tensor(offsets)
    want = log_sparse_torch(*exact, scale=0.125, offsets=packed)
    got = log_sparse_torch(*moved, scale=0.125, offsets=None if packed is None else packed.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), moved), torch.autograd.grad(want.square().sum(), exact), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
