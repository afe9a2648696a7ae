"""K5 on a GPU: log-sparse attention in Triton, forward, backward and decode, equal to `foedus_kernels.log_sparse`.

What one program does stands in `log_sparse_kernels.py`; here are the checks, the grids and what is compiled in.

A first block's keys are read by every later block: in the backward a column as long as the record. In a record of more
than SPLIT blocks the column's chunks are programs of their own, which leave partial sums in a workspace; a last kernel
adds them in ascending order. So each sum has one order, that follows from the record alone: there are no atomics, and a
record's bits are those that it has alone.

Layout: q [B, H, Tq, D], k and v [B, Hkv, T, D] with any strides but the last; what is returned is contiguous.

Work, for n tiles (`tile_count`), H heads, block b, e bytes an element: 4 n H b^2 D FLOPs forward, 10 n H b^2 D backward
(five products, and two of them a second time: 14). Bytes from device memory if the second level cache holds one key
head: q, k, v, out and lse once, e (2 H + 2 Hkv) T D + 4 H T; between it and the processors e 2 n (H / fold) b D.
For gpt-oss's heads (64, 8 and 64 wide) at 32,768 tokens n = 5,111: 0.34 TFLOP forward and 1.2 backward.

Ideas: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the two passes of the backward, Triton's tutorial 06 for their
shape. Left out: float16, blocks of more than 64 tokens, heads wider than 128 (the reference takes them), tensor
memory accelerators, and a decode split over programs (O(log n) tiles are few).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from foedus_kernels import backend
from foedus_kernels.device import log_sparse_kernels as kernels
from foedus_kernels.device.guard import on_its_device
from foedus_kernels.log_sparse import DEVICE_BLOCK, DEVICE_TYPES, DEVICE_WIDTH, Pattern, TileCount
from foedus_kernels.records import records_of
from foedus_kernels.stock import check_shapes

# Query blocks of a first block's column that one program sums. Block 64, 64 and 8 heads of 64: at 32,768 tokens 31
# partial sums of 0.26 MB; an ordinary key block has up to 12 query blocks. Not measured.
SPLIT = 16


class How(NamedTuple):
    """How a kernel is compiled: a function of the kernel, the type and the heads' width alone."""

    rows: int  # Of a tile of queries, at most.
    warps: int
    stages: int  # Of the software pipeline.


def how(kernel: str, dtype: torch.dtype, width: int) -> How:
    """For the kernels ``forward``, ``queries``, ``keys`` and ``decode``.

    Of what was compiled for heads of 64 in bfloat16, this spills nothing on sm_90. ``keys`` spills on sm_80 three
    registers by Triton 3.9 and eight by 3.6, and on sm_100 none and two. In float32 ``keys`` spills everywhere: its
    products are not the tensor cores'. No time was measured.
    """
    if kernel == "decode":
        return How(16, 4, 2)
    if dtype == torch.float32:
        return How(64, 16, 1)
    return How(64 if kernel == "keys" else 128, 4 if kernel == "keys" else 8, 2 if width <= 64 else 1)


