"""Low-rank additions to the matrices of routed experts, in split form: ``x W_e^T + scale * (x A_e^T) B_e^T``.

Expert e's matrix is ``W_e + scale * B_e A_e``, added before the bias and the activation (PEFT's `target_parameters` and
every server of such adapters mean this). The sum is never built: PEFT's way makes it for all experts at each step, 648
MB against 149 in a small case.

With u the product ``x A^T`` and g the gradient at the projection's output::

    dx += scale * (g B) A        dA = scale * (g B)^T x        dB = scale * g^T u

The rows of one expert, or of one expert and one privacy unit, are neighbours in the sorted buffer, so both matrix
gradients are products of segments (`clip.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from foedus_kernels.clip import segment_offsets, unit_gradients_torch
from foedus_kernels.grouped import Routing, add_product_, matmul, multiply


@dataclass(frozen=True, eq=False)
class ExpertLora:
    """The low-rank pairs of a layer's experts. P = E: a pair for each expert. P = 1: one pair that all share.

    Matrices may carry one more, leading axis of U privacy units: the tokens of a call are then those of U units of one
    length, unit after unit, the U matrices are one (``matrix.expand(U, ...)``, which takes no memory; the first is
    read), and their gradient is each unit's own.

    Attributes:
        gate_up_a: [P, R, K], or None where the projection has no pair.
        gate_up_b: [P, 2N, R]; gate in even and up in odd rows, as in the matrix.
        down_a: [P, R, N], or None.
        down_b: [P, K, R].
        scale: alpha / R.

    Raises:
        ValueError: One matrix of a pair is missing, both pairs are, or the two do not fit.
    """

    gate_up_a: torch.Tensor | None
    gate_up_b: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None
    scale: float

    def __post_init__(self) -> None:
        """Check that each pair is whole and its two matrices fit."""
        for name, a, b in (("gate_up", self.gate_up_a, self.gate_up_b), ("down", self.down_a, self.down_b)):
            if (a is None) != (b is None):
                raise ValueError(f"expected both matrices of the {name} pair or neither, got one")
            if a is not None and b is not None and not _paired(a, b):
                raise ValueError(
                    f"expected a {name} pair A [P, R, in] and B [P, out, R], both with a leading axis of units or "
                    f"without, got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        if self.gate_up_a is None and self.down_a is None:
            raise ValueError("expected a pair for at least one projection, got none; pass no ExpertLora instead")

    def matrices(self) -> tuple[torch.Tensor | None, ...]:
        """The four matrices in the order of the attributes."""
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    @property
    def units(self) -> int | None:
        """U where the matrices carry an axis of units, else None."""
        found = {matrix.shape[0] if matrix.dim() == 4 else None for matrix in self.matrices() if matrix is not None}
        if len(found) > 1:
            raise ValueError(f"expected one number of units in all matrices, got {sorted(found, key=str)}")
        return found.pop()


class Pair(NamedTuple):
    """One projection's pair, in the type of the activations."""

    a: torch.Tensor  # (P, R, in)
    b: torch.Tensor  # (P, out, R)
    scale: float

    @classmethod
    def of(cls, a: torch.Tensor | None, b: torch.Tensor | None, scale: float, dtype: torch.dtype) -> Pair | None:
        """The pair that a call computes with: the first unit's where there is an axis of units."""
        if a is None or b is None:
            return None
        if a.dim() == 4:
            a, b = a[0], b[0]
        return cls(a.to(dtype), b.to(dtype), scale)

    def inner(self, rows: torch.Tensor, rows_of: list[int]) -> torch.Tensor:
        """``x A^T``: (S, in) -> (S, R)."""
        return matmul(rows, self.a[0].T) if self.a.shape[0] == 1 else multiply(rows, self.a.mT, rows_of)

    def add_(self, target: torch.Tensor, rows: torch.Tensor, rows_of: list[int]) -> None:
        """``target += scale * (x A^T) B^T``: (S, out)."""
        add_product_(target, self.inner(rows, rows_of), self.b.mT, rows_of, self.scale)

    def outer(self, grad: torch.Tensor, rows_of: list[int]) -> torch.Tensor:
        """``g B``: (S, out) -> (S, R), not scaled."""
        return matmul(grad, self.b[0]) if self.b.shape[0] == 1 else multiply(grad, self.b, rows_of)

    def add_adjoint_(self, target: torch.Tensor, outer: torch.Tensor, rows_of: list[int]) -> None:
        """``target += scale * (g B) A``: (S, in)."""
        add_product_(target, outer, self.a, rows_of, self.scale)


class Segments(NamedTuple):
    """Which rows make one matrix gradient."""

    order: torch.Tensor | None  # the buffer's places in the order of segments; None: the buffer as it is
    offsets: torch.Tensor  # (segments + 1,)
    shape: tuple[int, ...]  # (P,) or (P, U)
    rows_of: list[int]  # places of each expert

    @classmethod
    def of(cls, routing: Routing, expert_ids: torch.Tensor, matrix: torch.Tensor | None, num_experts: int) -> Segments:
        """Segments of each expert, of each (expert, unit), of each unit, or all rows as one: by a matrix's shape."""
        if matrix is None:
            raise ValueError("expected a low-rank pair, got none")
        pairs, units = matrix.shape[-3], matrix.shape[0] if matrix.dim() == 4 else None
        shape = (pairs,) if units is None else (pairs, units)
        if pairs == num_experts and pairs > 1:
            return cls(routing.slots, segment_offsets(expert_ids, units or 1, num_experts), shape, routing.rows_of)
        # Rows in the order of tokens: a unit's rows are neighbours, whichever experts they went to.
        edges = torch.arange((units or 1) + 1, device=expert_ids.device)
        return cls(routing.places, edges * (expert_ids.numel() // (units or 1)), shape, routing.rows_of)

    def gradients(
        self, pair: Pair, grad: torch.Tensor, outer: torch.Tensor, inputs: torch.Tensor, needs: Sequence[bool]
    ) -> list[torch.Tensor]:
        """The gradients of A and B from rows g (S, out), g B (S, R) and x (S, in); empty where not needed."""
        empty = grad.new_empty(0)
        return [
            self._gradient(outer, inputs, pair.scale) if needs[0] else empty,
            self._gradient(grad, pair.inner(inputs, self.rows_of), pair.scale) if needs[1] else empty,
        ]

    def _gradient(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
        """``scale * left^T right`` of each segment: [P, n, m], or [U, P, n, m] where there are units."""
        if self.order is not None:
            left, right = left.index_select(0, self.order), right.index_select(0, self.order)
        found = unit_gradients_torch(left, right, self.offsets).mul_(scale)
        found = found.view(*self.shape, *found.shape[1:])
        return found if len(self.shape) == 1 else found.transpose(0, 1).contiguous()


def _paired(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and a.dim() in (3, 4) and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]
