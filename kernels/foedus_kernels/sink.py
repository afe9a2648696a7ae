"""Full and sliding-window attention with sinks, by the library's fused kernels: exact, and linear in memory.

A sink is a learned logit in a head's softmax denominator that has no value. With the log-sum-exp (LSE) of stock
attention it is a rescale::

    lse' = logaddexp(lse, sink)     out' = out * exp(lse - lse')     dsink = -sum exp(sink - lse') (dout' . out')

and the stock backward, given (out', lse'), yields the gradients of q, k and v (`stock` says why). A sliding window is
computed in chunks of queries with the few keys each chunk sees, all chunks in one call; a cache's earlier keys and the
new tokens' own are two pieces, merged by their LSEs. So no tensor is queries x keys, masks included.

The heavier alternative is FlexAttention, which has no CPU backward and evaluates n^2 mask entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from foedus_kernels.records import records_of
from foedus_kernels.stock import (
    Gradients,
    attend,
    attend_backward,
    band,
    check_shapes,
    lse_dtype,
    sinks_gradient,
)

# Queries of a chunk are no fewer than this, however short the window: 64 x 64 tiles keep the kernel busy.
_CHUNK = 64


def sink_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention with sinks, over everything earlier or over a window.

    Args:
        q: [B, H, Tq, D] in float32, float64 or bfloat16; the last Tq of each row's keys' positions.
        k: [B, Hkv, T, D], H a multiple of Hkv.
        v: [B, Hkv, T, D].
        sinks: [H], a logit in each head's denominator.
        scale: Of the products q k.
        window: Keys that a query sees, itself included; None for all earlier ones.
        offsets: Integers [records + 1] from 0 to B * T, where records begin in the flattened rows (`records`); None
            where every row is one record. Nothing is read across a boundary.

    Returns:
        [B, H, Tq, D]. Differentiable once in q, k, v and sinks; memory O(B T), and O(window^2) for the window's mask.

    Raises:
        ValueError: Shapes, offsets or a window that do not fit.
    """
    check_shapes(q, k, v, sinks)
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 key, got {window}; leave it out for full attention")
    out, _ = sink_forward(q, k, v, sinks, offsets, scale, window)
    return out


class _Piece(NamedTuple):
    """A range of queries and a range of keys of the same rows, and what hides some of these keys.

    Attributes:
        rows: Of the batch.
        queries: Of each row, counted among the queries.
        keys: Of each row.
        window: Keys that a query sees; None where all of them or all earlier ones.
        causal: Whether the queries are the last of the keys and see no later one; False where they see every key.
        chunked: Whether the queries are whole chunks, each of which sees its own keys and window - 1 before them.
    """

    rows: slice
    queries: slice
    keys: slice
    window: int | None = None
    causal: bool = False
    chunked: int = 0


def _pieces(rows: slice, first: int, stop: int, query: int, shift: int, window: int | None) -> Iterator[_Piece]:
    """What the queries at keys [query, stop) of a record that begins at key `first` read.

    A query at key x is the row's query number x - shift.
    """
    queries = slice(query - shift, stop - shift)
    if window is None or window >= stop - first:
        if stop - query == 1:
            yield _Piece(rows, queries, slice(first, stop))
            return
        if query > first:
            yield _Piece(rows, queries, slice(first, query))
        yield _Piece(rows, queries, slice(query, stop), causal=True)
        return
    # Keys of a chunk, its own and the window - 1 before it, are a multiple of 16 for the sake of CUDA's masks.
    chunk = max(_CHUNK, window)
    chunk += -(chunk + window - 1) % 16
    head = min(stop, query + chunk)
    yield _Piece(
        rows, slice(query - shift, head - shift), slice(max(first, query - window + 1), head), window, causal=True
    )
    whole = head + (stop - head) // chunk * chunk
    if whole > head:
        yield _Piece(rows, slice(head - shift, whole - shift), slice(head - window + 1, whole), window, chunked=chunk)
    if stop > whole:
        yield _Piece(rows, slice(whole - shift, stop - shift), slice(whole - window + 1, stop), window, causal=True)


def _plan(q: torch.Tensor, k: torch.Tensor, offsets: torch.Tensor | None, window: int | None) -> list[_Piece]:
    rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    shift = keys - queries
    if offsets is None:
        return list(_pieces(slice(0, rows), 0, keys, shift, shift, window))
    found: list[_Piece] = []
    for record in records_of(offsets, rows=rows, keys=keys, queries=queries):
        if record.first_query < record.stop:
            row = slice(record.row, record.row + 1)
            found += _pieces(row, record.start, record.stop, record.first_query, shift, window)
    return found


