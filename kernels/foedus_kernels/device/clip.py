"""K3 in Triton: segments' gradients, their squared norms without the gradients, and each expert's clipped sum.

Rows are sorted by (expert, unit), so that a unit's share of an expert's gradient is a segment of neighbours
(`foedus_kernels.clip`). With m rows in a segment and b bytes a value, what a segment costs::

                        reads            writes          FLOPs
    unit_gradients      m (N + R) b      N R b           2 m N R     one program a tile of G_s
    unit_square_norms   m (N + R) b      8 a group       2 m N R     tiles of G_s in registers, squares in float64
    clipped_gradient    m (N + R) b      (b N R) / U     2 m N R     one product of an expert's rows

The wide side is read once. The narrow side, of width R, is read once a tile of the wide one, mostly from the cache. All
three make a tile of a gradient in one function, `_tile`, hence to the same bits: rows in blocks counted from the
segment's own first row, products and their sums in float32, blocks in order.

Batch-invariance: a segment's result is a function of its own rows. No program reads two segments, nothing is added
atomically, the tiles follow from N and R, and the compiled code from these and the type: N and R are constants of it,
the number of rows and of segments is not, and rows lie at addresses of one alignment. The bits of a norm are those of
the gradient that `unit_gradients` writes, squared and added in float64: tiles in order, groups of tiles in order. A
Gram matrix, which cancels, appears nowhere.

The launchers never bring a value to the host. What the references check of the offsets' values (that they ascend from 0
to the number of rows) is therefore not checked: rows that an offset names beyond the last are not read, and a result
over wrong offsets is wrong.

Source: the loop over ragged groups is `triton_kernels` (ragged K, the gradient of weights), norms that keep no gradient
are "ghost norms" taken directly instead of by Gram matrices; segments by (expert, unit) are ours. Left out: splitting
one expert's rows over several programs, which an expert pair shared by a whole layer with tens of thousands of rows
would want; tensor memory descriptors; TF32 (float32 rows are multiplied in float32).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from foedus_kernels import clip
from foedus_kernels.device.guard import on_its_device

_ALIGNMENT = 16  # Bytes: rows elsewhere are copied, so that one compiled code, with one order of sums, serves all.
GROUP = 4  # Wide tiles of one program of the norms. H100, 128 experts x 16 units x 5760: 12 programs a segment.
SEGMENTS = 128  # Norms that one program adds up.
_MOST_PROGRAMS = 2**31 - 1  # Of a launch's first axis.
_MOST_ROWS = 2**31 - 2**10  # A segment's rows are counted in 32 bits, in blocks, from its own first one.


class Tiles(NamedTuple):
    """How one program's part of a gradient is cut: a function of its shape alone."""

    rows: int  # Rows of a segment that are multiplied at once.
    outs: int  # Of N.
    ins: int  # Of R.
    warps: int
    stages: int


def tiles_of(outs: int, ins: int) -> Tiles:
    """The tiles of an [N, R] gradient. Not measured; no register of sm_80, sm_90 and sm_100 spills, in either type.

    A product needs 16 of each axis, so a rank below 16 is padded. Beside a rank of 16 the wide side takes 128, so that
    the rank's rows, read for each tile, add an eighth to what is read. Segments have few rows (one unit of 512 tokens
    has 16 rows of each of 128 experts), hence few rows at once: one step of a bfloat16 product has 16.
    """
    rows = 16
    narrow = max(16, min(64, triton.next_power_of_2(min(outs, ins))))
    wide = max(16, min(128 if narrow == 16 else 64, triton.next_power_of_2(max(outs, ins))))
    tile = (wide, narrow) if outs >= ins else (narrow, wide)
    return Tiles(rows, *tile, warps=4, stages=3)


