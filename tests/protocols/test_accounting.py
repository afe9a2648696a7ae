"""What events cost, and the noise that a budget allows."""

from __future__ import annotations

import math

import pytest
from foedus_protocols.accounting import (
    NOISE_GRID,
    Event,
    calibrate,
    epsilon,
    epsilon_rdp,
    filter_order,
    party_constants,
    plan,
    weight,
)
from foedus_protocols.errors import ConfigError
from scipy.optimize import brentq
from scipy.stats import norm


def event(noise: float, prob: float, steps: int) -> Event:
    return Event(noise_multiplier=noise, sampling_prob=prob, steps=steps)


def exact_gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle and Wang 2018: the exact epsilon of one Gaussian release, by a formula that no accountant uses."""

    def excess(eps: float) -> float:
        half = 1 / (2 * noise)
        return float(norm.cdf(half - eps * noise) - math.exp(eps) * norm.cdf(-half - eps * noise)) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(
    ("units_at_most", "prob", "units"), [(1, 1, 1), (64, 1, 64), (128, 0.5, 64), (4096, 1 / 64, 64)]
)
def test_party_constants(units_at_most: int, prob: float, units: float) -> None:
    assert party_constants(units_at_most) == (prob, units)
    assert party_constants(units_at_most).sampling_prob * units_at_most == units


@pytest.mark.parametrize("units_at_most", [0, -4, 3, 100])
def test_units_at_most_is_a_power_of_two(units_at_most: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        party_constants(units_at_most)


def test_weight_is_expected_units_over_noise() -> None:
    assert weight(64.0, 0.5) == 128.0
    assert weight(64.0, 0.0) == 64.0


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_one_release_is_at_most_a_thousandth_above_the_exact_epsilon(noise: float) -> None:
    exact = exact_gaussian_epsilon(noise, 1e-5)
    assert exact <= epsilon([event(noise, 1.0, 1)], 1e-5) <= exact + 1e-3


@pytest.mark.parametrize(
    ("noise", "prob", "steps", "delta", "published"),
    [(1.0, 0.01, 1000, 1e-5, 1.83), (1.0, 1.0, 10, 1e-5, 17.86), (0.5, 0.001, 10_000, 1e-7, 7.45)],
)
def test_subsampled_composition(noise: float, prob: float, steps: int, delta: float, published: float) -> None:
    """Reference figures: dp_accounting at its default step of 1e-4, with which Opacus' PRV agrees to 0.01."""
    assert epsilon([event(noise, prob, steps)], delta) == pytest.approx(published, abs=0.006)


def test_many_gaussians_are_one_gaussian_of_less_noise() -> None:
    """Without sampling, T releases with noise s are exactly one with noise s / sqrt(T)."""
    exact = exact_gaussian_epsilon(2.0 / math.sqrt(16), 1e-6)
    assert exact <= epsilon([event(2.0, 1.0, 16)], 1e-6) <= exact + 2e-3


def test_splitting_and_order_do_not_matter() -> None:
    a, b = event(1.0, 0.1, 6), event(2.0, 0.5, 4)
    halves = [event(2.0, 0.5, 1), event(1.0, 0.1, 3), event(2.0, 0.5, 3), event(1.0, 0.1, 3), event(9.0, 0.5, 0)]
    assert epsilon([a, b], 1e-5) == epsilon(halves, 1e-5)
    assert epsilon_rdp([a, b], 1e-5) == epsilon_rdp(halves, 1e-5)
    assert epsilon([a, b], 1e-5) > max(epsilon([a], 1e-5), epsilon([b], 1e-5))


@pytest.mark.parametrize("account", [epsilon, epsilon_rdp])
def test_nothing_costs_nothing_and_no_noise_costs_everything(account) -> None:  # type: ignore[no-untyped-def]
    assert account([], 1e-5) == 0
    assert account([event(0.0, 0.5, 0)], 1e-5) == 0
    assert account([event(0.0, 0.5, 1)], 1e-5) == math.inf
    assert account([event(1e-6, 0.5, 1), event(1.0, 0.5, 1)], 1e-5) == math.inf


def test_the_filter_is_never_below_the_loss_distribution() -> None:
    events = [event(0.4157, 1 / 64, 10)]
    order = filter_order(events, epsilon_cap=20, delta=1e-5)
    assert epsilon(events, 1e-5) < epsilon_rdp(events, 1e-5) <= epsilon_rdp(events, 1e-5, order=order)


