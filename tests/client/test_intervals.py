"""Intervals over units: against numpy, against the normal approximation, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from foedus_client.intervals import ratio


def test_the_value_is_the_ratio_of_sums_and_units_without_anything_count_for_nothing() -> None:
    above, below = np.array([2.0, 9.0, 1.0, 7.0]), np.array([1.0, 3.0, 1.0, 0.0])
    found = ratio(above, below)
    assert found is not None
    assert found.value == pytest.approx(12.0 / 5.0)
    assert found == ratio(above[:3], below[:3])
    assert ratio(above, np.zeros(4)) is None


def test_one_unit_has_no_interval() -> None:
    found = ratio(np.array([3.0]), np.array([2.0]))
    assert found is not None
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_the_interval_is_that_of_the_mean_where_units_are_of_one_size() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = ratio(values, np.ones(400))
    assert found is not None
    half = 1.96 * values.std() / 20.0
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_records_of_one_unit_do_not_narrow_it() -> None:
    """Ten equal records a unit are as much as one."""
    values = np.random.default_rng(2).normal(size=50)
    one, ten = ratio(values, np.ones(50)), ratio(10 * values, np.full(50, 10.0))
    assert one is not None
    assert ten is not None
    assert (one.low, one.high) == (pytest.approx(ten.low), pytest.approx(ten.high))


def test_a_seed_repeats_the_draws_and_another_differs() -> None:
    values = np.random.default_rng(3).normal(size=30)
    assert ratio(values, np.ones(30), seed=4) == ratio(values, np.ones(30), seed=4)
    assert ratio(values, np.ones(30), seed=4) != ratio(values, np.ones(30), seed=5)


def test_a_difference_leaves_out_what_both_models_find_hard() -> None:
    source = np.random.default_rng(5)
    hard = source.normal(0.0, 10.0, size=60)
    hard -= hard.mean()
    better = hard - 0.5 + source.normal(0.0, 0.1, size=60)
    alone, paired = ratio(better, np.ones(60)), ratio(better, np.ones(60), minus=hard)
    assert alone is not None
    assert paired is not None
    assert paired.value == pytest.approx(float((better - hard).mean()))
    assert paired.high < 0.0 < alone.high  # type: ignore[operator]
    assert paired.high - paired.low < (alone.high - alone.low) / 20  # type: ignore[operator]
