"""Rows sorted by expert, and products of each expert's rows with that expert's matrix.

A *row* is one (token, choice) pair. Sorted by expert, the rows of one expert are neighbours, and the layer's product is
one small product an expert (a *grouped* product). Matrices come decoded a few experts at a time, so that what is
decoded stays small and, on a CPU, in its cache.

Each expert's rows can be padded with zeros to a multiple. A CPU's product sums in another order when it has few rows;
with padding one unit's rows give the same bits alone and in a batch (`docs/model.md`).

Counting the rows of each expert brings one list to the host, which stalls a GPU; the fused Triton kernel, with a tile
map made on the device, is the heavier alternative.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional

from foedus_kernels.weights import ExpertWeights

# Decoded weights alive at once, at least one expert. On a CPU a chunk that stays in its cache: all 16 experts of the
# tiny shape take 2 MiB, one gate_up of 1472 x 736 4 MiB. On a GPU fewer, larger launches.
DECODE_BYTES = 8 << 20
DECODE_BYTES_CUDA = 256 << 20

_ALIGNMENT = 16  # torch's grouped product takes strides in multiples of this many bytes.


class Routing(NamedTuple):
    """Where rows stand in a buffer sorted by expert. M = T * experts_per_token rows, S >= M places with padding."""

    tokens: torch.Tensor  # (M,) the token of each sorted row
    slots: torch.Tensor | None  # (M,) the place of each sorted row; None where nothing is padded
    places: torch.Tensor  # (M,) the place of each (token, choice)
    rows_of: list[int]  # places of each expert, (E,)

    @classmethod
    def of(cls, expert_ids: torch.Tensor, num_experts: int, *, multiple: int = 1) -> Routing:
        """Sort. Rows of one expert keep the order of the tokens.

        Args:
            expert_ids: int64 [T, experts_per_token].
            num_experts: E.
            multiple: Each expert's places are a multiple of this.
        """
        flat = expert_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)  # (M,)
        counts = torch.bincount(flat, minlength=num_experts)  # (E,)
        slots = ranks = torch.arange(order.numel(), device=order.device)
        padded = counts
        if multiple > 1:
            padded = (counts + multiple - 1).div(multiple, rounding_mode="floor") * multiple
            shift = (padded - counts).cumsum(0) - (padded - counts)  # (E,) zeros before an expert's rows
            slots = ranks + shift.index_select(0, flat.index_select(0, order))
        places = torch.empty_like(order).scatter_(0, order, slots)
        tokens = order.div(expert_ids.shape[1], rounding_mode="floor")
        return cls(tokens, slots if multiple > 1 else None, places, padded.tolist())

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Each row's token: (T, D) -> (S, D), zero where a place is padding."""
        return self.spread(values.index_select(0, self.tokens))

    def spread(self, sorted_values: torch.Tensor) -> torch.Tensor:
        """Sorted rows to their places: (M, D) -> (S, D)."""
        if self.slots is None:
            return sorted_values
        buffer = sorted_values.new_zeros(sum(self.rows_of), *sorted_values.shape[1:])
        return buffer.index_copy_(0, self.slots, sorted_values)

    def scattered(self, values: torch.Tensor) -> torch.Tensor:
        """Values by (token, choice) to their places: (T, top-k) -> (S,)."""
        flat = values.reshape(-1)
        return values.new_zeros(sum(self.rows_of)).index_copy_(0, self.places, flat)

    def by_token(self, buffer: torch.Tensor) -> torch.Tensor:
        """Rows in the order of tokens and choices: (S, D) -> (M, D)."""
        return buffer.index_select(0, self.places)


def product(rows: torch.Tensor, stack: ExpertWeights, rows_of: list[int], *, adjoint: bool = False) -> torch.Tensor:
    """Each expert's rows times its matrix: ``x W^T``, or ``y W`` for the adjoint.

    transformers keeps its matrices the other way round, and a CPU's product of few rows sums by how a matrix lies: bits
    differ from its own in the last places. Turning each matrix first gave its bits and took twice the time.
    """
    _, outs, ins = stack.shape
    dtype = product_dtype(rows)
    chunks = list(_chunks(rows_of, outs * ins * dtype.itemsize, rows.device.type))
    result = None if len(chunks) == 1 else rows.new_empty(rows.shape[0], ins if adjoint else outs)
    start = 0
    for experts in chunks:
        counts = [rows_of[expert] for expert in experts]
        weights = stack.decode(experts, dtype)  # (hit, outs, ins)
        stop = start + sum(counts)
        piece = multiply(rows[start:stop].to(dtype), weights if adjoint else weights.mT, counts)
        if result is None:
            return piece.to(rows.dtype)
        result[start:stop] = piece
        start = stop
        del weights, piece  # The next chunk is decoded into the memory of this one.
    return result if result is not None else rows.new_empty(0, ins if adjoint else outs)


