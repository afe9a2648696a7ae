"""K0 in Triton: decode MXFP4, inside a product (`decode_tile`) or to memory (`decode`).

Layout: blocks uint8 [..., K/32, 16], the earlier input in the low nibble, scales uint8 [..., K/32], e8m0
(`foedus_kernels.mxfp4`). A decoded value is put together from bits, by integers alone, the two of a byte at once in the
halves of a 32-bit number. With s the scale's byte and m the lower three bits of a code, a value's size is
``2^(s - 128) * (0, 1, 2, 3, 4, 6, 8, 12)[m]``, hence the bits of a bfloat16 are::

    m >= 2   exponent s - 1 + (m >> 1), first bit of the mantissa m & 1: one sum, (s - 1) << 7 plus m << 6
    m == 1   exponent s - 1, mantissa 0: the same sum without m's last bit
    m == 0   zero: nothing

A float32 has the same bits, and zeros after them. No table is read, no product rounds, and nothing depends on how a
device treats numbers below the normal ones. Exact for the scales that a checkpoint may have, 2 to 252.

Bytes and FLOPs of `decode`, a value: reads 17/32, writes 4 or 2, and takes no FLOP but 5 integer operations. A layer of
gpt-oss-20b (796 million values) in bfloat16: 2.0 GB, floor 0.60 ms on an H100 (3.35 TB/s) and 0.42 ms on an H200 (4.8
TB/s). Not measured. One value at a time, with comparisons, the loop of a product has 531 instructions on sm_90; two at
once it has 279, and the two halves are stored as they lie (Triton 3.9, a tile of 128 x 64 and 256 threads).

Source: the OCP Microscaling Formats 1.0; two values in one register after Marlin's and others' kernels for 4 bits.
Triton's own `dot_scaled` decodes the format inside a product for scales along the contracted axis, which the adjoint's
are not. Left out: that instruction, and look-ups by byte permutation, which the interpreter does not have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foedus_kernels import mxfp4
from foedus_kernels.device.guard import on_its_device

_GROUPS = 64  # A program's: 1 KiB of codes, 4 KiB of values in bfloat16. Not measured.
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def decode_tile(codes, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of a matrix: codes uint8 (ROWS, COLUMNS / 2), scales uint8 (ROWS, COLUMNS / 32) -> (ROWS, COLUMNS).

    What lies beyond a matrix is to be loaded as codes of 0, whose value is 0 at any scale.
    """
    GROUPS: tl.constexpr = COLUMNS // 32
    byte = tl.reshape(codes, (ROWS, GROUPS, 16)).to(tl.uint32)
    # Both nibbles of a byte, each at the same place of its half of 32 bits. A product is a copy at two places at once.
    at = byte * 0x00040040  # the code's bits 0 to 2 at bits 6 to 8, where mantissa and exponent of bfloat16 meet
    above = byte * 0x00020020 | byte * 0x00010010  # at bit 6: whether bit 1 or 2 is set
    kept = at & (above | 0x01800180) & 0x01C001C0  # exponent, and the mantissa where the code's exponent is not 0
    there = (at | above) & 0x00400040  # at bit 6: whether the code is not zero
    exponents = tl.reshape(scales.to(tl.uint32) * 2 - 2, (ROWS, GROUPS, 1))
    pairs = there * exponents + kept | byte * 0x01001000 & 0x80008000
    if DTYPE == tl.float32:  # noqa: SIM300
        values = tl.join(pairs << 16, pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        values = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(tl.bfloat16, bitcast=True)
    return tl.reshape(values, (ROWS, COLUMNS))


@triton.jit
def _decode_kernel(blocks_ptr, scales_ptr, values_ptr, groups, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """A program decodes GROUPS neighbouring groups of 32 values."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    byte = tl.arange(0, 16)
    codes = tl.load(blocks_ptr + group[:, None] * 16 + byte[None, :], mask=there[:, None], other=0)
    scales = tl.load(scales_ptr + group, mask=there, other=0)
    values = decode_tile(codes, tl.reshape(scales, (GROUPS, 1)), GROUPS, 32, DTYPE)
    place = tl.arange(0, 32)
    tl.store(values_ptr + group[:, None] * 32 + place[None, :], values, mask=there[:, None])


@on_its_device
def decode(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`mxfp4.decode` on a GPU, equal to the bit.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G], bytes from 2 to 252, which is not checked.
        dtype: `torch.float32` or `torch.bfloat16`.

    Returns:
        [..., G * 32] in `dtype`, contiguous.

    Raises:
        ValueError: A wrong shape or type, two devices, or a dtype in which the values are not exact.
    """
    mxfp4.check_packed(blocks, scales)
    if dtype not in _TYPES:
        raise ValueError(f"the kernel decodes MXFP4 to float32 and bfloat16, not to {dtype}")
    if blocks.device != scales.device:
        raise ValueError(f"expected codes and scales on one device, got {blocks.device} and {scales.device}")
    blocks, scales = blocks.contiguous(), scales.contiguous()
    values = torch.empty(*scales.shape[:-1], scales.shape[-1] * mxfp4.GROUP, dtype=dtype, device=blocks.device)
    groups = scales.numel()
    if groups:
        _decode_kernel[(triton.cdiv(groups, _GROUPS),)](
            *(blocks, scales, values, groups, _GROUPS, _TYPES[dtype]), num_warps=4
        )
    return values
