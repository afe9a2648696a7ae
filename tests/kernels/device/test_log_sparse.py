"""K5 in Triton against its reference and the dense oracle: ragged and packed records, tiles, bits, and faults."""

from __future__ import annotations

import itertools

import pytest
import torch
from foedus_kernels import log_sparse
from foedus_kernels.device import log_sparse as device
from foedus_kernels.log_sparse import Pattern, TileCount, count_tiles, log_sparse_torch, tile_count
from foedus_kernels.testing import assert_close
from support.attention import attention_inputs, dense_attention
from support.attention import log_sparse as sees
from support.mutants import faulty

SCALE = 0.3
SMALL = {"block": 16, "window": 3, "first": 1}
NAMES = ["q", "k", "v", "sinks"]


def inputs_of(rows, keys, queries, place, **shape):
    where, dtype = place
    made = attention_inputs(rows, keys, queries, dtype=torch.float32, **shape)
    return [x.detach().to(dtype).to(where) for x in made]


def packed_of(offsets):
    return None if offsets is None else torch.tensor(offsets)


def constants_of(pattern):
    return SCALE, pattern["block"], pattern["window"], pattern["first"]


def upstream_of(q):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.device, q.dtype)


def both_ways(code, given, offsets, pattern):
    """Output, log-sum-exp and the four gradients of a launcher's module."""
    out, lse = code.log_sparse_forward(*given, packed_of(offsets), *constants_of(pattern))
    gradients = code.log_sparse_backward(
        upstream_of(given[0]), *given, out, lse, packed_of(offsets), *constants_of(pattern)
    )
    return {"out": out, "lse": lse} | dict(zip(NAMES, gradients, strict=True))


def wanted(given, offsets, pattern):
    """The same from the reference, in float32 on the CPU."""
    exact = [x.float().cpu() for x in given]
    out, lse = log_sparse.log_sparse_forward(*exact, packed_of(offsets), *constants_of(pattern))
    upstream = upstream_of(given[0]).float().cpu()
    gradients = log_sparse.log_sparse_backward(upstream, *exact, out, lse, packed_of(offsets), *constants_of(pattern))
    return {"out": out, "lse": lse} | dict(zip(NAMES, gradients, strict=True))


@pytest.mark.parametrize(
    ("rows", "keys", "queries", "offsets", "pattern", "split"),
    [
        (1, 1, 1, None, SMALL, 16),
        (1, 150, 150, None, SMALL, 2),  # the first block's column in five chunks
        (2, 40, 40, [0, 1, 17, 40, 41, 80], SMALL, 16),  # records of 1, 16, 23, 1 and 39 tokens
        (1, 5, 5, list(range(6)), SMALL, 16),  # one-token records only
        (2, 60, 20, [0, 45, 60, 64, 120], SMALL, 2),  # a cache, left padding, a record without all of its queries
        (1, 33, 33, None, {"block": 5, "window": 2, "first": 3}, 2),  # a block that fills no tile, more first blocks
        (1, 30, 30, [0, 13, 30], {"block": 3, "window": 1, "first": 0}, 16),
    ],
)
def test_equals_the_reference(rows, keys, queries, offsets, pattern, split, place, close, monkeypatch) -> None:
    monkeypatch.setattr(device, "SPLIT", split)
    given = inputs_of(rows, keys, queries, place)
    got, want = both_ways(device, given, offsets, pattern), wanted(given, offsets, pattern)
    assert got["out"].dtype == given[0].dtype
    assert got["lse"].dtype == torch.float32
    for name, value in got.items():
        assert_close(value, want[name], **close, what=name)


def test_the_whole_autograd_equals_the_dense_oracle_and_counts_its_tiles(place, close, monkeypatch) -> None:
    """Through the operators, with three query heads a key head, heads that fill no tile, and the model's strides."""
    monkeypatch.setattr(log_sparse, "_device_code", lambda q, block: device)
    monkeypatch.setattr(device, "SPLIT", 4)
    offsets = [0, 100, 130]
    given = [x.requires_grad_() for x in inputs_of(1, 130, 130, place, heads=3, kv_heads=1, width=12)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:3]]
    with count_tiles() as count:
        got = log_sparse_torch(*turned, given[3], scale=SCALE, offsets=packed_of(offsets), **SMALL)
        ours = torch.autograd.grad(got.sum(), given)
    tiles = sum(tile_count(length, Pattern(**SMALL)) for length in (100, 30))
    assert count == TileCount(forward=tiles, backward=tiles, transposed=tiles)
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    want = dense_attention(exact, SCALE, sees(**SMALL), offsets)
    assert_close(got, want, **close)
    for name, mine, theirs in zip(NAMES, ours, torch.autograd.grad(want.sum(), exact), strict=True):
        assert_close(mine, theirs, **close, what=name)


@pytest.mark.parametrize("starts", [None, [0, 3, 69]])
def test_decoding_equals_the_reference(starts, place, close) -> None:
    given = inputs_of(3, 70, 1, place)
    begins = packed_of(starts)
    got = device.log_sparse_decode(*given, scale=SCALE, starts=begins, **SMALL)
    exact = [x.float().cpu() for x in given]
    assert_close(got, log_sparse.log_sparse_decode_torch(*exact, scale=SCALE, starts=begins, **SMALL), **close)


