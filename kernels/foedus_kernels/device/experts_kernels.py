"""The device code of K1 and K2: what one program does to a tile of an expert's rows. `experts.py` launches it.

A program multiplies a tile of one expert's rows with a tile of that expert's matrix, which it decodes on the way
(`mxfp4.decode_tile`): 17 bytes of memory for 32 values. The same bytes serve both directions, since a tile [outs, ins]
is the right-hand operand of ``y W`` as it lies, and turned over that of ``x W^T``::

    forward_kernel   gather, x W^T, + scale (x A^T) B^T, + bias; for gate_up also the clamped SwiGLU of the tile
    adjoint_kernel   gather, g W, + scale (g B) A
    narrow_kernel    x A^T or g B: (S, R), R padded to 16
    combine_kernel   a token's rows, in the order of its choices, times their weights
    slopes_kernel    a row of g W_down through the SwiGLU's slopes, and the gradient of its weight

A row is summed over one width in blocks of one size, in order, in float32. Widths are constants of the compiled code;
offsets that can pass 2^31 are counted in 64 bits (`tests/kernels/device/test_compiles.py` looks at each).
"""

from __future__ import annotations

import triton
import triton.language as tl

from foedus_kernels.device.mxfp4 import decode_tile


@triton.jit
def _tile_rows(tile, expert, order_ptr, first_ptr, offsets_ptr, CHOICES: tl.constexpr, ROWS: tl.constexpr):
    """A tile's rows in the sorted buffer, which of them there are, and their (token, choice)s: int64 (ROWS,)."""
    row = tl.load(first_ptr + tile) + tl.arange(0, ROWS)
    there = row < tl.load(offsets_ptr + expert + 1)
    return row, there, tl.load(order_ptr + row, mask=there, other=0)