def _taken(piece: _Piece, x: torch.Tensor) -> torch.Tensor:
    """A piece's queries, or what belongs to them: [B, H, Tq, D] -> [rows, H, t, D], chunks as rows."""
    x = x[piece.rows, :, piece.queries]
    if not piece.chunked:
        return x
    return x.unflatten(2, (-1, piece.chunked)).transpose(1, 2).flatten(0, 1)


def _put_back(piece: _Piece, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `_taken`: [rows, H, t, D] -> the piece's [B, H, t, D]."""
    if not piece.chunked:
        return x
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def _read(piece: _Piece, x: torch.Tensor) -> torch.Tensor:
    """A piece's keys or values: [B, Hkv, T, D] -> [rows, Hkv, t, D], each chunk's with the window before them."""
    x = x[piece.rows, :, piece.keys]
    if not piece.chunked or piece.window is None:
        return x
    chunks = x.unfold(2, piece.chunked + piece.window - 1, piece.chunked)  # (B, Hkv, chunks, D, t)
    return chunks.permute(0, 2, 1, 4, 3).flatten(0, 1)


def _add_read(piece: _Piece, total: torch.Tensor, grad: torch.Tensor) -> None:
    """Add the gradient of what `_read` took: a key of two chunks gets both."""
    place = total[piece.rows, :, piece.keys]
    if not piece.chunked or piece.window is None:
        place += grad
        return
    before = piece.window - 1
    chunks = grad.unflatten(0, (place.shape[0], -1)).transpose(1, 2)  # (B, Hkv, chunks, t, D)
    own = place[:, :, before:].unflatten(2, (-1, piece.chunked))  # (B, Hkv, chunks, chunk, D)
    own += chunks[..., before:, :]
    place[:, :, :before] += chunks[:, :, 0, :before]
    if before:
        own[:, :, :-1, -before:] += chunks[:, :, 1:, :before]


def _hidden(piece: _Piece, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    """The mask arguments of `attend` for what was taken and read."""
    if piece.window is None or q.shape[2] == 1:
        return {"mask": None, "causal": piece.causal and q.shape[2] > 1}
    return {"mask": band(q.shape[2], k.shape[2], piece.window, q)}


@torch.library.custom_op("foedus::sink_forward", mutates_args=())
def sink_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    offsets: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sink_attention_torch` with the log-sum-exp of every query [B, H, Tq], the sink in it."""
    kept = lse_dtype(q.dtype)
    out = q.new_zeros(q.shape, dtype=kept)
    lse = sinks.to(kept).view(1, -1, 1).expand(q.shape[:3]).clone()  # The sink is the first piece; it has no value.
    for piece in _plan(q, k, offsets, window):
        query, key, value = _taken(piece, q), _read(piece, k), _read(piece, v)
        part, part_lse = attend(query, key, value, scale=scale, **_hidden(piece, query, key))
        rows = piece.rows.stop - piece.rows.start
        part = _put_back(piece, part, rows)
        part_lse = _put_back(piece, part_lse.unsqueeze(-1), rows)
        sums, before = out[piece.rows, :, piece.queries], lse[piece.rows, :, piece.queries].unsqueeze(-1)
        whole = torch.logaddexp(before, part_lse)
        sums.mul_((before - whole).exp()).add_(part * (part_lse - whole).exp())
        before.copy_(whole)
    return out.to(q.dtype), lse


@torch.library.custom_op("foedus::sink_backward", mutates_args=())
def sink_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    offsets: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and sinks from the output and log-sum-exp of `sink_forward`."""
    dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for piece in _plan(q, k, offsets, window):
        query, key, value = _taken(piece, q), _read(piece, k), _read(piece, v)
        upstream, whole = _taken(piece, grad), _taken(piece, out)
        whole_lse = _taken(piece, lse.unsqueeze(-1)).squeeze(-1)
        parts: Gradients = attend_backward(
            upstream, query, key, value, whole, whole_lse, scale=scale, **_hidden(piece, query, key)
        )
        dq[piece.rows, :, piece.queries] += _put_back(piece, parts[0], piece.rows.stop - piece.rows.start)
        _add_read(piece, dk, parts[1])
        _add_read(piece, dv, parts[2])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), sinks_gradient(sinks, grad, out, lse)


@sink_forward.register_fake
def _(q, k, v, sinks, offsets, scale, window):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=lse_dtype(q.dtype)
    )


@sink_backward.register_fake
def _(grad, q, k, v, sinks, out, lse, offsets, scale, window):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, sinks))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, offsets, *ctx.constants = inputs
    ctx.mark_non_differentiable(output[1])  # Its gradient would be lost: the fused backward takes none.
    ctx.save_for_backward(q, k, v, sinks, *output, offsets)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, lse, offsets = ctx.saved_tensors
    return *sink_backward(grad, q, k, v, sinks, out, lse, offsets, *ctx.constants), None, None, None


sink_forward.register_autograd(_differentiate, setup_context=_keep)
