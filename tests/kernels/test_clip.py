"""Segments' gradients, norms and clipped sums against loops and autograd; ragged cases, Gram and direct."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels.clip import (
    clipped_gradient_torch,
    segment_offsets,
    unit_gradients_torch,
    unit_square_norms_torch,
)

# Segments without rows, of one row, and on both sides of the Gram limit, which is 2 rows at 7 x 5 and 9 at 13 x 40.
LENGTHS = ([0, 1, 0, 6, 2, 1], [3], [0], [0, 0, 0], [1, 1, 1, 1], [17, 0, 2, 9, 10, 1])
SHAPES = ((7, 5), (13, 40), (1, 1), (32, 1))
RTOL = {torch.float32: 2e-6, torch.float64: 1e-13}


def rows_of(lengths, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths) + shape[0])
    left = torch.randn(sum(lengths), shape[0], generator=generator, dtype=dtype)
    right = torch.randn(sum(lengths), shape[1], generator=generator, dtype=dtype)
    return left, right, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def loop(left, right, offsets) -> torch.Tensor:
    """Row by row, in float64."""
    result = torch.zeros(len(offsets) - 1, left.shape[1], right.shape[1], dtype=torch.float64)
    for segment in range(len(offsets) - 1):
        for row in range(int(offsets[segment]), int(offsets[segment + 1])):
            result[segment] += torch.outer(left[row].double(), right[row].double())
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_and_norms_equal_a_loop(lengths, shape, dtype) -> None:
    left, right, offsets = rows_of(lengths, shape, dtype)
    expected = loop(left, right, offsets)
    found = unit_gradients_torch(left, right, offsets)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype])
    norms = unit_square_norms_torch(left, right, offsets)
    torch.testing.assert_close(norms, expected.square().sum((1, 2)), rtol=RTOL[dtype], atol=0.0)
    assert not found[torch.tensor(lengths) == 0].any()
    assert not norms[torch.tensor(lengths) == 0].any()


@pytest.mark.parametrize(("lengths", "units"), [([0, 1, 0, 6, 2, 1], 3), ([0, 1, 0, 6, 2, 1], 1), ([0, 4, 0, 0], 2)])
def test_the_clipped_sum_is_the_sum_of_scaled_gradients(lengths, units) -> None:
    left, right, offsets = rows_of(lengths, (7, 5))
    factors = torch.linspace(0.0, 1.0, units) if units > 1 else torch.tensor([0.3])
    gradients = loop(left, right, offsets).unflatten(0, (-1, units))  # (E, U, N, R)
    expected = (gradients * factors.double()[:, None, None]).sum(1)
    found = clipped_gradient_torch(left, right, offsets, factors)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


def test_segments_equal_autograd_of_one_expert_and_unit_at_a_time() -> None:
    """Routing of 3 units of 5 tokens over 4 experts, expert 2 never chosen; autograd of each unit's own loss."""
    units, tokens, experts, outs, ins = 3, 5, 4, 6, 3
    generator = torch.Generator().manual_seed(1)
    allowed = torch.tensor([0, 1, 3])
    pairs = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(units * tokens)])
    expert_ids = allowed[pairs]  # (U * T, 2)
    hidden = torch.randn(units * tokens, ins, generator=generator)
    weights = torch.randn(experts, outs, ins, generator=generator, requires_grad=True)
    order = torch.argsort(expert_ids.reshape(-1), stable=True)
    rows = hidden.repeat_interleave(2, dim=0)  # (M, K), a row for each choice
    outputs = torch.einsum("mk,mnk->mn", rows, weights[expert_ids.reshape(-1)])  # (M, N)
    losses = outputs.pow(3).view(units, -1).sum(1)  # (U,)
    expected = torch.stack(
        [torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses], dim=1
    )  # (E, U, N, K)
    left = 3 * outputs.detach().square()
    offsets = segment_offsets(expert_ids, units, experts)
    found = unit_gradients_torch(left[order], rows[order], offsets)
    torch.testing.assert_close(found.unflatten(0, (experts, units)), expected, rtol=2e-6, atol=2e-6)
    assert not found.unflatten(0, (experts, units))[2].any()


