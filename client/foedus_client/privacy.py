"""Sample, clip, sum: the part of the private step that touches what came from a record.

One unit's gradient is clipped by its norm, rounded to a grid, and measured again in integers; the integers are summed.
So the sum's sensitivity to one unit is exactly `l2_clip_norm`, whatever floating point does, and the sum is the same in
any order and on any number of devices. `noise.py` adds integers to it. Everything here is a pure function of its
arguments and of a source of random bytes that is passed in. The specification is `docs/privacy.md`, "The mechanism".

Left out: clipping layer by layer, and sums of units inside one floating-point product.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.errors import ConfigError
from numpy.typing import NDArray

from foedus_client.noise import MIN_STDDEV, RandomBytes

_UNITS_A_COORDINATE = 8  # Of a flat gradient of full norm: rounding then keeps a cosine of 0.9994.
_FINER_WITHOUT_NOISE = 1024  # Without noise the grid costs nothing: no table has to span it.
_MOST_GRID_UNITS = 1 << 30  # l2_clip_norm in grid units; its square fits an int64 with room for rounding.
_TARGET_MARGIN = 1.0 - 1e-4
_REPEAT_FACTOR = 1.0 - 2.0**-10


@dataclass(frozen=True, kw_only=True)
class StepTerms:
    """The privacy settings of one organisation's step: constants of the charter, never functions of the data.

    Attributes:
        l2_clip_norm: Bound on one unit's gradient.
        noise_multiplier: Standard deviation of the noise over `l2_clip_norm`; 0 in mode `none`.
        sampling_prob: Poisson probability with which a unit takes part in a step.
        expected_units: The constant that the sum is divided by.
        max_records_per_unit: Records of one unit that enter its loss, at most.
    """

    l2_clip_norm: float
    noise_multiplier: float
    sampling_prob: float
    expected_units: float
    max_records_per_unit: int

    def __post_init__(self) -> None:
        for name in ("l2_clip_norm", "expected_units"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"expected {name} above 0 and finite, got {getattr(self, name)}: correct the charter")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"expected noise_multiplier of 0 or more, got {self.noise_multiplier}: correct the charter"
            )
        if not 0.0 < self.sampling_prob <= 1.0:
            raise ConfigError(f"expected sampling_prob in (0, 1], got {self.sampling_prob}: correct the charter")
        if self.max_records_per_unit < 1:
            raise ConfigError(f"expected max_records_per_unit of 1 or more, got {self.max_records_per_unit}")

    @property
    def private(self) -> bool:
        """Whether the step is noised."""
        return self.noise_multiplier > 0.0

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise, rounded up, so that no float takes from what the accountant was told."""
        return math.nextafter(self.noise_multiplier * self.l2_clip_norm, math.inf) if self.private else 0.0


@dataclass(frozen=True, kw_only=True)
class ClippedUnit:
    """One unit's gradient on the grid, with its bound.

    Attributes:
        values: In grid units.  # int64 (d,)
        grid: What one grid unit is worth.
        l2_bound: The norm of values x grid is at most this.
        scale: The factor that clipping applied, 1 where the gradient was short enough; 0 where it was not finite.
    """

    values: NDArray[np.int64]
    grid: float
    l2_bound: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class BoundedSum:
    """A sum of clipped units, with its sensitivity.

    Attributes:
        values: In grid units.  # int64 (d,)
        grid: What one grid unit is worth.
        l2_sensitivity: Adding or removing one unit moves values x grid by at most this, in the Euclidean norm.
    """

    values: NDArray[np.int64]
    grid: float
    l2_sensitivity: float


def grid(noise_stddev: float, l2_clip_norm: float, length: int) -> float:
    """The grid that gradients are rounded to: a power of two.

    The first term gives the noise at least 1,024 grid points a standard deviation. The second gives a long, flat
    gradient at least 8 grid units a coordinate: without it, at 4.6 million coordinates, rounding erases the gradient's
    direction, nothing fails, and the run trains on noise.

    Args:
        noise_stddev: Absolute; 0 where there is no noise.
        l2_clip_norm: Bound on one unit's gradient.
        length: Coordinates of the gradient.

    Raises:
        ConfigError: The clip would be more than 2^30 grid units.
    """
    flat = l2_clip_norm / (_UNITS_A_COORDINATE * math.sqrt(length))
    largest = min(noise_stddev / MIN_STDDEV, flat) if noise_stddev > 0.0 else flat / _FINER_WITHOUT_NOISE
    _, exponent = math.frexp(largest)
    step = math.ldexp(1.0, exponent - 1)
    if not l2_clip_norm < step * _MOST_GRID_UNITS:
        raise ConfigError(
            f"expected a clip of fewer than 2^30 grid units, got {l2_clip_norm} over {step}: "
            "raise the noise multiplier or train fewer parameters"
        )
    return step


def squared_limit(l2_clip_norm: float, step: float) -> int:
    """The largest squared norm in grid units that the clip allows: floor((l2_clip_norm / grid)^2), without a float."""
    return math.floor((Fraction(l2_clip_norm) / Fraction(step)) ** 2)


