"""K3: what clipping asks of a weight's gradient when several privacy units share a product (the torch reference).

The gradient of a matrix that rows were multiplied by is ``left^T right``: gradients of the outputs times inputs, summed
over rows. Rows sorted by (expert, unit) make one unit's share of one expert's gradient a *segment* of rows::

    segment s = expert * U + unit      rows offsets[s] to offsets[s + 1]      G_s = left[rows]^T right[rows]

Three operations follow. `unit_gradients_torch` writes every G_s: the mechanism needs them, since it rounds a unit's
clipped gradient to integers. `unit_square_norms_torch` gives their squared norms without keeping any.
`clipped_gradient_torch` sums each expert's G_s, each times its unit's factor, as one product of an expert's rows. No
private run calls it: such a sum has no sensitivity that clipping would bound. A unit with the rows 2^30 and -2^30 has a
gradient of exactly zero, and erases another's 1 on the way (`test_a_floating_point_sum_has_no_sensitivity`). What the
two wait for stands in `docs/model.md`.

Source: Lee and Kifer 2021 for row-scaled gradients ("book-keeping" in Bu et al. 2023); the segments are ours. A norm by
way of the Gram matrix, ``sum_ij (l_i . l_j) (r_i . r_j)``, cancels: in float32 it gave 0 for a true 0.148. It is taken
in float64 here, for short segments alone, and no clip of a private run rests on it.

Where the rows lie on a CUDA device the three operators run `device/clip.py`, which keeps no G_s for a norm and brings
no offset to the host, if `backend.device_code` finds nothing missing: a property of the machine, the same for
every batch of a run. In float64, in which gradients are checked, the reference runs everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from foedus_kernels import backend

DEVICE_TYPES = (torch.float32, torch.bfloat16)  # Of rows that device code takes.
_ALIGNMENT = 64  # Bytes: what torch's CPU allocator gives, and a cache line.


def _operator(name: str) -> Callable[[Callable[..., torch.Tensor]], torch.library.CustomOpDef]:
    """An operator of `torch.library` with a reference; on CUDA it runs the device code of its name."""

    def register(reference: Callable[..., torch.Tensor]) -> torch.library.CustomOpDef:
        operator = torch.library.custom_op(f"foedus::{name}", mutates_args=())(reference)
        operator.register_kernel("cuda", _on_cuda(name, reference))
        return operator

    return register


def _on_cuda(name: str, reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def chosen(left: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        code = backend.device_code("clip", left.device) if left.dtype in DEVICE_TYPES else None
        return (reference if code is None else getattr(code, name))(left, *rest)

    return chosen


@_operator("unit_gradients")
def unit_gradients_torch(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each segment's gradient.

    Args:
        left: Gradients of the outputs, rows in the order of segments.  # (M, N)
        right: Inputs of the same rows.  # (M, R)
        offsets: int64, ascending, from 0 to M: where each segment begins, and the end.  # (S + 1,)

    Returns:
        [S, N, R] in the rows' type; zero for a segment without rows.

    Raises:
        ValueError: Shapes that do not fit, or offsets that do not cover the rows.

    Guarantees:
        A segment's result is a function of its own rows: each is a product of its own, from and to memory of one
        alignment, so that the library sums it in one order whatever the other segments hold.
    """
    bounds = _bounds(left, right, offsets)
    result = left.new_zeros(len(bounds) - 1, left.shape[1], right.shape[1])  # (S, N, R)
    for segment, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            result[segment] = _aligned(left[start:stop]).T @ _aligned(right[start:stop])
    return result


@unit_gradients_torch.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