@on_its_device
def log_sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    offsets: torch.Tensor | None,
    scale: float,
    block: int,
    window: int,
    first: int,
    *,
    count: TileCount | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp of `foedus_kernels.log_sparse.log_sparse_forward`, with the same arguments.

    Args:
        q, k, v, sinks, scale, block, window, first: As there, in float32 or bfloat16.
        offsets: As there. Where they lie on the device, bad ones stop the process (a device assertion): the host does
            not wait to read them.
        count: Gets the tiles multiplied, per KV head, where it is given; the host then waits.

    Raises:
        ValueError: Shapes, a type, a pattern or a place that do not fit, or offsets on the host that do not.
    """
    _check(q, k, v, sinks, Pattern(block=block, window=window, first=first))
    q, k, v = (_aligned(x) for x in (q, k, v))
    cuts = _cuts(q, k, offsets, check=True)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    compiled = compiled_for("forward", q, k, block, window, first)
    grid = (_slots(k, cuts, block), q.shape[1] // compiled["FOLD"])
    counts = _counts(q, grid, count)
    kernels.forward_kernel[grid](
        *(q, k, v, sinks.contiguous(), out, lse, cuts, counts),
        *(len(cuts) - 1, k.shape[2], q.shape[2], scale * kernels.LOG2_E.value, *_strides(q, k, v), q.shape[1]),
        **compiled,
        COUNT=count is not None,
    )
    if count is not None:
        count.forward += int(counts.sum()) // grid[1]
    return out, lse


@on_its_device
def log_sparse_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    offsets: torch.Tensor | None,
    scale: float,
    block: int,
    window: int,
    first: int,
    *,
    count: TileCount | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v and sinks, as `foedus_kernels.log_sparse.log_sparse_backward` gives them.

    Args:
        grad: Of the output [B, H, Tq, D].
        q, k, v, sinks, offsets, scale, block, window, first: As they were given to the forward.
        out, lse: What the forward returned.
        count: Gets the tiles multiplied, per KV head, where it is given; the host then waits.

    Raises:
        ValueError: As the forward, and an output, gradient or log-sum-exp of another shape or type.
    """
    _check(q, k, v, sinks, Pattern(block=block, window=window, first=first))
    if grad.shape != q.shape or grad.dtype != q.dtype or out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"expected an output and its gradient {q.dtype} {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)} "
            f"and {grad.dtype} {tuple(grad.shape)}"
        )
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"expected a log-sum-exp float32 {tuple(q.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    grad, q, k, v = (_aligned(x) for x in (grad, q, k, v))
    out, lse = _aligned(out.contiguous()), lse.contiguous()
    cuts = _cuts(q, k, offsets, check=False)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    numbers = (len(cuts) - 1, k.shape[2], q.shape[2], scale, scale * kernels.LOG2_E.value, *_strides(grad, q, k, v))

    compiled = compiled_for("queries", q, k, block, window, first)
    grid = (_slots(k, cuts, block), q.shape[1] // compiled["FOLD"])
    counts = _counts(q, grid, count)
    kernels.queries_kernel[grid](
        *(grad, q, k, v, out, lse, delta, dq, cuts, counts, *numbers, q.shape[1]), **compiled, COUNT=count is not None
    )
    if count is not None:
        count.backward += int(counts.sum()) // grid[1]

    compiled = compiled_for("keys", q, k, block, window, first)
    # A record of more than one chunk is longer than block * SPLIT tokens: one slot for half as many is enough for all
    # its chunks, and a shorter record needs none.
    chunks = (k.shape[0] * k.shape[2] // (block * SPLIT // 2), k.shape[1], first)
    whole = (grid[0], k.shape[1], 1)
    partial = q.new_empty((chunks[0], first, k.shape[1], 2, block, q.shape[3]), dtype=torch.float32)
    for places, only_chunks in ((chunks, True), (whole, False)):
        if min(places) == 0:
            continue
        counts = _counts(q, places, count)
        kernels.keys_kernel[places](
            *(grad, q, k, v, lse, delta, dk, dv, partial, cuts, counts, *numbers, q.shape[1]),
            **compiled,
            SPLIT=SPLIT,
            CHUNKS=only_chunks,
            COUNT=count is not None,
        )
        if count is not None:
            count.transposed += int(counts.sum()) // (q.shape[1] // compiled["FOLD"])
    if min(chunks) > 0:
        used = ("BLOCK", "TILE", "FIRST", "WIDTH", "TILE_WIDTH")
        kernels.chunks_kernel[chunks](
            *(dk, dv, partial, cuts, *numbers[:2], scale), **{name: compiled[name] for name in used}, SPLIT=SPLIT
        )
    shares = (sinks.float().view(1, -1, 1) - lse).exp()  # (B, H, Tq)
    return dq, dk, dv, -(shares * delta).sum((0, 2)).to(sinks.dtype)


@on_its_device
def log_sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    block: int = 64,
    window: int = 3,
    first: int = 1,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of `foedus_kernels.log_sparse.log_sparse_decode_torch`, with the same arguments; not differentiable.

    Starts on the device are not read by the host; bad ones stop the process (a device assertion).

    Raises:
        ValueError: As the forward, more than one query a row, or starts on the host that do not fit.
    """
    pattern = Pattern(block=block, window=window, first=first)
    _check(q, k, v, sinks, pattern)
    rows, heads, queries, _ = q.shape
    if queries != 1:
        raise ValueError(f"expected one query a row, got {queries}")
    if starts is None:
        begins = torch.zeros(rows, dtype=torch.int64, device=q.device)
    elif starts.shape != (rows,):
        raise ValueError(f"expected one start for each of {rows} rows, got {tuple(starts.shape)}")
    else:
        fits = ((starts >= 0) & (starts < k.shape[2])).all()
        if starts.device.type == "cpu" and not fits:
            raise ValueError(f"expected starts from 0 to {k.shape[2] - 1}, got {starts.tolist()}")
        torch._assert_async(fits)  # Nothing where the starts lie on the host: they fit.
        begins = starts.to(q.device, torch.int64).contiguous()
    q, k, v = (_aligned(x) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    compiled = compiled_for("decode", q, k, block, window, first)
    del compiled["FOLD"]
    q_row, q_head, _, *others = _strides(q, k, v)
    kernels.decode_kernel[(rows, k.shape[1])](
        *(q, k, v, sinks.contiguous(), out, begins, k.shape[2], scale * kernels.LOG2_E.value, q_row, q_head, *others),
        **compiled,
        TILE_GROUP=_tile(heads // k.shape[1]),
    )
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, pattern: Pattern) -> None:
    check_shapes(q, k, v, sinks)
    if q.dtype not in DEVICE_TYPES or q.shape[3] > DEVICE_WIDTH or pattern.block > DEVICE_BLOCK:
        raise ValueError(
            f"expected float32 or bfloat16, heads of at most {DEVICE_WIDTH} and blocks of at most {DEVICE_BLOCK} "
            f"tokens, got {q.dtype}, {q.shape[3]} and {pattern.block}; the reference in torch takes these"
        )
    if q.device.type != "cuda" and not backend.interpreting():
        raise ValueError(f"expected tensors on a CUDA device, got them on {q.device}; the reference runs everywhere")
    if len({x.device for x in (q, k, v, sinks)}) != 1:
        raise ValueError(f"expected all tensors on one device, got {[str(x.device) for x in (q, k, v, sinks)]}")


def _unit(width: int) -> int:
    """The power of two, up to 16, in multiples of which rows of this width begin."""
    return math.gcd(width, 16)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if its rows begin elsewhere than all tensors of its width can."""
    unit = _unit(x.shape[3])
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    if fits and all(step % unit == 0 for step, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of rows, heads and tokens, in units; those of a single row, head or token do not matter."""
    return tuple(
        step // _unit(x.shape[3]) if size > 1 else 0
        for x in tensors
        for step, size in zip(x.stride(), x.shape[:3], strict=False)
    )


def _cuts(q: torch.Tensor, k: torch.Tensor, offsets: torch.Tensor | None, *, check: bool) -> torch.Tensor:
    """Where records begin and end in the flattened keys, the rows' own boundaries too: int64, on q's device.

    A boundary named twice makes an empty record, which no program looks at.
    """
    rows, keys = k.shape[0], k.shape[2]
    ends = torch.arange(0, rows * keys + 1, keys, device=q.device)
    if offsets is None:
        return ends
    if offsets.device.type == "cpu":
        records_of(offsets, rows=rows, keys=keys, queries=q.shape[2])
        if offsets.numel() == 0:
            return ends
    elif check:
        torch._assert_async((offsets[0] == 0) & (offsets[-1] == rows * keys) & (offsets.diff() > 0).all())
    cuts = offsets.to(q.device, torch.int64).contiguous()
    return cuts if rows == 1 else torch.cat([cuts, ends]).sort().values


def _slots(k: torch.Tensor, cuts: torch.Tensor, block: int) -> int:
    """Programs that are enough for the blocks of all records."""
    return k.shape[0] * k.shape[2] // block + len(cuts) - 1


def _counts(q: torch.Tensor, grid: tuple[int, ...], count: TileCount | None) -> torch.Tensor:
    """A place for each program's tiles."""
    return torch.zeros(grid if count is not None else 0, dtype=torch.int32, device=q.device)


def _tile(size: int) -> int:
    """The side of a tile: a power of two, as tiles must be, and 16 at least, as their products must."""
    return max(16, triton.next_power_of_2(size))


def compiled_for(kernel: str, q: torch.Tensor, k: torch.Tensor, block: int, window: int, first: int) -> dict[str, Any]:
    """What is compiled in. Nothing here depends on how many tokens or records there are."""
    group, tile = q.shape[1] // k.shape[1], _tile(block)
    rows, warps, stages = how(kernel, q.dtype, q.shape[3])
    fold = 1
    while group % (2 * fold) == 0 and 2 * fold * tile <= rows:
        fold *= 2
    return {
        "GROUP": group,
        "FOLD": fold,
        "BLOCK": block,
        "TILE": tile,
        "WINDOW": window,
        "FIRST": first,
        "LOW_POWER": (window - 1).bit_length(),  # The first power of two that lies beyond the window.
        "WIDTH": q.shape[3],
        "TILE_WIDTH": _tile(q.shape[3]),
        "UNIT": _unit(q.shape[3]),
        "WIDE": backend.interpreting(),
        "num_warps": warps,
        "num_stages": stages,
    }
