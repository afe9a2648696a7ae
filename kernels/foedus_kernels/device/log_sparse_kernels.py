"""The device code of K5: what one program of log-sparse attention does. `log_sparse.py` launches it.

Every program works out by arithmetic which tiles it multiplies; no table of tiles exists and the host reads nothing
back. A query block i counts its key blocks S(i) off as first blocks, powers of two, window. A key block j finds who
reads it the other way round::

    j >= first:   {j .. j+window-1}  u  {j + 2^p : 2^p >= window}
    j <  first:   {j .. last}        in chunks of SPLIT query blocks

Records come as cuts in the flattened stream of keys. A record r that begins at token s owns the programs from
s // block + r on: there are enough of them for its blocks whatever the others are, and a few that find nothing to do.
Programs look r up by binary search in the cuts.

A tile of queries holds the tokens of one block for `FOLD` query heads of one key head, so that each tile of keys is
read for up to 128 rows at once. Offsets of rows are counted in units of UNIT numbers, in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers of a launch that no code is compiled for: with another code for a length that 16 divides, sums would have
# another order there. Rows are aligned by `UNIT` instead, which follows from the heads' width.
_NUMBERS = ["records", "keys", "queries", "heads"]
_NUMBERS += [f"{tensor}_{axis}" for tensor in "gqkv" for axis in ("row", "head", "token")]

LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


# --------------------------------------------------------------------------------------------------------------------
# The pattern
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _powers_up_to(distance, LOW_POWER: tl.constexpr):
    """How many powers of two from 2^LOW_POWER on are no farther than `distance` (below 2^24 blocks)."""
    # The exponent of a float32 is the logarithm, rounded down; 0 has exponent 0 and counts none.
    exponent = tl.maximum(distance, 0).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return tl.maximum(exponent - (126 + LOW_POWER), 0)


@triton.jit
def _keys_read(i, WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr):
    """How many first blocks, powers of two and blocks of the window query block i reads; none is counted twice."""
    window = tl.minimum(i + 1, WINDOW)
    first = tl.minimum(i + 1 - window, FIRST)
    return first, _powers_up_to(i - FIRST, LOW_POWER), window


@triton.jit
def _key_block(t, i, first, powers, window, LOW_POWER: tl.constexpr):
    """The t-th key block of query block i, in ascending order; the last is i."""
    distance = 1 << (LOW_POWER + tl.maximum(first + powers - 1 - t, 0))
    return tl.where(t < first, t, tl.where(t < first + powers, i - distance, i + 1 - (first + powers + window - t)))


@triton.jit
def _queries_reading(
    j, chunk, blocks, skipped,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Which of a record's query blocks [skipped, blocks) read key block j, in the given chunk of a first block's.

    Returns the first of the near ones, their number, the number of powers of two, and how many lie before `skipped`.
    """
    begin = j + chunk * SPLIT
    end = begin + tl.where(j < FIRST, SPLIT, WINDOW)
    low = tl.maximum(begin, skipped)
    near = tl.maximum(tl.minimum(end, blocks) - low, 0)
    before = _powers_up_to(skipped - 1 - j, LOW_POWER)
    powers = tl.where(j < FIRST, 0, _powers_up_to(blocks - 1 - j, LOW_POWER) - before)
    return low, near, powers, before


@triton.jit
def _query_block(t, j, low, near, before, LOW_POWER: tl.constexpr):
    """The t-th query block that reads key block j."""
    return tl.where(t < near, low + t, j + (1 << (LOW_POWER + before + tl.maximum(t - near, 0))))


# --------------------------------------------------------------------------------------------------------------------
# Places
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _record(CUTS, records, slot, SPAN: tl.constexpr, STEP: tl.constexpr):
    """The last record that owns no slot beyond `slot`: its number, first token and length.

    A record owns the slots from token // SPAN + number * STEP on.
    """
    high = records.to(tl.int64)
    low = high * 0
    while high - low > 1:
        middle = (low + high) // 2
        owns = tl.load(CUTS + middle) // SPAN + middle * STEP <= slot
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    start = tl.load(CUTS + low)
    return low, start, (tl.load(CUTS + low + 1) - start).to(tl.int32)


