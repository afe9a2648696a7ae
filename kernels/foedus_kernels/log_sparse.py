"""K5, log-sparse attention: block i of a record reads O(log i) earlier blocks, and every block is reachable.

Query block i (of `block` tokens, counted from its record's own start) reads the key blocks::

    S(i) = {i-window+1 .. i}  u  {i - 2^j : 2^j <= i}  u  {0 .. first-1}          (none below 0, none above i)

causal inside the block, with a sink in the denominator. |S(i)| <= window + first + 1 + log2(i), so a record of n tokens
costs O(n log n), and after log2(n / block) such layers every earlier block has been able to reach every later one. The
powers of two are LogSparse's (Li et al. 2019, arXiv:1907.00235), in blocks as in PowerAttention (arXiv:2503.03588).

The reference gathers the blocks that equally many tiles need and gives them to the library's fused attention, a bounded
number at a time: memory is linear in n, and no n x n tensor exists, mask included. The backward recomputes the gathered
pieces from (out, lse). It counts the tiles it multiplies (`count_tiles`), which must equal `tile_count`.

Where the tensors lie on a CUDA device, `device/log_sparse.py` computes all three in Triton if `backend.device_code`
finds nothing missing and `_device_code` a type, width and block that it takes: nothing that a batch could change.

Left out: block sizes that differ by layer, and selection by content (NSA, MoBA), which cannot be bounded in advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from foedus_kernels import backend
from foedus_kernels.records import Record, records_of
from foedus_kernels.stock import attend, attend_backward, band, check_shapes, lse_dtype, sinks_gradient

# What device code takes.
DEVICE_TYPES = (torch.float32, torch.bfloat16)
DEVICE_BLOCK = 64
DEVICE_WIDTH = 128
# Elements of gathered keys alive at once (and as many of values, and of each one's gradient).
GATHERED = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which blocks a query block reads.

    Attributes:
        block: Tokens of a block.
        window: Blocks read up to and with the own one.
        first: Blocks read from the record's start.
    """

    block: int = 64
    window: int = 3
    first: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 1 or self.first < 0:
            raise ValueError(
                "expected a log-sparse pattern of block >= 1, window >= 1, first >= 0, got "
                f"{self.block}, {self.window}, {self.first}"
            )

    def key_blocks(self, i: int) -> list[int]:
        """S(i) in ascending order; the last is i itself."""
        near = range(max(0, i - self.window + 1), i + 1)
        powers = (i - (1 << j) for j in range(i.bit_length()))
        return sorted({*near, *(key for key in powers if key >= 0), *range(min(self.first, i + 1))})


@dataclass
class TileCount:
    """Tiles (pairs of a query and a key block) that were multiplied, per KV head.

    Attributes:
        forward: For the output.
        backward: For the gradient of the queries.
        transposed: For the gradients of keys and values, where a key block finds the query blocks that read it.
    """

    forward: int = 0
    backward: int = 0
    transposed: int = 0


_COUNT: ContextVar[TileCount | None] = ContextVar("_COUNT", default=None)


@contextmanager
def count_tiles() -> Iterator[TileCount]:
    """Inside, the reference adds up the tiles that it multiplies."""
    count = TileCount()
    token = _COUNT.set(count)
    try:
        yield count
    finally:
        _COUNT.reset(token)


def _device_code(q: torch.Tensor, block: int) -> ModuleType | None:
    """`device/log_sparse.py` for tensors that it takes, where it can run."""
    if q.device.type != "cuda" or q.dtype not in DEVICE_TYPES or q.shape[3] > DEVICE_WIDTH or block > DEVICE_BLOCK:
        return None
    return backend.device_code("log_sparse", q.device)


