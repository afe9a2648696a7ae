"""MXFP4 decode against the specification, on every byte; encode against a search over all codes and scales."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import mxfp4

# e2m1 as the OCP specification lists it, written out a second time on purpose.
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_at_every_scale_decodes_exactly(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16)  # each byte once
    for scale in range(mxfp4.SMALLEST_SCALE, mxfp4.LARGEST_SCALE + 1):
        got = mxfp4.decode(blocks, torch.full((16,), scale, dtype=torch.uint8), dtype)
        pairs = [(CODES[byte & 15], CODES[byte >> 4]) for byte in range(256)]
        want = torch.tensor(pairs, dtype=torch.float64).mul(2.0 ** (scale - 127)).reshape(16 * 32)
        assert torch.equal(got.double(), want)
        assert torch.equal(torch.signbit(got), torch.signbit(want))


def test_groups_run_along_the_inputs_low_nibble_first() -> None:
    blocks = torch.zeros(1, 2, 2, 16, dtype=torch.uint8)  # one expert, 2 outputs, 64 inputs
    blocks[0, 1, 1, 3] = 0x72  # output 1, inputs 32 + 6 and 32 + 7
    scales = torch.full((1, 2, 2), 128, dtype=torch.uint8)
    got = mxfp4.decode(blocks, scales)
    assert got.shape == (1, 2, 64)
    assert got.nonzero().tolist() == [[0, 1, 38], [0, 1, 39]]
    assert got[0, 1, 38:40].tolist() == [2.0, 12.0]


def test_a_tensor_that_starts_at_an_odd_byte_decodes_alike() -> None:
    storage = torch.randint(0, 256, (1 + 4 * 16,), dtype=torch.uint8)
    scales = torch.full((4,), 120, dtype=torch.uint8)
    assert torch.equal(
        mxfp4.decode(storage[1:].view(4, 16), scales), mxfp4.decode(storage[1:].clone().view(4, 16), scales)
    )


def test_grid_values_survive_a_round_trip() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (64, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(
        mxfp4.SMALLEST_SCALE + 2, mxfp4.LARGEST_SCALE - 1, (64, 3), dtype=torch.uint8, generator=generator
    )
    dense = mxfp4.decode(blocks, scales)
    again = mxfp4.decode(*mxfp4.encode(dense))
    assert torch.equal(again, dense)


def test_encode_takes_the_nearest_code_and_the_better_scale() -> None:
    dense = torch.randn(200, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 200).unsqueeze(-1)
    got = mxfp4.decode(*mxfp4.encode(dense)).double()
    codes = torch.tensor(CODES, dtype=torch.float64)
    tight = torch.floor(torch.log2(dense.abs().amax(-1).double())) - 2
    best = torch.full((200,), float("inf"), dtype=torch.float64)
    for step in (0, 1):
        grid = codes * torch.exp2(tight + step).unsqueeze(-1)  # (200, 16)
        nearest = (dense.double().unsqueeze(-1) - grid.unsqueeze(1)).abs().amin(-1)  # (200, 32)
        best = torch.minimum(best, nearest.square().sum(-1))
    error = (got - dense.double()).square().sum(-1)
    torch.testing.assert_close(error, best, rtol=1e-5, atol=0)


def test_ties_go_to_the_even_mantissa() -> None:
    group = torch.zeros(32)
    group[:8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    assert mxfp4.decode(*mxfp4.encode(group))[:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 2.0**126])
def test_encode_stays_within_what_decodes_exactly(value: float) -> None:
    blocks, scales = mxfp4.encode(torch.full((32,), value))
    assert mxfp4.SMALLEST_SCALE <= int(scales) <= mxfp4.LARGEST_SCALE
    assert bool(torch.isfinite(mxfp4.decode(blocks, scales)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**127])
def test_encode_refuses_what_it_cannot_store(value: float) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        mxfp4.encode(torch.full((32,), value))


def test_encode_refuses_a_broken_group() -> None:
    with pytest.raises(ValueError, match="33 inputs"):
        mxfp4.encode(torch.zeros(2, 33))


@pytest.mark.parametrize(
    ("blocks", "scales", "dtype", "text"),
    [
        (torch.zeros(2, 16), torch.zeros(2, dtype=torch.uint8), torch.float32, "expected uint8"),
        (torch.zeros(2, 15, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), torch.float32, "expected blocks"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), torch.float16, "float16"),
    ],
)
def test_decode_refuses(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mxfp4.decode(blocks, scales, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 6, 7, 9, 24])
def test_pieces_meet_without_a_gap(groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 groups in pieces that divide them, that do not, and in one; no group at all."""
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (2, 4, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, (2, 4, 3), dtype=torch.uint8, generator=generator)
    low, high = (torch.tensor(CODES)[codes.long()] for codes in (blocks & 15, blocks >> 4))
    want = torch.stack([low, high], -1).flatten(-2) * torch.exp2(scales.float() - 127).unsqueeze(-1)
    monkeypatch.setattr(mxfp4, "DECODE_GROUPS", groups)
    got = mxfp4.decode(blocks, scales, dtype)
    assert got.is_contiguous()
    assert torch.equal(got.float(), want.flatten(-2))
    assert mxfp4.decode(blocks[:0], scales[:0], dtype).shape == (0, 4, 96)
