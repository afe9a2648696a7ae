"""What a sequence of noisy releases costs: epsilon at a given delta, and the noise that a budget allows.

An event is the Gaussian mechanism on a Poisson sample of privacy units, repeated. Neighbours differ by **adding or
removing one unit**. Two accountants, both from Google's ``dp_accounting``:

* the privacy loss distribution (PLD) is the figure of a charter whose events were fixed before anything was released;
* Rényi DP (RDP) at one order that was fixed beforehand is the *filter* that admits later charters, which are chosen in
  the light of earlier results (Feldman and Zrnic 2021, "Individual privacy accounting via a Rényi filter").

The Gaussian (GDP) approximation is left out on purpose: it has reported 3.78 where the true figure is 7.45.
Epsilons are always recomputed from events and never added up.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from foedus_protocols.errors import ConfigError

if TYPE_CHECKING:
    import dp_accounting

# `dp_accounting` is imported where it is used: with scipy it takes longer than most commands, which never account.

TARGET_UNITS = 64
"""Expected units a step: the default of `party_constants`."""

NOISE_GRID = 1e-4
"""Noise multipliers in charters are multiples of this, so that few distinct events have to be composed."""

SAMPLING_GRID = 1e-5

SMALLEST_NOISE = 0.1
"""Below this noise multiplier no useful epsilon exists and the PLD's support explodes: epsilon is infinite."""

# The step of the discretised privacy loss. The PLD rounds pessimistically, so a wider step only raises epsilon: at 1e-3
# by less than 0.002 over 10,000 steps and 4e-5 over 100, at a tenth of the time of the library's default of 1e-4.
_LOSS_STEP = 1e-3
_COARSE_LOSS_STEP = 1e-2

# Two machines may differ in the last bits of a Fourier transform; a calibrated epsilon stays clear of its target.
_MARGIN = 1e-6

_LARGEST_NOISE = 1e4
_LARGEST_STEPS = 1_000_000
# Beyond this epsilon nobody needs to know how far beyond, and a PLD that has to reach there takes gigabytes.
_HOPELESS = 1e3
_QUICK_ORDERS = (2.0, 3.0, 4.0, 8.0, 16.0, 32.0)
# What the library raises for mechanisms that are out of floating point's reach. Their epsilon counts as infinite.
_OUT_OF_REACH = (ArithmeticError, ValueError, MemoryError)

_ORDERS = tuple([1 + tenth / 10 for tenth in range(2, 100)] + list(range(11, 64)) + [128, 256, 512, 1024])


@dataclass(frozen=True, kw_only=True)
class Event:
    """The Poisson-subsampled Gaussian mechanism, `steps` times.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 means no noise.
        sampling_prob: Probability that a unit takes part in one step.
        steps: How many independent steps.
    """

    noise_multiplier: float
    sampling_prob: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"expected a finite noise multiplier of at least 0, got {self.noise_multiplier}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"expected a sampling probability above 0 and at most 1, got {self.sampling_prob}")
        if self.steps < 0:
            raise ConfigError(f"expected a number of steps of at least 0, got {self.steps}")


class PartyConstants(NamedTuple):
    """What follows from an organisation's declared size, and from nothing else about its data."""

    sampling_prob: float
    expected_units: float


def party_constants(units_at_most: int, target_units: int = TARGET_UNITS) -> PartyConstants:
    """Sampling probability and constant divisor of an organisation.

    ``sampling_prob = min(1, target_units / units_at_most)``, ``expected_units = sampling_prob * units_at_most``.

    Args:
        units_at_most: The declared bound on the number of units, a power of two. Public.
        target_units: Units that a step should use where there are as many.

    Raises:
        ConfigError: `units_at_most` is not a power of two, or `target_units` is not positive.
    """
    if units_at_most < 1 or units_at_most & (units_at_most - 1):
        raise ConfigError(f"expected units_at_most to be a power of two, got {units_at_most}: round it up to one")
    if target_units < 1:
        raise ConfigError(f"expected at least 1 target unit, got {target_units}")
    sampling_prob = min(1.0, target_units / units_at_most)
    return PartyConstants(sampling_prob, float(min(target_units, units_at_most)))