def test_the_filters_order_is_the_best_for_filling_the_cap_with_the_first_charter() -> None:
    first = [event(1.8981, 1.0, 10)]
    order = filter_order(first, epsilon_cap=20, delta=1e-5)
    fitting = max(k for k in range(1, 9) if epsilon_rdp(first * k, 1e-5) <= 20)
    assert fitting > 1
    assert epsilon_rdp(first * fitting, 1e-5, order=order) == epsilon_rdp(first * fitting, 1e-5)
    assert epsilon_rdp(first, 1e-5, order=order) > epsilon_rdp(first, 1e-5)


def test_at_a_fixed_order_costs_add_up() -> None:
    """Rényi divergences add at one order, so each further event lifts the figure by the same amount."""
    one = event(1.0, 0.25, 10)
    figures = [epsilon_rdp([one] * k, 1e-5, order=2.5) for k in (2, 3, 4)]
    assert figures[2] - figures[1] == pytest.approx(figures[1] - figures[0], rel=1e-9)


@pytest.mark.parametrize("units_at_most", [64, 256, 4096])
def test_calibration_is_the_smallest_noise_on_the_grid(units_at_most: int) -> None:
    prob = party_constants(units_at_most).sampling_prob
    noise = calibrate(epsilon=8.0, delta=1e-5, sampling_prob=prob, steps=10)
    assert noise == pytest.approx(round(noise / NOISE_GRID) * NOISE_GRID, abs=1e-12)
    assert epsilon([event(noise, prob, 10)], 1e-5) <= 8.0
    assert epsilon([event(noise - NOISE_GRID, prob, 10)], 1e-5) > 8.0 - 1e-6


def test_a_charter_calibrated_to_the_cap_may_run_to_its_last_round() -> None:
    noise = calibrate(epsilon=2.0, delta=1e-5, sampling_prob=0.5, steps=7)
    costs = [epsilon([event(noise, 0.5, rounds)], 1e-5) for rounds in range(1, 8)]
    assert costs == sorted(costs)
    assert costs[-1] <= 2.0


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate(epsilon=0.0, delta=1e-5, sampling_prob=0.5, steps=10)
    with pytest.raises(ConfigError, match="some noise can meet"):
        calibrate(epsilon=1e-9, delta=1e-12, sampling_prob=1.0, steps=1000)


def test_plan_finds_each_fourth_quantity() -> None:
    noise = plan(delta=1e-5, epsilon=4.0, sampling_prob=0.1, steps=50).noise_multiplier
    cost = plan(delta=1e-5, noise_multiplier=noise, sampling_prob=0.1, steps=50).epsilon
    assert cost <= 4.0
    assert plan(delta=1e-5, epsilon=4.0, noise_multiplier=noise, sampling_prob=0.1).steps == 50
    prob = plan(delta=1e-5, epsilon=4.0, noise_multiplier=noise, steps=50).sampling_prob
    assert 0.1 <= prob < 0.1002


def test_plan_says_that_not_even_one_step_fits() -> None:
    assert plan(delta=1e-5, epsilon=0.1, noise_multiplier=0.5, sampling_prob=1.0).steps == 0
    with pytest.raises(ConfigError, match="some sampling meets"):
        plan(delta=1e-9, epsilon=0.1, noise_multiplier=0.11, steps=10_000)


def test_plan_wants_exactly_three() -> None:
    with pytest.raises(ConfigError, match="exactly three"):
        plan(delta=1e-5, epsilon=4.0, steps=10)
    with pytest.raises(ConfigError, match="exactly three"):
        plan(delta=1e-5, epsilon=4.0, noise_multiplier=1.0, sampling_prob=0.1, steps=10)


@pytest.mark.parametrize(
    ("noise", "prob", "steps"), [(-1.0, 0.5, 1), (math.nan, 0.5, 1), (1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, 0.5, -1)]
)
def test_a_malformed_event_is_refused(noise: float, prob: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        event(noise, prob, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_a_probability(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon([event(1.0, 0.5, 1)], delta)


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_prob", "steps"),
    [(0.1, 0.5, 1_000_000), (0.3, 0.9, 2**53 - 1), (100.0, 1e-3, 2**53 - 1), (2.0, 5e-324, 3), (1e300, 0.1, 3)],
)
def test_numbers_out_of_reach_are_beyond_every_budget_and_fill_no_memory(
    noise_multiplier: float, sampling_prob: float, steps: int
) -> None:
    """Each made the accountant raise, hang, or ask for gigabytes; a charter's author chooses them."""
    event = Event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    assert epsilon([event], 1e-5) > 1000
