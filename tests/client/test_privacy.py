"""Clip, grid and sample: bounds that hold for every input, and directions that survive."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from foedus_client import privacy
from foedus_client.privacy import SeededBytes, StepTerms, UnitSum, clip_to_grid, grid, squared_limit
from foedus_protocols.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

TERMS = StepTerms(
    l2_clip_norm=0.1, noise_multiplier=0.8, sampling_prob=0.25, expected_units=64.0, max_records_per_unit=4
)


def squared(values: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in values)


SHAPES = [(1.0, 1.0, 24_576), (0.35, 0.3, 4_600_000), (30.0, 0.1, 100)]


@pytest.mark.parametrize(("multiplier", "clip", "length"), SHAPES)
def test_grid_is_the_largest_power_of_two_under_both_terms(multiplier: float, clip: float, length: int) -> None:
    step = grid(multiplier * clip, clip, length)
    bound = min(multiplier * clip / 1024, clip / (8 * math.sqrt(length)))
    assert math.frexp(step)[0] == 0.5
    assert step <= bound < 2 * step


def test_grid_without_noise_is_finer_than_any_with_noise() -> None:
    assert grid(0.0, 0.1, 24_576) <= grid(1.0, 0.1, 24_576) / 512


def test_grid_refuses_a_clip_of_too_many_grid_units() -> None:
    with pytest.raises(ConfigError, match="2\\^30"):
        grid(1e-9, 1.0, 100)


@settings(deadline=None, max_examples=300)
@given(
    gradient=hnp.arrays(
        np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)
    ),
    clip=st.floats(1e-6, 1e6),
    multiplier=st.floats(0.01, 100.0),
)
def test_no_gradient_is_longer_than_the_clip_in_integers(gradient: np.ndarray, clip: float, multiplier: float) -> None:
    step = grid(multiplier * clip, clip, gradient.size)
    unit = clip_to_grid(gradient, l2_clip_norm=clip, step=step)
    assert squared(unit.values) <= squared_limit(clip, step)
    assert unit.l2_bound == clip
    if not np.isfinite(gradient).all():
        assert not unit.values.any()
        assert unit.scale == 0.0


def test_long_gradients_of_every_length_keep_their_norm_under_the_clip() -> None:
    """Rounding adds length; without the target below the clip 70 to 100 % of these would be over it."""
    rng = np.random.default_rng(1)
    for units in (1.0, 2.0, 8.0, 32.0):
        length = 40_000
        step = 2.0**-20
        clip = units * step * math.sqrt(length)
        gradient = (rng.standard_normal(length) * clip).astype(np.float32)
        unit = clip_to_grid(gradient, l2_clip_norm=clip, step=step)
        norm = math.sqrt(squared(unit.values)) * step
        assert norm <= clip
        assert norm > 0.94 * clip, (units, norm / clip)


def test_an_integer_vector_over_the_limit_is_scaled_once_and_then_cut() -> None:
    """Two equal coordinates of 1.5 grid units: nearest rounding gives (2, 2), over a clip of 2.3 grid units."""
    unit = clip_to_grid(np.array([1.6, 1.6], np.float32), l2_clip_norm=2.3, step=1.0)
    assert unit.values.tolist() == [1, 1]


def test_short_gradients_are_not_scaled() -> None:
    gradient = np.array([3.0, -4.0, 0.5], np.float32) / 64
    unit = clip_to_grid(gradient, l2_clip_norm=1.0, step=2.0**-10)
    assert unit.scale == 1.0
    assert np.array_equal(unit.values * 2.0**-10, gradient)


def check_flat_gradient_keeps_its_direction() -> None:
    """At d >= 1 M and a noise multiplier of 2, where a grid of noise_stddev / 1024 leaves half a grid unit."""
    length, clip = 1 << 20, 0.1
    step = privacy.grid(2.0 * clip, clip, length)
    rng = np.random.default_rng(2)
    for flat in (rng.standard_normal(length), rng.choice([-1.0, 1.0], length), np.ones(length)):
        gradient = flat.astype(np.float32)
        values = clip_to_grid(gradient, l2_clip_norm=clip, step=step).values.astype(np.float64)
        norms = np.linalg.norm(values) * np.linalg.norm(flat)
        assert norms > 0.0
        assert values @ gradient / norms >= 0.999
        # Where all coordinates are equal they may all be cut: at most one of 8 grid units or more.
        assert 0.87 * clip < np.linalg.norm(values) * step <= clip


def test_a_flat_gradient_of_a_million_coordinates_keeps_its_direction() -> None:
    check_flat_gradient_keeps_its_direction()


def test_a_grid_from_the_noise_alone_fails_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "grid", lambda stddev, _clip, _length: 2.0 ** math.floor(math.log2(stddev / 1024)))
    with pytest.raises((AssertionError, ConfigError)):
        check_flat_gradient_keeps_its_direction()


def test_a_sum_takes_only_units_of_its_own_grid_length_and_bound() -> None:
    total = UnitSum(length=3, l2_clip_norm=1.0, step=0.5)
    good = clip_to_grid(np.ones(3, np.float32), l2_clip_norm=1.0, step=0.5)
    total.add(good)
    for other in (
        clip_to_grid(np.ones(3, np.float32), l2_clip_norm=1.0, step=0.25),
        clip_to_grid(np.ones(4, np.float32), l2_clip_norm=1.0, step=0.5),
        clip_to_grid(np.ones(3, np.float32), l2_clip_norm=2.0, step=0.5),
    ):
        with pytest.raises(ConfigError):
            total.add(other)
    assert np.array_equal(total.total().values, good.values)
    assert total.total().l2_sensitivity == 1.0


def test_the_vector_is_the_sum_over_clip_and_expected_units() -> None:
    vector = privacy.release_vector(np.array([64, -128], np.int64), step=0.25, l2_clip_norm=0.5, expected_units=32.0)
    assert vector.dtype == np.float32
    assert vector.tolist() == [1.0, -2.0]


def test_poisson_sampling_has_its_probability_for_every_unit() -> None:
    """Each count is binomial; six deviations, a false alarm once in 10^7 runs over all units together."""
    draws, units = 2000, 50
    counts = np.zeros(units)
    sizes = []
    for _ in range(draws):
        sample = privacy.poisson_sample(units, 0.25, os.urandom)
        counts[sample] += 1
        sizes.append(len(sample))
    assert (np.abs(counts - draws * 0.25) < 6 * math.sqrt(draws * 0.25 * 0.75)).all()
    variance = units * 0.25 * 0.75
    assert abs(np.var(sizes) - variance) < 6 * variance * math.sqrt(2 / draws)


def test_poisson_sampling_at_its_ends() -> None:
    assert privacy.poisson_sample(7, 1.0, os.urandom).tolist() == list(range(7))
    assert privacy.poisson_sample(0, 0.5, os.urandom).size == 0
    assert privacy.poisson_sample(1000, 2.0**-60, os.urandom).size == 0


def test_the_threshold_is_compared_exactly() -> None:
    words = [2**62 - 1, 2**62, 0, 2**64 - 1]
    data = b"".join(word.to_bytes(8, "little") for word in words)
    assert privacy.poisson_sample(4, 0.25, lambda _count: data).tolist() == [0, 2]


def test_records_are_all_taken_or_chosen_uniformly() -> None:
    assert list(privacy.choose_records(3, 4, os.urandom)) == [0, 1, 2]
    draws, counts = 3000, np.zeros(6)
    for _ in range(draws):
        chosen = list(privacy.choose_records(6, 2, os.urandom))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 2
        counts[chosen] += 1
    assert (np.abs(counts - draws / 3) < 6 * math.sqrt(draws * 2 / 9)).all()


def test_seeded_bytes_are_a_function_of_seed_org_round_and_step() -> None:
    first = SeededBytes(seed=1, org="a", round_number=3)
    again = SeededBytes(seed=1, org="a", round_number=3)
    drawn = [first(16), first(16)]
    assert drawn == [again(16), again(16)]
    assert drawn[0] != drawn[1]
    others = [
        SeededBytes(seed=2, org="a", round_number=3),
        SeededBytes(seed=1, org="b", round_number=3),
        SeededBytes(seed=1, org="a", round_number=4),
        SeededBytes(seed=1, org="a", round_number=3, step=2),
    ]
    assert len({other(16) for other in others} | {drawn[0]}) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"l2_clip_norm": 0.0},
        {"l2_clip_norm": math.nan},
        {"noise_multiplier": -0.1},
        {"noise_multiplier": math.inf},
        {"sampling_prob": 0.0},
        {"sampling_prob": 1.1},
        {"expected_units": 0.0},
        {"max_records_per_unit": 0},
    ],
)
def test_terms_off_their_range_are_refused(change: dict[str, float]) -> None:
    values = {name: getattr(TERMS, name) for name in TERMS.__dataclass_fields__}
    with pytest.raises(ConfigError):
        StepTerms(**(values | change))


def test_the_noise_stddev_is_never_below_the_product() -> None:
    assert TERMS.noise_stddev > TERMS.noise_multiplier * TERMS.l2_clip_norm
    assert TERMS.noise_stddev == pytest.approx(0.08, rel=1e-15)