@triton.jit
def forward_kernel(
    rows_ptr,
    blocks_ptr,
    scales_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    offsets_ptr,
    out_ptr,
    inner_ptr,
    scale,
    alpha,
    limit,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of ``x W^T``. CHOICES > 0: rows are tokens, gathered. ACTIVATED: columns are gate and up in turn."""
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= E:
        return
    row, there, chosen = _tile_rows(tile, expert, order_ptr, first_ptr, offsets_ptr, CHOICES, ROWS)
    source = row
    if CHOICES > 0:
        source = chosen // CHOICES
    dtype = rows_ptr.dtype.element_ty
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    k = tl.arange(0, INNER)
    matrix = expert * N + column
    rows_at = rows_ptr + source[:, None] * K + k[None, :]  # (ROWS, INNER)
    codes_at = blocks_ptr + matrix[:, None] * (K // 2) + tl.arange(0, INNER // 2)[None, :]
    scales_at = scales_ptr + matrix[:, None] * (K // 32) + tl.arange(0, INNER // 32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, K, INNER):
        rows = tl.load(rows_at, mask=there[:, None], other=0.0)
        codes = tl.load(codes_at, mask=inside[:, None], other=0)
        scales = tl.load(scales_at, mask=inside[:, None], other=0)
        weights = decode_tile(codes, scales, COLUMNS, INNER, dtype)
        total = tl.dot(rows, tl.trans(weights), total, input_precision="ieee")
        rows_at += INNER
        codes_at += INNER // 2
        scales_at += INNER // 32
    if RANK > 0:
        r = tl.arange(0, PADDED)
        low = tl.load(low_ptr + row[:, None] * PADDED + r[None, :], mask=there[:, None], other=0.0)
        pair = matrix - expert * N if SHARED else matrix
        b_at = b_ptr + pair[:, None] * RANK + r[None, :]  # (COLUMNS, PADDED)
        b = tl.load(b_at, mask=inside[:, None] & (r < RANK)[None, :], other=0.0)
        total += scale * tl.dot(low, tl.trans(b), input_precision="ieee")
    bias = tl.load(bias_ptr + matrix, mask=inside, other=0.0).to(tl.float32)
    result = (total + bias[None, :]).to(dtype)
    tl.store(out_ptr + row[:, None] * N + column[None, :], result, mask=there[:, None] & inside[None, :])
    if ACTIVATED:
        # From the rounded values, which are what the backward has.
        gate, up = tl.split(tl.reshape(result.to(tl.float32), (ROWS, COLUMNS // 2, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        inner = (up + 1.0) * gate * _sigmoid(alpha * gate)
        half = tl.program_id(0) % across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        at = inner_ptr + row[:, None] * (N // 2) + half[None, :]
        tl.store(at, inner.to(dtype), mask=there[:, None] & (half < N // 2)[None, :])


@triton.jit
def adjoint_kernel(
    rows_ptr,
    blocks_ptr,
    scales_ptr,
    outer_ptr,
    a_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    offsets_ptr,
    out_ptr,
    scale,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of ``g W``. CHOICES > 0: rows are tokens, gathered."""
    across: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across
    part = tl.program_id(0) % across
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= E:
        return
    row, there, chosen = _tile_rows(tile, expert, order_ptr, first_ptr, offsets_ptr, CHOICES, ROWS)
    source = row
    if CHOICES > 0:
        source = chosen // CHOICES
    dtype = rows_ptr.dtype.element_ty
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < K
    code = part * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    group = part * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    n = tl.arange(0, INNER)
    matrix = expert * N + n
    rows_at = rows_ptr + source[:, None] * N + n[None, :]  # (ROWS, INNER)
    codes_at = blocks_ptr + matrix[:, None] * (K // 2) + code[None, :]
    scales_at = scales_ptr + matrix[:, None] * (K // 32) + group[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, N, INNER):
        rows = tl.load(rows_at, mask=there[:, None], other=0.0)
        codes = tl.load(codes_at, mask=(code < K // 2)[None, :], other=0)
        scales = tl.load(scales_at, mask=(group < K // 32)[None, :], other=0)
        total = tl.dot(rows, decode_tile(codes, scales, INNER, COLUMNS, dtype), total, input_precision="ieee")
        rows_at += INNER
        codes_at += INNER * (K // 2)
        scales_at += INNER * (K // 32)
    if RANK > 0:
        r = tl.arange(0, PADDED)
        outer = tl.load(outer_ptr + row[:, None] * PADDED + r[None, :], mask=there[:, None], other=0.0)
        pair = r.to(tl.int64) if SHARED else expert * RANK + r
        a_at = a_ptr + pair[:, None] * K + column[None, :]  # (PADDED, COLUMNS)
        a = tl.load(a_at, mask=(r < RANK)[:, None] & inside[None, :], other=0.0)
        total += scale * tl.dot(outer, a, input_precision="ieee")
    at = out_ptr + row[:, None] * K + column[None, :]
    tl.store(at, total.to(dtype), mask=there[:, None] & inside[None, :])


@triton.jit
def slopes_kernel(
    adjoint_ptr,
    gate_up_ptr,
    grad_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    order_ptr,
    out_ptr,
    inner_ptr,
    by_weight_ptr,
    alpha,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    KEPT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row of ``g W_down`` through the SwiGLU: the gradients of its gate and up, and of its weight.

    The weight's is ``<g W_down, inner> + <g, b>``. KEPT: what gate and up gave is written too.
    """
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + chosen)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        both = 2 * start + tl.arange(0, 2 * COLUMNS)
        adjoint = tl.load(adjoint_ptr + row * N + column, mask=column < N, other=0.0).to(tl.float32)
        gate_up = tl.load(gate_up_ptr + row * (2 * N) + both, mask=both < 2 * N, other=0.0).to(tl.float32)
        raw_gate, raw_up = tl.split(tl.reshape(gate_up, (COLUMNS, 2)))
        gate = tl.minimum(raw_gate, limit)
        up = tl.minimum(tl.maximum(raw_up, -limit), limit) + 1.0
        sigmoid = _sigmoid(alpha * gate)
        glu = gate * sigmoid
        total += adjoint * (glu * up)
        if KEPT:
            tl.store(inner_ptr + row * N + column, (glu * up).to(inner_ptr.dtype.element_ty), mask=column < N)
        adjoint *= weight
        # A clamp passes the gradient at its limit, as torch's does.
        slope = sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
        by_gate = tl.where(raw_gate > limit, 0.0, adjoint * up * slope)
        by_up = tl.where(tl.abs(raw_up) > limit, 0.0, adjoint * glu)
        result = tl.reshape(tl.join(by_gate, by_up), (2 * COLUMNS,))
        tl.store(out_ptr + row * (2 * N) + both, result.to(out_ptr.dtype.element_ty), mask=both < 2 * N)
    grad_at = grad_ptr + chosen // CHOICES * K
    bias_at = bias_ptr + tl.load(ids_ptr + chosen) * K
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        grad = tl.load(grad_at + column, mask=column < K, other=0.0).to(tl.float32)
        total += grad * tl.load(bias_at + column, mask=column < K, other=0.0).to(tl.float32)
    tl.store(by_weight_ptr + chosen, tl.sum(total, 0))


@triton.jit
def _sigmoid(x):
    """Of float32, without an overflow on the way that would matter: exp(-x) may be infinite, its reciprocal is 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def narrow_kernel(
    rows_ptr,
    matrix_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    offsets_ptr,
    out_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``x M`` with a narrow M of each expert, or one of all; ALONG and ACROSS are its strides by K and by R."""
    tile = tl.program_id(0)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= E:
        return
    row, there, chosen = _tile_rows(tile, expert, order_ptr, first_ptr, offsets_ptr, CHOICES, ROWS)
    source = row
    if CHOICES > 0:
        source = chosen // CHOICES
    k = tl.arange(0, INNER)
    r = tl.arange(0, PADDED)
    rows_at = rows_ptr + source[:, None] * K + k[None, :]
    matrix_at = matrix_ptr + k[:, None] * ALONG + r[None, :] * ACROSS
    if not SHARED:
        matrix_at += expert * (K * RANK)
    total = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    for _ in range(0, K, INNER):
        rows = tl.load(rows_at, mask=there[:, None], other=0.0)
        matrix = tl.load(matrix_at, mask=(r < RANK)[None, :], other=0.0)
        total = tl.dot(rows, matrix, total, input_precision="ieee")
        rows_at += INNER
        matrix_at += INNER * ALONG
    at = out_ptr + row[:, None] * PADDED + r[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def combine_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of a token: its rows, times their weights, in the order of its choices."""
    across: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for choice in range(CHOICES):
        place = tl.load(places_ptr + token * CHOICES + choice)
        values = tl.load(rows_ptr + place * K + column, mask=column < K, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights_ptr + token * CHOICES + choice)
        total += values
    tl.store(out_ptr + token * K + column, total.to(out_ptr.dtype.element_ty), mask=column < K)