def clip_to_grid(gradient: NDArray[np.float32], *, l2_clip_norm: float, step: float) -> ClippedUnit:
    """Clip one unit's gradient and round it to the grid.

    Rounding adds about d grid^2 / 12 to the squared norm, so the scaled gradient aims below the clip by that much.
    Should the integers still be too long, it is scaled once more, and then cut towards zero, which lengthens nothing.

    Args:
        gradient: float32 (d,).
        l2_clip_norm: The bound.
        step: The grid, a power of two (`grid`).

    Returns:
        The unit in grid units with its bound. A gradient with an infinity or a NaN counts as zero.

    Guarantees:
        For every input, the Euclidean norm of values x grid is at most `l2_clip_norm`: integers are compared. Hence
        adding or removing one unit (the neighbouring relation) moves a sum of units by at most `l2_clip_norm`.
        No input raises, and none changes what happens to another unit.
    """
    length = gradient.size
    limit = squared_limit(l2_clip_norm, step)
    zero = ClippedUnit(values=np.zeros(length, np.int64), grid=step, l2_bound=l2_clip_norm, scale=0.0)
    if not np.isfinite(gradient).all():
        return zero
    exact = gradient.astype(np.float64)  # (d,)
    norm = math.sqrt(float(np.dot(exact, exact)))
    target = _target(l2_clip_norm, step, length)
    scale = min(1.0, target / norm) if norm > 0.0 else 1.0
    for factor, rounding in ((1.0, np.rint), (_REPEAT_FACTOR, np.rint), (1.0, np.trunc)):
        values = rounding(exact * (scale * factor / step)).astype(np.int64)
        if int(np.dot(values, values)) <= limit:
            return ClippedUnit(values=values, grid=step, l2_bound=l2_clip_norm, scale=scale * factor)
    return zero


def _target(l2_clip_norm: float, step: float, length: int) -> float:
    rounding = length * step**2 / (12.0 * l2_clip_norm**2)
    if rounding >= 1.0:
        raise ConfigError(f"expected a grid far below the clip {l2_clip_norm}, got {step} for {length} coordinates")
    return l2_clip_norm * math.sqrt(1.0 - rounding) * _TARGET_MARGIN


@dataclass(kw_only=True)
class UnitSum:
    """Adds up clipped units in int64, and keeps the sensitivity with the sum.

    Guarantees:
        `total` moves by at most `l2_clip_norm` when one unit is added or removed (add/remove adjacency), exactly, for
        fewer than 2^32 units: each added unit is checked to be on this grid and under this bound.
    """

    length: int
    l2_clip_norm: float
    step: float
    _values: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._values = np.zeros(self.length, np.int64)

    def add(self, unit: ClippedUnit) -> None:
        """Add one unit.

        Raises:
            ConfigError: It lies on another grid, has another length, or carries a larger bound.
        """
        if unit.grid != self.step or unit.values.shape != (self.length,) or unit.l2_bound > self.l2_clip_norm:
            raise ConfigError(
                f"expected a unit of {self.length} coordinates on the grid {self.step} bounded by {self.l2_clip_norm}, "
                f"got {unit.values.size} on {unit.grid} bounded by {unit.l2_bound}: clip it with the same terms"
            )
        self._values += unit.values

    def total(self) -> BoundedSum:
        """The sum so far."""
        return BoundedSum(values=self._values.copy(), grid=self.step, l2_sensitivity=self.l2_clip_norm)


def release_vector(
    values: NDArray[np.int64], *, step: float, l2_clip_norm: float, expected_units: float
) -> NDArray[np.float32]:
    """The organisation's vector: sum / (l2_clip_norm x expected_units), both constants of the charter.

    Post-processing of the noised sum. The size of the sample is not an argument, so it cannot enter.  # float32 (d,)
    """
    return (values.astype(np.float64) * (step / (l2_clip_norm * expected_units))).astype(np.float32)


def poisson_sample(count: int, sampling_prob: float, random_bytes: RandomBytes) -> NDArray[np.intp]:
    """Which of `count` units take part in a step: each independently, with `sampling_prob`.

    Guarantees:
        A unit's probability is `sampling_prob`, rounded down to a multiple of 2^-64, given uniform bytes; it does not
        depend on the number of units. The sample may be empty. Fresh bytes are taken on every call.
    """
    threshold = math.floor(Fraction(sampling_prob) * 2**64)
    if threshold >= 2**64:
        return np.arange(count)
    words = np.frombuffer(random_bytes(8 * count), "<u8")
    return np.flatnonzero(words < np.uint64(threshold))


def choose_records(count: int, at_most: int, random_bytes: RandomBytes) -> Sequence[int]:
    """Which of a unit's records enter its loss: all, or `at_most` of them chosen uniformly, in their order."""
    if count <= at_most:
        return range(count)
    keys = np.frombuffer(random_bytes(8 * count), "<u8")
    return [int(index) for index in np.sort(np.argsort(keys, kind="stable")[:at_most])]


class SeededBytes:
    """Bytes that are a function of (seed, organisation, round, step), for mode `none` only.

    A re-run after a kill draws the same bytes, since nothing depends on a generator's history. A private step refuses
    this source.
    """

    def __init__(self, *, seed: int, org: str, round_number: int, step: int = 1) -> None:
        self._key = hashlib.sha256(canonical_bytes(["foedus/open-draws/1", seed, org, round_number, step])).digest()
        self._calls = 0

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes: SHAKE-256 of the key and the number of the call."""
        self._calls += 1
        return hashlib.shake_256(self._key + self._calls.to_bytes(8, "big")).digest(count)