def weight(expected_units: float, noise_multiplier: float) -> float:
    """Weight of an organisation in the sum: ``expected_units / noise_multiplier``, or `expected_units` without noise.

    Dividing by the noise keeps the smallest organisation, which needs the most noise, from setting everybody's.
    """
    return expected_units / noise_multiplier if noise_multiplier > 0 else expected_units


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of events that were all fixed before the first release (PLD), rounded pessimistically.

    Args:
        events: In any order; equal mechanisms are merged before they are composed.
        delta: The whole delta for these events. The caller has already taken off what its noise sampler needs.

    Returns:
        An upper bound on epsilon; 0 for no events, infinity where noise is missing or below `SMALLEST_NOISE`. Where
        Rényi DP says more than a thousand its bound is returned, which is wider.

    Raises:
        ConfigError: `delta` is not strictly between 0 and 1.

    *Guarantees.* The composition of the events is (epsilon, delta)-DP under adding or removing one unit, for real
    arithmetic; what a sampler on a finite grid adds to delta is stated there. Not valid for events chosen after
    results were seen: use `epsilon_rdp` with a fixed order for those.
    """
    return _epsilon(_merged(events), _checked_delta(delta), _LOSS_STEP)


def epsilon_rdp(events: Iterable[Event], delta: float, *, order: float | None = None) -> float:
    """Epsilon of events by Rényi DP.

    Args:
        events: In any order.
        delta: As for `epsilon`.
        order: The one Rényi order to use. Without it the best order is taken.

    Returns:
        An upper bound on epsilon; 0 for no events, infinity where noise is missing or the order gives no bound.

    *Guarantees.* With an `order` fixed before the first release, refusing every event that would lift the figure above
    a cap keeps the whole, adaptively chosen sequence within (cap, delta). Without an order the figure holds only for
    events fixed beforehand: which order is best is then itself a function of earlier results.
    """
    merged = _merged(events)
    _checked_delta(delta)
    if not merged:
        return 0.0
    if merged[0].noise_multiplier < SMALLEST_NOISE:
        return math.inf
    return _rdp(merged, delta, _ORDERS if order is None else (order,))[0]


def filter_order(first: Iterable[Event], *, epsilon_cap: float, delta: float) -> float:
    """The Rényi order at which a namespace's filter judges every later charter.

    It is the best order for as many repetitions of the first charter as fit under the cap, so it is a function of what
    was fixed before anything was released, which is what the guarantee of `epsilon_rdp` asks for.
    """
    merged = _merged(first)
    _checked_delta(delta)
    if not merged or merged[0].noise_multiplier < SMALLEST_NOISE:
        raise ConfigError("expected a first charter with noise in every event, to choose the order of its filter")

    def fits(times: int) -> bool:
        return _rdp(_repeated(merged, times), delta, _ORDERS)[0] <= epsilon_cap

    times = max(1, _largest(fits, _LARGEST_STEPS))
    return _rdp(_repeated(merged, times), delta, _ORDERS)[1]


@lru_cache(maxsize=256)
def calibrate(*, epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """The smallest noise multiplier on `NOISE_GRID` whose events stay within (epsilon, delta).

    Found on a coarse privacy loss distribution, then settled on the one that `epsilon` uses.

    Raises:
        ConfigError: The budget is not positive, or cannot be met with any noise multiplier up to 10,000.
    """
    delta = _checked_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"expected a positive, finite epsilon, got {epsilon}")
    if steps < 1:
        raise ConfigError(f"expected at least 1 step, got {steps}")

    def within(ticks: int, loss_step: float = _LOSS_STEP) -> bool:
        event = Event(noise_multiplier=_on_grid(ticks), sampling_prob=sampling_prob, steps=steps)
        return _epsilon((event,), delta, loss_step) <= epsilon - _MARGIN

    start = _coarse_ticks(lambda ticks: within(ticks, _COARSE_LOSS_STEP), epsilon)
    return _on_grid(_settle(within, start))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Four quantities of which three were given and the fourth was found."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_prob: float
    steps: int


def plan(
    *,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    sampling_prob: float | None = None,
    steps: int | None = None,
) -> Plan:
    """Given any three of epsilon, noise multiplier, sampling probability and steps, find the fourth.

    Returns:
        The plan, whose `epsilon` is what its events really cost: at most the given one. `steps` is the largest number
        that fits (0 if not even one does), `sampling_prob` the largest on a grid of 1e-5, `noise_multiplier` the
        smallest on a grid of 1e-4.

    Raises:
        ConfigError: Not exactly one of the four is missing, or no value of the fourth fits.
    """
    if sum(value is None for value in (epsilon, noise_multiplier, sampling_prob, steps)) != 1:
        raise ConfigError("expected exactly three of epsilon, noise multiplier, sampling probability and steps")
    if noise_multiplier is None and epsilon is not None and sampling_prob is not None and steps is not None:
        noise_multiplier = calibrate(epsilon=epsilon, delta=delta, sampling_prob=sampling_prob, steps=steps)
    elif steps is None and epsilon is not None and noise_multiplier is not None and sampling_prob is not None:
        one = Event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=1)
        steps = _most_steps(one, epsilon, delta)
    elif sampling_prob is None and epsilon is not None and noise_multiplier is not None and steps is not None:
        always = Event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=steps)
        sampling_prob = _most_sampling(always, epsilon, delta)
    if noise_multiplier is None or sampling_prob is None or steps is None:
        raise ConfigError("expected exactly three of epsilon, noise multiplier, sampling probability and steps")
    event = Event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    return Plan(
        epsilon=_cost(event, delta),
        delta=delta,
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        steps=steps,
    )


def _checked_delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"expected delta strictly between 0 and 1, got {delta}")
    return delta


def _merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """One event for each distinct mechanism, least noise first; what never runs is left out."""
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        steps[event.noise_multiplier, event.sampling_prob] += event.steps
    return tuple(
        Event(noise_multiplier=noise, sampling_prob=prob, steps=count)
        for (noise, prob), count in sorted(steps.items())
        if count > 0
    )


def _repeated(events: tuple[Event, ...], times: int) -> tuple[Event, ...]:
    return tuple(replace(event, steps=event.steps * times) for event in events)


def _cost(event: Event, delta: float, loss_step: float = _LOSS_STEP) -> float:
    return _epsilon(_merged([event]), _checked_delta(delta), loss_step)


@lru_cache(maxsize=1024)
def _epsilon(merged: tuple[Event, ...], delta: float, loss_step: float) -> float:
    if not merged:
        return 0.0
    if merged[0].noise_multiplier < SMALLEST_NOISE:
        return math.inf
    from dp_accounting import pld

    # Whoever offers a charter chooses these numbers: the cheap bound first, and nothing that fills the memory.
    bound, _ = _rdp(merged, delta, _QUICK_ORDERS)
    if bound > _HOPELESS:
        return bound
    accountant = pld.PLDAccountant(value_discretization_interval=loss_step)
    try:
        for event in merged:
            accountant.compose(_dp_event(event), event.steps)
        return float(accountant.get_epsilon(delta))
    except _OUT_OF_REACH:
        return math.inf


def _rdp(merged: tuple[Event, ...], delta: float, orders: tuple[float, ...]) -> tuple[float, float]:
    """Epsilon by RDP, and the order that gave it; infinity where no order can be computed."""
    from dp_accounting import rdp

    try:
        with _unconverged_orders_unsaid():
            accountant = rdp.RdpAccountant(orders=list(orders))
            for event in merged:
                accountant.compose(_dp_event(event), event.steps)
            found, order = accountant.get_epsilon_and_optimal_order(delta)
    except _OUT_OF_REACH:
        return math.inf, orders[0]
    return float(found), float(order)


def _dp_event(event: Event) -> dp_accounting.DpEvent:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    return dp_accounting.PoissonSampledDpEvent(event.sampling_prob, gaussian)


@contextmanager
def _unconverged_orders_unsaid() -> Iterator[None]:
    """Keep the library's warning about a fractional order that it leaves out (which only raises epsilon) off stderr."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "failed to converge" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _on_grid(ticks: int) -> float:
    """A multiple of `NOISE_GRID` as the float nearest to its decimal."""
    return round(ticks * NOISE_GRID, 4)