@triton.jit
def _tile(
    left_ptr,
    right_ptr,
    factors_ptr,
    start,
    count,
    first_out,
    first_in,
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One tile of ``left^T right`` over `count` rows from `start`: float32 (OUTS, INS).

    Rows may be 2^31 elements from the first one on, so that what leads to a segment is counted in 64 bits.
    """
    place = tl.arange(0, ROWS)
    outs = first_out + tl.arange(0, OUTS)
    ins = first_in + tl.arange(0, INS)
    out_there = outs < N
    in_there = ins < R  # A rank that is no power of two: what follows in memory is the next row.
    left_at = left_ptr + start * N + place[:, None] * N + outs[None, :]  # (ROWS, OUTS)
    right_at = right_ptr + start * R + place[:, None] * R + ins[None, :]  # (ROWS, INS)
    factors_at = factors_ptr + start + place  # (ROWS,)
    total = tl.zeros((OUTS, INS), dtype=tl.float32)
    for row in range(0, count, ROWS):
        there = row + place < count
        if SCALED:
            factors = tl.load(factors_at, mask=there, other=0.0)
            there = there & (factors != 0.0)  # A unit that takes no part is not read: its rows may be infinite.
            left = tl.load(left_at, mask=there[:, None] & out_there[None, :], other=0.0)
            right = tl.load(right_at, mask=there[:, None] & in_there[None, :], other=0.0)
            left = (left.to(tl.float32) * factors[:, None]).to(left_ptr.dtype.element_ty)
        else:
            left = tl.load(left_at, mask=there[:, None] & out_there[None, :], other=0.0)
            right = tl.load(right_at, mask=there[:, None] & in_there[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        left_at += ROWS * N
        right_at += ROWS * R
        factors_at += ROWS
    return total


@triton.jit
def _segment(offsets_ptr, first, last, rows):
    """Where a segment starts and how many rows it has, none of them beyond the last row: int64."""
    start = tl.minimum(tl.maximum(tl.load(offsets_ptr + first), 0), rows)
    stop = tl.minimum(tl.load(offsets_ptr + last), rows)
    return start, tl.maximum(stop - start, 0).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "units"])
def _gradients_kernel(
    left_ptr,
    right_ptr,
    factors_ptr,
    offsets_ptr,
    result_ptr,
    rows,
    units,
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A tile of the gradient over `units` neighbouring segments: one each, or an expert's all, scaled."""
    across: tl.constexpr = (R + INS - 1) // INS
    tiles: tl.constexpr = (N + OUTS - 1) // OUTS * across
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first_out = tile // across * OUTS
    first_in = tile % across * INS
    first = group.to(tl.int64) * units
    start, count = _segment(offsets_ptr, first, first + units, rows)
    total = _tile(left_ptr, right_ptr, factors_ptr, start, count, first_out, first_in, N, R, ROWS, OUTS, INS, SCALED)
    outs = first_out + tl.arange(0, OUTS)
    ins = first_in + tl.arange(0, INS)
    at = result_ptr + group.to(tl.int64) * N * R + outs[:, None] * R + ins[None, :]
    tl.store(at, total.to(result_ptr.dtype.element_ty), mask=(outs < N)[:, None] & (ins < R)[None, :])


@triton.jit(do_not_specialize=["rows", "segments"])
def _partial_norms_kernel(
    left_ptr,
    right_ptr,
    offsets_ptr,
    partial_ptr,
    rows,
    segments,
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The squares of a group of neighbouring tiles of one segment's gradient: partial float64 (groups, S)."""
    across: tl.constexpr = (R + INS - 1) // INS
    tiles: tl.constexpr = (N + OUTS - 1) // OUTS * across
    groups: tl.constexpr = (tiles + GROUP - 1) // GROUP
    segment = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    start, count = _segment(offsets_ptr, segment, segment + 1, rows)
    squares = tl.zeros((OUTS, INS), dtype=tl.float64)
    if count > 0:
        for step in range(GROUP):
            tile = group * GROUP + step
            own = tl.where(tile < tiles, count, 0)  # The last group may have fewer tiles: it reads no row for others.
            first_out = tile // across * OUTS
            first_in = tile % across * INS
            exact = _tile(
                left_ptr, right_ptr, left_ptr, start, own, first_out, first_in, N, R, ROWS, OUTS, INS, False
            ).to(tl.float64)
            squares += exact * exact
    # Beyond N and R the tile is zero, since neither side was read there.
    tl.store(partial_ptr + group.to(tl.int64) * segments + segment, tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["segments"])
def _sum_kernel(partial_ptr, result_ptr, segments, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Each segment's groups, added in order: float64 (groups, S) -> (S,)."""
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    there = segment < segments
    total = tl.zeros((SEGMENTS,), dtype=tl.float64)
    at = partial_ptr + segment
    for _ in range(GROUPS):
        total += tl.load(at, mask=there, other=0.0)
        at += segments.to(tl.int64)
    tl.store(result_ptr + segment, total, mask=there)


@on_its_device
def unit_gradients(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`clip.unit_gradients_torch` on a GPU; offsets' values are not checked.

    Raises:
        ValueError: Shapes or types that do not fit, or more than 2^31 programs.
    """
    left, right, offsets = _rows(left, right, offsets)
    segments = offsets.numel() - 1
    result = left.new_empty(segments, left.shape[1], right.shape[1])  # (S, N, R)
    _launch_gradients(left, right, offsets, result, units=1)
    return result


@on_its_device
def unit_square_norms(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`clip.unit_square_norms_torch` on a GPU: float64 [S]; offsets' values are not checked.

    Raises:
        ValueError: Shapes or types that do not fit, or more than 2^31 programs.
    """
    left, right, offsets = _rows(left, right, offsets)
    segments, outs, ins = offsets.numel() - 1, left.shape[1], right.shape[1]
    tiles = tiles_of(outs, ins)
    groups = triton.cdiv(triton.cdiv(outs, tiles.outs) * triton.cdiv(ins, tiles.ins), GROUP)
    partial = left.new_empty(groups, segments, dtype=torch.float64)
    norms = left.new_empty(segments, dtype=torch.float64)  # (S,)
    if not norms.numel():
        return norms
    _partial_norms_kernel[(_programs(segments * groups),)](
        *(left, right, offsets, partial, left.shape[0], segments, outs, ins),
        *(tiles.rows, tiles.outs, tiles.ins, GROUP),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    _sum_kernel[(triton.cdiv(segments, SEGMENTS),)](partial, norms, segments, groups, SEGMENTS)
    return norms


@on_its_device
def clipped_gradient(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """`clip.clipped_gradient_torch` on a GPU; offsets' values are not checked.

    A row is scaled in float32 and rounded to its type once, where the reference rounds the factor too.

    Raises:
        ValueError: Shapes or types that do not fit, a number of segments that is not a multiple of the units, or more
            than 2^31 programs.
    """
    left, right, offsets = _rows(left, right, offsets)
    experts = clip.experts_of(offsets, factors)
    if factors.device != left.device:
        raise ValueError(f"expected factors beside the rows on {left.device}, got them on {factors.device}")
    units, rows = factors.numel(), left.shape[0]
    places = torch.arange(rows, device=left.device)
    segment = torch.searchsorted(offsets, places, right=True).sub_(1).clamp_(0, offsets.numel() - 2)  # (M,)
    row_factors = factors.float().index_select(0, segment.remainder_(units))  # (M,)
    result = left.new_empty(experts, left.shape[1], right.shape[1])  # (E, N, R)
    _launch_gradients(left, right, offsets, result, units=units, row_factors=row_factors)
    return result


def _launch_gradients(
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor,
    result: torch.Tensor,
    *,
    units: int,
    row_factors: torch.Tensor | None = None,
) -> None:
    """Fill result [groups, N, R], each group being `units` neighbouring segments."""
    if not result.numel():
        return
    groups, outs, ins = result.shape
    tiles = tiles_of(outs, ins)
    programs = _programs(groups * triton.cdiv(outs, tiles.outs) * triton.cdiv(ins, tiles.ins))
    _gradients_kernel[(programs,)](
        *(
            left,
            right,
            left if row_factors is None else row_factors,
            offsets,
            result,
            left.shape[0],
            units,
            outs,
            ins,
        ),
        *(tiles.rows, tiles.outs, tiles.ins, row_factors is not None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _rows(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments, checked without a value of theirs, in memory as the kernels read it."""
    clip.check_shapes(left, right, offsets)
    if left.dtype not in clip.DEVICE_TYPES:
        raise ValueError(f"expected rows in float32 or bfloat16, got {left.dtype}: the reference takes it")
    if not left.device == right.device == offsets.device:
        raise ValueError(
            f"expected rows and offsets on one device, got them on {left.device}, {right.device} and {offsets.device}"
        )
    if left.shape[0] > _MOST_ROWS:
        raise ValueError(f"expected at most {_MOST_ROWS} rows, got {left.shape[0]}")
    return _aligned(left), _aligned(right), _aligned(offsets)


def _aligned(values: torch.Tensor) -> torch.Tensor:
    return (
        values
        if values.is_contiguous() and values.data_ptr() % _ALIGNMENT == 0
        else values.clone(memory_format=torch.contiguous_format)
    )


def _programs(count: int) -> int:
    if count > _MOST_PROGRAMS:
        raise ValueError(f"expected at most {_MOST_PROGRAMS} programs a launch, got {count}: pass fewer segments")
    return count