@triton.jit
def _query_rows(
    i, head_tile, first_query, length, BLOCK: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Of the rows of a tile of queries: the head, the place in the record, and whether a query stands there.

    `first_query` is the place in the record of the row's first query, negative where the record has more of them.
    """
    rows = tl.arange(0, FOLD * TILE)
    place = i * BLOCK + rows % TILE
    stands = (place < length) & (place >= first_query)
    if TILE != BLOCK:
        stands = stands & (rows % TILE < BLOCK)
    return head_tile * FOLD + rows // TILE, place, stands


@triton.jit
def _key_rows(j, length, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of the rows of a tile of keys: the place in the record, and whether a key stands there."""
    rows = tl.arange(0, TILE)
    place = j * BLOCK + rows
    stands = place < length
    if TILE != BLOCK:
        stands = stands & (rows < BLOCK)
    return place, stands


@triton.jit
def _seen(place, key_place, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Which keys of a tile a query sees: none later than itself, which leaves none beyond the record's end either."""
    seen = place[:, None] >= key_place[None, :]
    if TILE != BLOCK:
        seen = seen & (tl.arange(0, TILE) < BLOCK)[None, :]
    return seen


@triton.jit
def _load(POINTER, rows, stands, WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Rows of WIDTH numbers that begin at the offsets `rows`, zero where none stands.

    WIDE takes them to float32 at once: the interpreter has no other arithmetic.
    """
    columns = tl.arange(0, TILE_WIDTH)
    mask = stands[:, None]
    if WIDTH != TILE_WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    values = tl.load(POINTER + rows[:, None] + columns[None, :], mask=mask, other=0.0)
    return values.to(tl.float32) if WIDE else values


@triton.jit
def _store(POINTER, rows, stands, values, WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr):
    columns = tl.arange(0, TILE_WIDTH)
    mask = stands[:, None]
    if WIDTH != TILE_WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(POINTER + rows[:, None] + columns[None, :], values.to(POINTER.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b):
    """a b in float32; float32 factors are not shortened to the tensor cores' 10 bits."""
    return tl.dot(a, b, input_precision="ieee")


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_step(q, key, value, seen, top, total, sums, exponent):
    """One tile of keys of the running softmax: its maximum, its denominator and its numerator, in powers of two."""
    scores = tl.where(seen, _dot(q, tl.trans(key)) * exponent, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shares = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    sums = sums * shrink[:, None] + _dot(shares.to(value.dtype), value)
    return higher, total * shrink + tl.sum(shares, 1), sums


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    Q, K, V, SINKS, OUT, LSE, CUTS, COUNTS, records, keys, queries, exponent,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, heads,
    GROUP: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr,
    WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """A query block of `FOLD` heads: out and lse. Grid: blocks of the batch, tiles of heads."""
    slot, head_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    record, start, length = _record(CUTS, records, slot, BLOCK, 1)
    i = (slot - start // BLOCK - record).to(tl.int32)
    row = start // keys
    first_key = (start - row * keys).to(tl.int32)
    first_query = keys - queries - first_key
    if i * BLOCK >= length or tl.minimum(i * BLOCK + BLOCK, length) <= first_query:
        return
    head, place, stands = _query_rows(i, head_tile, first_query, length, BLOCK, TILE, FOLD)
    q_rows = (row * q_row + head * q_head + (place - first_query).to(tl.int64) * q_token) * UNIT
    q = _load(Q, q_rows, stands, WIDTH, TILE_WIDTH, WIDE)  # (FOLD TILE, D)
    kv_head = head_tile * FOLD // GROUP
    k_base = K + (row * k_row + kv_head * k_head) * UNIT
    v_base = V + (row * v_row + kv_head * v_head) * UNIT

    # The sink is the first term of the denominator.
    top = tl.load(SINKS + head).to(tl.float32) * LOG2_E
    total = tl.full([FOLD * TILE], 1.0, tl.float32)
    sums = tl.zeros([FOLD * TILE, TILE_WIDTH], tl.float32)
    first, powers, window = _keys_read(i, WINDOW, FIRST, LOW_POWER)
    tiles = 0
    for t in range(first + powers + window):
        j = _key_block(t, i, first, powers, window, LOW_POWER)
        key_place, key_stands = _key_rows(j, length, BLOCK, TILE)
        tokens = (first_key + key_place).to(tl.int64)
        key = _load(k_base, tokens * k_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)  # (TILE, D)
        value = _load(v_base, tokens * v_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)
        seen = _seen(place, key_place, BLOCK, TILE)
        top, total, sums = _softmax_step(q, key, value, seen, top, total, sums, exponent)
        tiles += 1
    lines = (row * heads + head) * queries + place - first_query
    _store(OUT, lines * WIDTH, stands, sums / total[:, None], WIDTH, TILE_WIDTH)
    tl.store(LSE + lines, (top + tl.log2(total)) * _LN_2, mask=stands)
    if COUNT:
        tl.store(COUNTS + slot * tl.num_programs(1) + head_tile, tiles)


@triton.jit(do_not_specialize=_NUMBERS)
def queries_kernel(
    GRAD, Q, K, V, OUT, LSE, DELTA, DQ, CUTS, COUNTS, records, keys, queries, scale, exponent,
    g_row, g_head, g_token, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, heads,
    GROUP: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr,
    WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """A query block of `FOLD` heads: delta = rowsum(grad out), and q's gradient. Grid as in the forward."""
    slot, head_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    record, start, length = _record(CUTS, records, slot, BLOCK, 1)
    i = (slot - start // BLOCK - record).to(tl.int32)
    row = start // keys
    first_key = (start - row * keys).to(tl.int32)
    first_query = keys - queries - first_key
    if i * BLOCK >= length or tl.minimum(i * BLOCK + BLOCK, length) <= first_query:
        return
    head, place, stands = _query_rows(i, head_tile, first_query, length, BLOCK, TILE, FOLD)
    query = (place - first_query).to(tl.int64)
    lines = (row * heads + head) * queries + query
    q_rows = (row * q_row + head * q_head + query * q_token) * UNIT
    g_rows = (row * g_row + head * g_head + query * g_token) * UNIT
    q = _load(Q, q_rows, stands, WIDTH, TILE_WIDTH, WIDE)  # (FOLD TILE, D)
    grad = _load(GRAD, g_rows, stands, WIDTH, TILE_WIDTH, WIDE)
    out = _load(OUT, lines * WIDTH, stands, WIDTH, TILE_WIDTH, WIDE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + lines, delta, mask=stands)
    lse = tl.load(LSE + lines, mask=stands, other=0.0) * LOG2_E
    kv_head = head_tile * FOLD // GROUP
    k_base = K + (row * k_row + kv_head * k_head) * UNIT
    v_base = V + (row * v_row + kv_head * v_head) * UNIT

    sums = tl.zeros([FOLD * TILE, TILE_WIDTH], tl.float32)
    first, powers, window = _keys_read(i, WINDOW, FIRST, LOW_POWER)
    tiles = 0
    for t in range(first + powers + window):
        j = _key_block(t, i, first, powers, window, LOW_POWER)
        key_place, key_stands = _key_rows(j, length, BLOCK, TILE)
        tokens = (first_key + key_place).to(tl.int64)
        key = _load(k_base, tokens * k_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)  # (TILE, D)
        value = _load(v_base, tokens * v_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)
        seen = _seen(place, key_place, BLOCK, TILE)
        scores = tl.where(seen, _dot(q, tl.trans(key)) * exponent, -float("inf"))
        shares = tl.exp2(scores - lse[:, None])
        slopes = shares * (_dot(grad, tl.trans(value)) - delta[:, None])
        sums += _dot(slopes.to(key.dtype), key)
        tiles += 1
    _store(DQ, lines * WIDTH, stands, sums * scale, WIDTH, TILE_WIDTH)
    if COUNT:
        tl.store(COUNTS + slot * tl.num_programs(1) + head_tile, tiles)


@triton.jit(do_not_specialize=_NUMBERS)
def keys_kernel(
    GRAD, Q, K, V, LSE, DELTA, DK, DV, PARTIAL, CUTS, COUNTS, records, keys, queries, scale, exponent,
    g_row, g_head, g_token, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, heads,
    GROUP: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr, SPLIT: tl.constexpr,
    WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    CHUNKS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A key block of one key head: k's and v's gradients, of all query heads that share it.

    Grid: blocks of the batch, key heads. The first blocks of a record of more than one chunk are left to CHUNKS: then
    the grid is slots, key heads, first blocks, and a program sums one chunk of a column into PARTIAL
    [slots, first, Hkv, 2, block, D].
    """
    slot, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if CHUNKS:
        _, start, length = _record(CUTS, records, slot, BLOCK * SPLIT // 2, 0)
        j = tl.program_id(2) % FIRST  # There are no more; the remainder lets a compiler know how small it is.
        chunk = (slot - start // (BLOCK * SPLIT // 2)).to(tl.int32)
    else:
        record, start, length = _record(CUTS, records, slot, BLOCK, 1)
        j = (slot - start // BLOCK - record).to(tl.int32)
        chunk = 0
    blocks = (length + BLOCK - 1) // BLOCK
    # What is not there, and first blocks that the other launch sums.
    if tl.maximum(j, chunk * SPLIT) >= blocks or ((CHUNKS or j < FIRST) and (blocks > SPLIT) != CHUNKS):
        return
    row = start // keys
    first_key = (start - row * keys).to(tl.int32)
    first_query = keys - queries - first_key
    key_place, key_stands = _key_rows(j, length, BLOCK, TILE)
    tokens = (first_key + key_place).to(tl.int64)
    k_rows = (row * k_row + kv_head * k_head + tokens * k_token) * UNIT
    v_rows = (row * v_row + kv_head * v_head + tokens * v_token) * UNIT
    key = _load(K, k_rows, key_stands, WIDTH, TILE_WIDTH, WIDE)  # (TILE, D)
    value = _load(V, v_rows, key_stands, WIDTH, TILE_WIDTH, WIDE)

    skipped = tl.maximum(first_query, 0) // BLOCK
    low, near, powers, before = _queries_reading(j, chunk, blocks, skipped, WINDOW, FIRST, LOW_POWER, SPLIT)
    k_sums = tl.zeros([TILE, TILE_WIDTH], tl.float32)
    v_sums = tl.zeros([TILE, TILE_WIDTH], tl.float32)
    q_base, grad_base = Q + row * q_row * UNIT, GRAD + row * g_row * UNIT
    lse_base, delta_base = LSE + row * heads * queries, DELTA + row * heads * queries
    tiles = 0
    for t in range((near + powers) * (GROUP // FOLD)):
        i = _query_block(t // (GROUP // FOLD), j, low, near, before, LOW_POWER)
        head_tile = kv_head * (GROUP // FOLD) + t % (GROUP // FOLD)
        head, place, stands = _query_rows(i, head_tile, first_query, length, BLOCK, TILE, FOLD)
        query = (place - first_query).to(tl.int64)
        q = _load(q_base, (head * q_head + query * q_token) * UNIT, stands, WIDTH, TILE_WIDTH, WIDE)  # (FOLD TILE, D)
        grad = _load(grad_base, (head * g_head + query * g_token) * UNIT, stands, WIDTH, TILE_WIDTH, WIDE)
        lines = head * queries + query
        lse = tl.load(lse_base + lines, mask=stands, other=0.0) * LOG2_E
        delta = tl.load(delta_base + lines, mask=stands, other=0.0)
        # Transposed, so that both products that are summed have what was computed on their left. A row without a query
        # has a gradient and a delta of zero, and adds nothing.
        seen = place[None, :] >= key_place[:, None]
        scores = tl.where(seen, _dot(key, tl.trans(q)) * exponent, -float("inf"))  # (TILE, FOLD TILE)
        shares = tl.exp2(scores - lse[None, :])
        v_sums += _dot(shares.to(grad.dtype), grad)
        slopes = shares * (_dot(value, tl.trans(grad)) - delta[None, :])
        k_sums += _dot(slopes.to(q.dtype), q)
        tiles += 1

    if CHUNKS:
        part, places, size = _part(slot, j, kv_head, FIRST, BLOCK, TILE, WIDTH)
        _store(PARTIAL, part, places, k_sums, WIDTH, TILE_WIDTH)
        _store(PARTIAL, part + size, places, v_sums, WIDTH, TILE_WIDTH)
        if COUNT:
            tl.store(COUNTS + (slot * tl.num_programs(1) + kv_head) * FIRST + j, tiles)
    else:
        lines = (row * tl.num_programs(1) + kv_head) * keys + tokens
        _store(DK, lines * WIDTH, key_stands, k_sums * scale, WIDTH, TILE_WIDTH)
        _store(DV, lines * WIDTH, key_stands, v_sums, WIDTH, TILE_WIDTH)
        if COUNT:
            tl.store(COUNTS + slot * tl.num_programs(1) + kv_head, tiles)


@triton.jit
def _part(slot, j, kv_head, FIRST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Of a partial sum of k's gradient: where its rows begin, which there are, and how far behind v's follows."""
    rows = tl.arange(0, TILE)
    begin = ((slot * FIRST + j) * tl.num_programs(1) + kv_head) * 2 * BLOCK * WIDTH
    return begin + rows * WIDTH, rows < BLOCK, BLOCK * WIDTH


@triton.jit(do_not_specialize=_NUMBERS)
def chunks_kernel(
    DK, DV, PARTIAL, CUTS, records, keys, scale,
    BLOCK: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr, SPLIT: tl.constexpr,
    WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A first block of one key head: the chunks of its column, in ascending order. Grid: as that of the chunks."""
    slot, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j = tl.program_id(2) % FIRST
    _, start, length = _record(CUTS, records, slot, BLOCK * SPLIT // 2, 0)
    blocks = (length + BLOCK - 1) // BLOCK
    if slot != start // (BLOCK * SPLIT // 2) or blocks <= SPLIT or j >= blocks:
        return
    k_sums = tl.zeros([TILE, TILE_WIDTH], tl.float32)
    v_sums = tl.zeros([TILE, TILE_WIDTH], tl.float32)
    for chunk in range((blocks + SPLIT - 1) // SPLIT):
        part, places, size = _part(slot + chunk, j, kv_head, FIRST, BLOCK, TILE, WIDTH)
        k_sums += _load(PARTIAL, part, places, WIDTH, TILE_WIDTH, False)
        v_sums += _load(PARTIAL, part + size, places, WIDTH, TILE_WIDTH, False)
    row = start // keys
    place, stands = _key_rows(j, length, BLOCK, TILE)
    lines = (row * tl.num_programs(1) + kv_head) * keys + (start - row * keys) + place
    _store(DK, lines * WIDTH, stands, k_sums * scale, WIDTH, TILE_WIDTH)
    _store(DV, lines * WIDTH, stands, v_sums, WIDTH, TILE_WIDTH)


@triton.jit(do_not_specialize=_NUMBERS)
def decode_kernel(
    Q, K, V, SINKS, OUT, STARTS, keys, exponent,
    q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token,
    GROUP: tl.constexpr, TILE_GROUP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, LOW_POWER: tl.constexpr,
    WIDTH: tl.constexpr, TILE_WIDTH: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The last token of a row, for the query heads of one key head, which are the rows of the tile."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(STARTS + row).to(tl.int32)
    length = keys - start
    i = (length - 1) // BLOCK
    members = tl.arange(0, TILE_GROUP)
    head = kv_head * GROUP + members
    stands = members < GROUP
    q = _load(Q, (row * q_row + head * q_head) * UNIT, stands, WIDTH, TILE_WIDTH, WIDE)  # (TILE_GROUP, D)
    k_base = K + (row * k_row + kv_head * k_head) * UNIT
    v_base = V + (row * v_row + kv_head * v_head) * UNIT
    top = tl.load(SINKS + head, mask=stands, other=0.0).to(tl.float32) * LOG2_E
    total = tl.full([TILE_GROUP], 1.0, tl.float32)
    sums = tl.zeros([TILE_GROUP, TILE_WIDTH], tl.float32)
    first, powers, window = _keys_read(i, WINDOW, FIRST, LOW_POWER)
    for t in range(first + powers + window):
        j = _key_block(t, i, first, powers, window, LOW_POWER)
        key_place, key_stands = _key_rows(j, length, BLOCK, TILE)
        tokens = (start + key_place).to(tl.int64)
        key = _load(k_base, tokens * k_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)  # (TILE, D)
        value = _load(v_base, tokens * v_token * UNIT, key_stands, WIDTH, TILE_WIDTH, WIDE)
        top, total, sums = _softmax_step(q, key, value, key_stands[None, :], top, total, sums, exponent)
    lines = (row * GROUP * tl.num_programs(1) + head) * WIDTH
    _store(OUT, lines, stands, sums / total[:, None], WIDTH, TILE_WIDTH)