def test_a_records_bits_alone_and_among_others(place, monkeypatch) -> None:
    monkeypatch.setattr(device, "SPLIT", 2)
    q, k, v, sinks = inputs_of(1, 130, 130, place, heads=2, kv_heads=1)
    for first, last, offsets in ((20, 103, [0, 20, 103, 130]), (1, 49, [0, 1, 49, 50, 130])):
        packed = both_ways(device, [q, k, v, sinks], offsets, SMALL)
        own = [x[:, :, first:last] for x in (q, k, v)]
        constants = constants_of(SMALL)
        out, lse = device.log_sparse_forward(*own, sinks, None, *constants)
        upstream = upstream_of(q)[:, :, first:last]
        gradients = device.log_sparse_backward(upstream, *own, sinks, out, lse, None, *constants)
        alone = {"out": out, "lse": lse} | dict(zip(NAMES[:3], gradients, strict=False))
        for name, value in alone.items():
            assert torch.equal(value, packed[name][:, :, first:last]), name


# --- Kernels with one fault -------------------------------------------------------------------------------------------

# What stands in the source, what is written in its place, and what must then differ.
FAULTS = {
    "a power of two is one block off": (
        "t < first + powers, i - distance,",
        "t < first + powers, i - distance + 1,",
        "out",
    ),
    "a key block's farthest reader is left out": ("(near + powers) * (GROUP", "(near + powers - 1) * (GROUP", "k"),
    "a power of two is read from one block off": ("j + (1 << (LOW_POWER", "j - 1 + (1 << (LOW_POWER", "v"),
    "the sink is not in the denominator": (
        "total = tl.full([FOLD * TILE], 1.0",
        "total = tl.full([FOLD * TILE], 0.0",
        "out",
    ),
    "the first chunk is not added": ("for chunk in range((blocks", "for chunk in range(1, (blocks", "k"),
    "the sink's gradient has the other sign": ("-(shares * delta)", "(shares * delta)", "sinks"),
    "the query sees what comes after it": ("seen = place[:, None] >= key", "seen = place[:, None] >= 0 * key", "out"),
    "delta is left out": ("tl.trans(grad)) - delta[None, :])", "tl.trans(grad)))", "k"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_comparison(fault, place, close, tmp_path, monkeypatch) -> None:
    old, new, name = FAULTS[fault]
    wrong = faulty(device, old, new, tmp_path, monkeypatch)
    monkeypatch.setattr(wrong, "SPLIT", 2)
    given = inputs_of(1, 85, 85, place, heads=2, kv_heads=1)
    with pytest.raises(AssertionError, match=f"{name}: "):
        assert_close(both_ways(wrong, given, None, SMALL)[name], wanted(given, None, SMALL)[name], **close, what=name)


@pytest.mark.parametrize("fault", ["boundaries ignored", "heads swapped", "sinks missing", "a narrower window"])
def test_wrong_arguments_fail_the_comparison(fault, place, close) -> None:
    q, k, v, sinks = inputs_of(1, 70, 70, place)
    want = wanted([q, k, v, sinks], [0, 20, 70], SMALL)["out"]
    given = {
        "boundaries ignored": ([q, k, v, sinks], None, SMALL),
        "heads swapped": ([q, k.flip(1), v.flip(1), sinks], [0, 20, 70], SMALL),
        "sinks missing": ([q, k, v, torch.full_like(sinks, -1e30)], [0, 20, 70], SMALL),
        "a narrower window": ([q, k, v, sinks], [0, 20, 70], SMALL | {"window": 1, "first": 0}),
    }[fault]
    wrong, offsets, pattern = given
    got, _ = device.log_sparse_forward(*wrong, packed_of(offsets), *constants_of(pattern))
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(got, want, **close)


def test_what_does_not_fit_is_refused(place) -> None:
    q, k, v, sinks = inputs_of(1, 8, 8, place)
    constants = constants_of(SMALL)
    for given, offsets, text in (
        ([q[:, :3], k, v, sinks], None, "H a multiple of Hkv"),
        ([q.double(), k.double(), v.double(), sinks], None, "float32 or bfloat16"),
        ([q, k, v, sinks.to("meta")], None, "on one device"),
        ([q, k, v, sinks], torch.tensor([0, 4, 4, 8]), "ascend from 0 to 8"),
    ):
        with pytest.raises(ValueError, match=text):
            device.log_sparse_forward(*given, offsets, *constants)
    with pytest.raises(ValueError, match="blocks of at most 64"):
        device.log_sparse_forward(q, k, v, sinks, None, SCALE, 65, 3, 1)
    out, lse = device.log_sparse_forward(q, k, v, sinks, None, *constants)
    for wrong in ((out[:, :, 1:], out, lse), (out, out[:, :, 1:], lse), (out, out, lse.double())):
        with pytest.raises(ValueError, match="expected a"):
            device.log_sparse_backward(wrong[0], q, k, v, sinks, *wrong[1:], None, *constants)
    with pytest.raises(ValueError, match="one query a row"):
        device.log_sparse_decode(q, k, v, sinks, scale=SCALE)
    with pytest.raises(ValueError, match=r"got \[8\]"):
        device.log_sparse_decode(q[:, :, :1], k, v, sinks, scale=SCALE, starts=torch.tensor([8]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_pattern_at_the_models_heads(dtype) -> None:
    from support.tolerances import tolerance

    offsets = [0, 2500, 2501, 3000]
    given = inputs_of(1, 3000, 3000, (torch.device("cuda"), dtype), heads=16, kv_heads=2, width=64)
    pattern = {"block": 64, "window": 3, "first": 1}
    got, want = both_ways(device, given, offsets, pattern), wanted(given, offsets, pattern)
    for name, value in got.items():
        assert_close(value, want[name], **tolerance(dtype), what=name)
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    count = TileCount()
    device.log_sparse_forward(*given, packed_of(offsets), *constants_of(pattern), count=count)
    assert count.forward == sum(map(tile_count, lengths))