def tile_count(length: int, pattern: Pattern | None = None) -> int:
    """Tiles of a record of `length` tokens, in closed form: O(log n) work, and independent of the code that runs.

    The window gives block i min(i + 1, window) tiles; each power 2^j beyond it one tile to every block that far from
    the start; each first block one tile to every block beyond the window for which it is at no power's distance.
    """
    pattern = pattern or Pattern()
    blocks = -(-length // pattern.block)
    window = min(pattern.window, blocks)
    tiles = window * (window + 1) // 2 + (blocks - window) * window
    powers = [1 << j for j in range(blocks.bit_length()) if 1 << j >= pattern.window]
    tiles += sum(max(0, blocks - power) for power in powers)
    for key in range(min(pattern.first, blocks)):
        farthest = blocks - 1 - key
        tiles += max(0, farthest - pattern.window + 1) - sum(power <= farthest for power in powers)
    return tiles


def log_sparse_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    block: int = 64,
    window: int = 3,
    first: int = 1,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sparse causal attention with sinks.

    Args:
        q: [B, H, Tq, D] in float32, float64 or bfloat16; the last Tq of each row's keys' positions.
        k: [B, Hkv, T, D], H a multiple of Hkv.
        v: [B, Hkv, T, D].
        sinks: [H], a logit in each head's denominator.
        scale: Of the products q k.
        block: Tokens of a block.
        window: Blocks read up to and with the own one.
        first: Blocks read from the record's start.
        offsets: Integers [records + 1] from 0 to B * T, where records begin in the flattened rows; None where every row
            is one record. Nothing is read across a boundary, and blocks are counted from a record's own start.

    Returns:
        [B, H, Tq, D]. Differentiable once in q, k, v and sinks; time and memory O(n log n) of the longest record.

    Raises:
        ValueError: Shapes, offsets or a pattern that do not fit.
    """
    Pattern(block=block, window=window, first=first)
    check_shapes(q, k, v, sinks)
    out, _ = log_sparse_forward(q, k, v, sinks, offsets, scale, block, window, first)
    return out


def log_sparse_decode_torch(
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
    """The newest token's attention over a cache: only the keys of its O(log n) blocks are read.

    Args:
        q: [B, H, 1, D], the query of each row's last key.
        k: [B, Hkv, T, D].
        v: [B, Hkv, T, D].
        sinks: [H].
        scale: Of the products q k.
        block: Tokens of a block.
        window: Blocks read up to and with the own one.
        first: Blocks read from the record's start.
        starts: Integers [B], where the record of each row's last token begins (left padding); None for 0.

    Returns:
        [B, H, 1, D], equal to the last row of `log_sparse_torch`.

    Raises:
        ValueError: Shapes, starts or a pattern that do not fit.
    """
    pattern = Pattern(block=block, window=window, first=first)
    check_shapes(q, k, v, sinks)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sinks))
    if not needs_gradient and (code := _device_code(q, block)) is not None:
        decoded: torch.Tensor = code.log_sparse_decode(
            q, k, v, sinks, scale=scale, block=block, window=window, first=first, starts=starts
        )
        return decoded
    rows, heads, queries, width = q.shape
    begins = [0] * rows if starts is None else starts.tolist()
    if queries != 1 or len(begins) != rows or any(not 0 <= begin < k.shape[2] for begin in begins):
        raise ValueError(
            f"expected one query and one start from 0 to {k.shape[2] - 1} for each of {rows} rows, "
            f"got {queries} queries and starts {begins}"
        )
    index, hidden = (x.to(q.device) for x in _decode_index(pattern, k.shape[2], begins))  # (B, M)
    gathered = index[:, None, :, None].expand(-1, k.shape[1], -1, width)  # (B, Hkv, M, D)
    kept = lse_dtype(q.dtype)
    grouped = q.view(rows, k.shape[1], -1, width)  # (B, Hkv, H / Hkv, D)
    scores = (grouped @ k.gather(2, gathered).mT).to(kept) * scale
    scores = scores.masked_fill(hidden[:, None, None, :], -float("inf"))
    sink = sinks.to(kept).view(1, k.shape[1], -1, 1).expand(rows, -1, -1, -1)
    shares = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1].to(v.dtype)
    return (shares @ v.gather(2, gathered)).view(rows, heads, 1, width)


def _decode_index(pattern: Pattern, keys: int, begins: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the keys that each row's last token reads, and which of them only fill the shorter rows up."""
    lists = []
    for begin in begins:
        blocks = pattern.key_blocks((keys - 1 - begin) // pattern.block)
        places = (torch.tensor(blocks).unsqueeze(1) * pattern.block + torch.arange(pattern.block)).flatten() + begin
        lists.append(places[places < keys])
    index = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)  # (B, M)
    return index.clamp(min=0), index < 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """A batch in blocks: every record is padded to whole blocks of its own.

    Attributes:
        keys: Places in the blocks of the B * T keys, int64.
        key_blocks: J, of all records together.
        queries: Places in the query blocks of the B * Tq queries, int64.
        query_blocks: I, those with a query in them.
        groups: Query blocks that read equally many key blocks: their indices (c,) and what they read (c, m), own last.
    """

    keys: torch.Tensor
    key_blocks: int
    queries: torch.Tensor
    query_blocks: int
    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def chunks(self, elements: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The groups in pieces whose gathered keys stay below GATHERED, given the elements of one key block."""
        for blocks, table in self.groups:
            size = max(1, GATHERED // (elements * table.shape[1]))
            yield from zip(blocks.split(size), table.split(size), strict=True)


# The layers of a model ask for the same plan one after the other.
@lru_cache(maxsize=4)
def _plan(records: tuple[Record, ...], pattern: Pattern, device: torch.device) -> _Plan:
    """Places and tables: O(n + tiles) integers."""
    block = pattern.block
    key_places, query_places = [], []
    by_width: dict[int, list[tuple[int, list[int]]]] = {}
    key_base = query_base = 0
    for record in records:
        blocks = -(-record.length // block)
        key_places.append(torch.arange(record.length) + key_base * block)
        if record.first_query < record.stop:
            skipped = (record.first_query - record.start) // block
            local = torch.arange(record.first_query - record.start, record.length)
            query_places.append(local + (query_base - skipped) * block)
            for i in range(skipped, blocks):
                reads = [key_base + key for key in pattern.key_blocks(i)]
                by_width.setdefault(len(reads), []).append((query_base + i - skipped, reads))
            query_base += blocks - skipped
        key_base += blocks
    groups = tuple(
        (
            torch.tensor([index for index, _ in by_width[width]], device=device),
            torch.tensor([reads for _, reads in by_width[width]], device=device),
        )
        for width in sorted(by_width)
    )
    return _Plan(
        keys=torch.cat(key_places).to(device),
        key_blocks=key_base,
        queries=torch.cat(query_places).to(device),
        query_blocks=query_base,
        groups=groups,
    )


def _planned(q: torch.Tensor, k: torch.Tensor, offsets: torch.Tensor | None, pattern: Pattern) -> _Plan:
    records = records_of(offsets, rows=q.shape[0], keys=k.shape[2], queries=q.shape[2])
    return _plan(records, pattern, q.device)


def _to_blocks(x: torch.Tensor, places: torch.Tensor, blocks: int, block: int) -> torch.Tensor:
    """[B, H, T, D] -> [H, blocks, block, D], zero where no token stands."""
    heads, width = x.shape[1], x.shape[3]
    flat = x.transpose(0, 1).reshape(heads, -1, width)  # (H, B * T, D)
    padded = x.new_zeros(heads, blocks * block, width).index_copy_(1, places, flat)
    return padded.view(heads, blocks, block, width)


def _from_blocks(x: torch.Tensor, places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[H, blocks, block, D] -> the shape and type of `like`, [B, H, T, D], contiguous."""
    rows, heads, tokens, width = like.shape
    flat = x.reshape(heads, -1, width).index_select(1, places)  # (H, B * T, D)
    return flat.view(heads, rows, tokens, width).transpose(0, 1).to(like.dtype).contiguous()


def _fold(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Put a group's heads among the rows of its key head: [H, I, b, D] -> [Hkv, I, (H / Hkv) b, D]."""
    _, blocks, block, width = x.shape
    return x.view(kv_heads, -1, blocks, block, width).transpose(1, 2).reshape(kv_heads, blocks, -1, width)


def _unfold(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_fold`: [Hkv, I, (H / Hkv) b, D] -> [H, I, b, D]."""
    kv_heads, blocks, _, width = x.shape
    return x.view(kv_heads, blocks, heads // kv_heads, -1, width).transpose(1, 2).reshape(heads, blocks, -1, width)


def _tile_mask(group: int, block: int, tiles: int, like: torch.Tensor) -> torch.Tensor:
    """What a folded query block may not see of its tiles: the future inside its own, the last."""
    return band(block, tiles * block, None, like).repeat(group, 1)  # (group * b, m * b)


def _sink_rows(sinks: torch.Tensor, kv_heads: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """The sink of each folded row: [H] -> [Hkv, 1, (H / Hkv) b]."""
    return sinks.to(dtype).view(kv_heads, -1).repeat_interleave(block, 1).unsqueeze(1)


@torch.library.custom_op("foedus::log_sparse_forward", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_sparse_torch` with the log-sum-exp of every query [B, H, Tq], the sink in it."""
    if (code := _device_code(q, block)) is not None:
        made: tuple[torch.Tensor, torch.Tensor] = code.log_sparse_forward(
            q, k, v, sinks, offsets, scale, block, window, first, count=_COUNT.get()
        )
        return made
    plan = _planned(q, k, offsets, Pattern(block=block, window=window, first=first))
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    queries = _fold(_to_blocks(q, plan.queries, plan.query_blocks, block), kv_heads)  # (Hkv, I, G b, D)
    keys, values = (_to_blocks(x, plan.keys, plan.key_blocks, block) for x in (k, v))  # (Hkv, J, b, D)
    sink = _sink_rows(sinks, kv_heads, block, lse_dtype(q.dtype))
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:3], dtype=sink.dtype)
    for blocks, table in plan.chunks(keys[:, 0].numel()):
        mask = _tile_mask(heads // kv_heads, block, table.shape[1], q)
        key, value = (x.index_select(1, table.flatten()).view(kv_heads, len(blocks), -1, width) for x in (keys, values))
        part, part_lse = attend(queries.index_select(1, blocks), key, value, scale=scale, mask=mask)
        whole = torch.logaddexp(part_lse, sink)  # (Hkv, c, G b)
        out.index_copy_(1, blocks, part * (part_lse - whole).exp().unsqueeze(-1).to(part.dtype))
        lse.index_copy_(1, blocks, whole)
        if (count := _COUNT.get()) is not None:
            count.forward += table.numel()
    shaped = _from_blocks(_unfold(lse.unsqueeze(-1), heads), plan.queries, lse.new_empty(*q.shape[:3], 1))
    return _from_blocks(_unfold(out, heads), plan.queries, q), shaped.squeeze(-1)


@torch.library.custom_op("foedus::log_sparse_backward", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and sinks from the output and log-sum-exp of `log_sparse_forward`."""
    if (code := _device_code(q, block)) is not None:
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = code.log_sparse_backward(
            grad, q, k, v, sinks, out, lse, offsets, scale, block, window, first, count=_COUNT.get()
        )
        return gradients
    plan = _planned(q, k, offsets, Pattern(block=block, window=window, first=first))
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    queries, outs, grads = (
        _fold(_to_blocks(x, plan.queries, plan.query_blocks, block), kv_heads) for x in (q, out, grad)
    )  # (Hkv, I, G b, D)
    lses = _fold(_to_blocks(lse.unsqueeze(-1), plan.queries, plan.query_blocks, block), kv_heads).squeeze(-1)
    keys, values = (_to_blocks(x, plan.keys, plan.key_blocks, block) for x in (k, v))  # (Hkv, J, b, D)
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros_like(keys, dtype=lse.dtype) for _ in range(2))  # Sums of up to I pieces.
    for blocks, table in plan.chunks(keys[:, 0].numel()):
        mask = _tile_mask(heads // kv_heads, block, table.shape[1], q)
        key, value = (x.index_select(1, table.flatten()).view(kv_heads, len(blocks), -1, width) for x in (keys, values))
        query, upstream, whole, whole_lse = (x.index_select(1, blocks) for x in (queries, grads, outs, lses))
        part = attend_backward(upstream, query, key, value, whole, whole_lse, scale=scale, mask=mask)
        dq.index_copy_(1, blocks, part[0])
        for total, piece in ((dk, part[1]), (dv, part[2])):
            total.index_add_(1, table.flatten(), piece.reshape(kv_heads, -1, block, width).to(total.dtype))
        if (count := _COUNT.get()) is not None:
            count.backward += table.numel()
            count.transposed += table.numel()
    return (
        _from_blocks(_unfold(dq, heads), plan.queries, q),
        _from_blocks(dk, plan.keys, k),
        _from_blocks(dv, plan.keys, v),
        sinks_gradient(sinks, grad, out, lse),
    )


@log_sparse_forward.register_fake
def _(q, k, v, sinks, offsets, scale, block, window, first):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=lse_dtype(q.dtype)
    )


@log_sparse_backward.register_fake
def _(grad, q, k, v, sinks, out, lse, offsets, scale, block, window, first):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, sinks))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, offsets, *ctx.constants = inputs
    ctx.mark_non_differentiable(output[1])  # Its gradient would be lost: the fused backward takes none.
    ctx.save_for_backward(q, k, v, sinks, *output, offsets)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, lse, offsets = ctx.saved_tensors
    gradients = log_sparse_backward(grad, q, k, v, sinks, out, lse, offsets, *ctx.constants)
    return *gradients, None, None, None, None, None


log_sparse_forward.register_autograd(_differentiate, setup_context=_keep)