def test_a_segments_bits_do_not_depend_on_its_neighbours() -> None:
    left, right, offsets = rows_of([5, 1, 30, 3], (24, 9))
    whole = unit_gradients_torch(left, right, offsets)
    for segment in range(4):
        rows = slice(int(offsets[segment]), int(offsets[segment + 1]))
        alone = unit_gradients_torch(left[rows], right[rows], torch.tensor([0, rows.stop - rows.start]))
        assert torch.equal(alone[0], whole[segment])


def test_the_gram_norm_survives_cancellation() -> None:
    """Two rows that cancel to one part in 10^6: float32 Gram matrices say 0 or less, the true norm is 1e-6 of a row's.

    The inputs are exact in float32, so that the truth is known.
    """
    left = torch.stack([torch.full((16,), 1.0), torch.full((16,), -1.0)])
    right = torch.stack([torch.full((16,), 1.0), torch.full((16,), 1.0 - 2.0**-20)])
    norm = unit_square_norms_torch(left, right, torch.tensor([0, 2]))
    assert norm.item() == pytest.approx(16 * 16 * 2.0**-40, rel=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    left, right, offsets = rows_of([2, 3], (4, 3))
    for wrong in (
        (left[:4], right, offsets),
        (left.double(), right, offsets),
        (left, right, offsets.int()),
        (left, right, torch.tensor([0, 2, 4])),
        (left, right, torch.tensor([0, 6, 5])),
        (left, right, torch.tensor([1, 2, 5])),
    ):
        for operation in (unit_gradients_torch, unit_square_norms_torch):
            with pytest.raises(ValueError, match="expected"):
                operation(*wrong)
    for factors in (torch.ones(3), torch.ones(2, 1), torch.ones(0)):
        with pytest.raises(ValueError, match="factors"):
            clipped_gradient_torch(left, right, offsets, factors)


@pytest.mark.parametrize("lengths", [[0, 1, 0, 6, 2, 1], [0, 0]])
def test_the_operators_are_registered_with_fakes(lengths) -> None:
    left, right, offsets = rows_of(lengths, (7, 5))
    factors = torch.ones(2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(unit_gradients_torch, (left, right, offsets), test_utils=tests)
    torch.library.opcheck(unit_square_norms_torch, (left, right, offsets), test_utils=tests)
    torch.library.opcheck(clipped_gradient_torch, (left, right, offsets, factors), test_utils=tests)


def test_a_unit_of_factor_zero_takes_no_part_whatever_its_rows_hold() -> None:
    """0 times infinity is no number: a dropped unit must not spoil the sum of the others."""
    left, right, offsets = rows_of([2, 3, 1, 4], (7, 5))
    factors = torch.tensor([0.5, 0.0])
    want = clipped_gradient_torch(left, right, offsets, factors)
    left[3], right[4], right[7] = torch.nan, torch.inf, -torch.inf  # Of the second unit.
    assert torch.equal(clipped_gradient_torch(left, right, offsets, factors), want)
    assert torch.isfinite(unit_square_norms_torch(left, right, offsets)).tolist() == [True, False, True, False]


def test_a_floating_point_sum_has_no_sensitivity() -> None:
    """Why the mechanism sums integers: a unit whose gradient is zero takes away all that another gave.

    Clipping bounds the sum of a unit's rows. What their order of magnitude does to a float32 sum on the way is not
    bounded by it.
    """
    rows = torch.tensor([1.0, 2.0**30, -(2.0**30)])
    left, right, offsets = rows[:, None].expand(3, 4).contiguous(), torch.ones(3, 2), torch.tensor([0, 1, 3])
    assert unit_square_norms_torch(left, right, offsets).tolist() == [8.0, 0.0]
    alone, together = (
        clipped_gradient_torch(left, right, offsets, torch.tensor([1.0, factor])) for factor in (0.0, 1.0)
    )
    assert float((alone - together).square().sum()) == 8.0