def matmul(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """One product for all rows: (S, K) and (K, N) -> (S, N) in the rows' type."""
    dtype = product_dtype(rows)
    return (rows.to(dtype) @ matrix.to(dtype)).to(rows.dtype)


def multiply(rows: torch.Tensor, matrices: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Grouped product of dense matrices: rows (M, K), matrices (P, K, N), rows of each group -> (M, N)."""
    if (dtype := product_dtype(rows)) != rows.dtype:
        return multiply(rows.to(dtype), matrices.to(dtype), counts).to(rows.dtype)
    if _groupable(rows, matrices):
        offsets = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
        return functional.grouped_mm(rows, matrices, offs=offsets)
    result = rows.new_empty(rows.shape[0], matrices.shape[2])
    for group, start, stop in _spans(counts):
        torch.mm(rows[start:stop], matrices[group], out=result[start:stop])
    return result


def add_product_(
    target: torch.Tensor, rows: torch.Tensor, matrices: torch.Tensor, counts: list[int], scale: float
) -> None:
    """``target += scale * rows M``, each group's rows with its matrix; one matrix alone serves all rows."""
    if (dtype := product_dtype(rows)) != rows.dtype:
        rows, matrices = rows.to(dtype), matrices.to(dtype)
        for group, start, stop in _spans(counts if matrices.shape[0] > 1 else [rows.shape[0]]):
            target[start:stop].add_(rows[start:stop] @ matrices[group], alpha=scale)
    elif matrices.shape[0] == 1:
        target.addmm_(rows, matrices[0], alpha=scale)
    elif target.device.type != "cpu" and _groupable(rows, matrices):
        target.add_(multiply(rows, matrices, counts), alpha=scale)
    else:  # No product of the whole width is made beside the target.
        for group, start, stop in _spans(counts):
            target[start:stop].addmm_(rows[start:stop], matrices[group], alpha=scale)


def add_products_with_(
    target: torch.Tensor, rows: torch.Tensor, vectors: torch.Tensor, rows_of: list[int]
) -> torch.Tensor:
    """``target += <row, its group's vector>``: (S,), rows (S, K), vectors (E, K)."""
    if target.device.type != "cpu":
        experts = torch.arange(len(rows_of), device=target.device)
        counts = torch.tensor(rows_of, device=target.device)
        own = experts.repeat_interleave(counts, output_size=target.shape[0])  # (S,)
        return target.add_((rows * vectors.index_select(0, own)).sum(1))
    for group, start, stop in _spans(rows_of):
        target[start:stop].add_((rows[start:stop] * vectors[group]).sum(1))
    return target


def add_bias_(target: torch.Tensor, bias: torch.Tensor, rows_of: list[int]) -> None:
    """Each group's bias to its rows: (S, N) and (E, N)."""
    if target.device.type != "cpu":
        experts = torch.arange(len(rows_of), device=target.device)
        counts = torch.tensor(rows_of, device=target.device)
        target.add_(bias.index_select(0, experts.repeat_interleave(counts, output_size=target.shape[0])))
        return
    for group, start, stop in _spans(rows_of):
        target[start:stop].add_(bias[group])


def product_dtype(rows: torch.Tensor) -> torch.dtype:
    """The type in which products of these rows run; what they yield is rounded to the rows' own.

    A CPU without instructions for bfloat16 multiplies in float32 some 15 times as fast (2,048 x 480, AVX2, 2026-11-25).
    MXFP4 decodes exactly to either, and a product in bfloat16 sums in float32 as well.
    """
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not _multiplies_bfloat16():
        return torch.float32
    return rows.dtype


@cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN, torch's library for products on a CPU, calls this one's bfloat16 products supported."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _groupable(rows: torch.Tensor, matrices: torch.Tensor) -> bool:
    """Whether torch's grouped product takes the operands: no float64, strides in multiples of 16 bytes."""
    size = rows.element_size()
    aligned = all(width * size % _ALIGNMENT == 0 for width in matrices.shape[1:])
    return aligned and rows.dtype in (torch.float32, torch.bfloat16) and rows.shape[0] > 0


def _chunks(rows_of: list[int], expert_bytes: int, device: str) -> Iterator[list[int]]:
    """The experts that have rows, as many at a time as may be decoded at once."""
    hit = [expert for expert, count in enumerate(rows_of) if count]
    size = max(1, (DECODE_BYTES if device == "cpu" else DECODE_BYTES_CUDA) // expert_bytes)
    for start in range(0, len(hit), size):
        yield hit[start : start + size]


def _spans(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(group, first row, last row + 1) of each group that has rows."""
    start = 0
    for group, count in enumerate(counts):
        if count:
            yield group, start, start + count
        start += count