def _coarse_ticks(within: Callable[[int], bool], epsilon: float) -> int:
    """The smallest passing tick count, by bisection from a doubling bracket."""
    low = round(SMALLEST_NOISE / NOISE_GRID) - 1
    high = 2 * low
    while not within(high):
        low, high = high, 2 * high
        if _on_grid(high) > _LARGEST_NOISE:
            raise ConfigError(f"expected a budget that some noise can meet, got epsilon {epsilon}: raise it")
    return _bisect(within, low, high)


def _settle(within: Callable[[int], bool], start: int) -> int:
    """The smallest passing tick count near `start`, where the coarse search ended."""
    stride = 1
    if within(start):
        low = start - 1
        while within(low):
            stride *= 2
            start, low = low, max(low - stride, 0)
        return _bisect(within, low, start)
    high = start + 1
    while not within(high):
        stride *= 2
        start, high = high, high + stride
    return _bisect(within, start, high)


def _bisect(within: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest passing integer, given that `low` fails and `high` passes."""
    while high - low > 1:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle
    return high


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest integer from 1 to `limit` that fits, or 0; fitting must be monotone."""
    if not fits(1):
        return 0
    high = 2
    while high < limit and fits(high):
        high *= 2
    beyond = high if high < limit else limit + 1
    return _bisect(lambda count: count > limit or not fits(count), high // 2, beyond) - 1


def _most_steps(one: Event, epsilon: float, delta: float) -> int:
    return _largest(lambda count: _cost(replace(one, steps=count), delta) <= epsilon, _LARGEST_STEPS)


def _most_sampling(always: Event, epsilon: float, delta: float) -> float:
    whole = round(1 / SAMPLING_GRID)
    ticks = _largest(lambda n: _cost(replace(always, sampling_prob=n / whole), delta) <= epsilon, whole)
    if ticks == 0:
        raise ConfigError(f"expected a budget that some sampling meets, got epsilon {epsilon}: raise noise or epsilon")
    return ticks / whole
