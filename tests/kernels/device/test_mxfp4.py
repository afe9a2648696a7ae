"""K0 against the reference, to the bit: every byte at every scale, and what the comparison has to notice."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import mxfp4
from foedus_kernels.device import mxfp4 as device

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
SCALES = range(mxfp4.SMALLEST_SCALE, mxfp4.LARGEST_SCALE + 1)


def every_byte_at_every_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """blocks [251, 16, 16] and scales [251, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(len(SCALES), 1, 1)
    return blocks, torch.tensor(SCALES, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)


# The interpreter is wrong in bfloat16 arithmetic; the kernel has none, it puts bits together.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_byte_at_every_scale_to_the_bit(where: str, dtype: torch.dtype) -> None:
    blocks, scales = every_byte_at_every_scale()
    got = device.decode(blocks.to(where), scales.to(where), dtype)
    want = mxfp4.decode(blocks, scales, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.cpu().view(INTEGERS[dtype]), want.view(INTEGERS[dtype]))


def test_decoding_wrongly_is_seen(place) -> None:
    """Each fault, made in what is decoded, gives other bits in most places."""
    blocks, scales = (one.to(place[0]) for one in every_byte_at_every_scale())
    want = mxfp4.decode(blocks, scales)
    faults = {
        "nibbles swapped": ((blocks << 4) | (blocks >> 4), scales),
        "a group off": (blocks, scales.roll(1, 0)),
        "signs lost": (blocks & 0x77, scales),
        "bytes in reverse": (blocks.flip(-1), scales),
    }
    for name, (codes, exponents) in faults.items():
        assert (device.decode(codes, exponents) != want).float().mean() > 0.4, name


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (65,), (2, 3, 5)])
def test_shapes(shape: tuple[int, ...], place) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8).to(place[0])
    scales = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8).to(place[0])
    got = device.decode(blocks, scales, place[1])
    assert torch.equal(got, mxfp4.decode(blocks, scales, place[1]))


def test_memory_that_is_not_contiguous(place) -> None:
    blocks, scales = (one.to(place[0]) for one in every_byte_at_every_scale())
    got = device.decode(blocks.transpose(0, 1), scales.T)
    assert torch.equal(got, mxfp4.decode(blocks.transpose(0, 1), scales.T))


@pytest.mark.gpu
def test_beyond_2_to_31_values() -> None:
    """Values that lie where a 32-bit offset has run over: 2^31 + 2^20, in bfloat16 4.3 GB."""
    groups = ((1 << 31) + (1 << 20)) // 32
    blocks = torch.zeros(groups, 16, dtype=torch.uint8, device="cuda")
    scales = torch.full((groups,), 127, dtype=torch.uint8, device="cuda")
    blocks[-1] = torch.arange(16, dtype=torch.uint8, device="cuda") * 17
    got = device.decode(blocks, scales, torch.bfloat16)
    assert torch.equal(got[-32:], mxfp4.decode(blocks[-1:], scales[-1:], torch.bfloat16).flatten())
    assert not got[:-32].any()


def test_what_does_not_fit_is_refused() -> None:
    blocks, scales = every_byte_at_every_scale()
    with pytest.raises(ValueError, match=r"not to torch\.float16"):
        device.decode(blocks, scales, torch.float16)
    with pytest.raises(ValueError, match="expected blocks of shape"):
        device.decode(blocks[:3], scales)
    with pytest.raises(ValueError, match="expected uint8"):
        device.decode(blocks.int(), scales)