@_operator("unit_square_norms")
def unit_square_norms_torch(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The squared Frobenius norm of each segment's gradient; arguments and errors of `unit_gradients_torch`.

    A segment of m rows goes by the Gram matrices where m (N + R) < N R, else its gradient is made and dropped. The
    choice is a function of the segment's own length.

    Returns:
        float64 [S].
    """
    bounds = _bounds(left, right, offsets)
    outs, ins = left.shape[1], right.shape[1]
    norms = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=left.device)  # (S,)
    longest = (outs * ins - 1) // (outs + ins)  # The most rows for which the Gram matrices are the smaller way.
    lengths = offsets.diff()  # (S,)
    short = torch.nonzero((lengths > 0) & (lengths <= longest)).squeeze(1)  # (S',)
    if short.numel():
        norms[short] = _gram_norms(left, right, offsets[short], lengths[short])
    for segment, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop - start > longest:
            norms[segment] = (left[start:stop].T @ right[start:stop]).double().square().sum()
    return norms


@unit_square_norms_torch.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return left.new_empty(offsets.shape[0] - 1, dtype=torch.float64)


@_operator("clipped_gradient")
def clipped_gradient_torch(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """The sum over units of factor times gradient, for each expert: one product of an expert's scaled rows.

    Args:
        left: [M, N], `unit_gradients_torch`.
        right: [M, R].
        offsets: int64 [E * U + 1].
        factors: Each unit's clip factor.  # (U,)

    Returns:
        [E, N, R] in the rows' type.

    Raises:
        ValueError: Shapes that do not fit, or a number of segments that is not a multiple of the units.

    Guarantees:
        A unit of factor 0 takes no part, whatever its rows hold: one that is not finite changes no other's sum.
    """
    bounds = _bounds(left, right, offsets)
    experts, units = experts_of(offsets, factors), factors.shape[0]
    row_factors = factors.to(left.dtype).repeat(experts).repeat_interleave(offsets.diff(), output_size=left.shape[0])
    taken = (row_factors != 0).unsqueeze(1)  # (M, 1)
    scaled = torch.where(taken, left * row_factors.unsqueeze(1), 0)  # (M, N)
    right = torch.where(taken, right, 0)  # (M, R)
    result = left.new_zeros(experts, left.shape[1], right.shape[1])  # (E, N, R)
    for expert in range(experts):
        start, stop = bounds[expert * units], bounds[(expert + 1) * units]
        if start < stop:
            torch.mm(scaled[start:stop].T, right[start:stop], out=result[expert])
    return result


@clipped_gradient_torch.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return left.new_empty((offsets.shape[0] - 1) // factors.shape[0], left.shape[1], right.shape[1])


def segment_offsets(expert_ids: torch.Tensor, units: int, num_experts: int) -> torch.Tensor:
    """Where each (expert, unit) begins among rows sorted by expert and then by token.

    Args:
        expert_ids: int64 [U * T, experts_per_token]: a unit's T tokens are neighbours.
        units: U.
        num_experts: E.

    Returns:
        int64 [E * U + 1].
    """
    unit_of = torch.arange(units, device=expert_ids.device).repeat_interleave(expert_ids.numel() // units)  # (M,)
    segments = expert_ids.reshape(-1) * units + unit_of  # (M,)
    counts = torch.bincount(segments, minlength=num_experts * units)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _gram_norms(left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Squared norms of short segments, padded to the longest of them: float64 (S',)."""
    places = torch.arange(int(lengths.max()), device=left.device)  # (m,)
    inside = places < lengths.unsqueeze(1)  # (S', m)
    rows = torch.where(inside, starts.unsqueeze(1) + places, 0)  # (S', m)
    wide = left.double()[rows] * inside.unsqueeze(2)  # (S', m, N)
    narrow = right.double()[rows]  # (S', m, R)
    return ((wide @ wide.mT) * (narrow @ narrow.mT)).sum((1, 2))


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """The rows at an address of a fresh allocation's alignment: a CPU's product may sum in another order elsewhere."""
    return rows if rows.data_ptr() % _ALIGNMENT == 0 and rows.is_contiguous() else rows.clone()


def check_shapes(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> None:
    """What can be said of the arguments without bringing a value to the host.

    Raises:
        ValueError: Shapes or types that do not fit.
    """
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(
            f"expected rows (M, N) and (M, R) of one type, got {left.dtype} {tuple(left.shape)} and "
            f"{right.dtype} {tuple(right.shape)}"
        )
    if offsets.dim() != 1 or not offsets.numel() or offsets.dtype != torch.int64:
        raise ValueError(f"expected int64 offsets (S + 1,), got {offsets.dtype} {tuple(offsets.shape)}")


def experts_of(offsets: torch.Tensor, factors: torch.Tensor) -> int:
    """The number of experts whose segments `offsets` bounds, with a factor for each unit.

    Raises:
        ValueError: The number of segments is not a multiple of the units.
    """
    units, segments = factors.numel(), offsets.numel() - 1
    if factors.dim() != 1 or not units or segments % units:
        raise ValueError(
            f"expected factors (U,) and E * U segments, got {tuple(factors.shape)} and {segments} segments"
        )
    return segments // units


def _bounds(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> list[int]:
    check_shapes(left, right, offsets)
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != left.shape[0] or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"expected ascending offsets from 0 to {left.shape[0]} rows, got {bounds[0]} to {bounds[-1]}")
    return bounds
