"""Intervals by the bootstrap over privacy units (Efron and Tibshirani 1993, chapter 13).

Records of one unit (a patient, a judgment) are alike, so whole units are drawn again, not records: intervals over
records would be too narrow. Every statistic here is a ratio of two sums over units (nats over tokens, right answers
over questions). Two models are compared on the same draws, which leaves the units' own difficulty out of the
difference. With few units the interval is too narrow itself; the number of units therefore stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
_CHUNK = 256  # Draws at a time: a table of draws x units must not fill the memory.


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are None where there are fewer than two units."""

    value: float
    low: float | None
    high: float | None


def ratio(
    above: NDArray[np.float64],
    below: NDArray[np.float64],
    *,
    minus: NDArray[np.float64] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate | None:
    """The sum of `above` over the sum of `below`, with a percentile interval; None where `below` sums to nothing.

    Args:
        above: By unit.  # (U,)
        below: By unit, at least 0.  # (U,)
        minus: By unit, the `above` of another model: the difference of the two ratios is estimated.  # (U,)
        seed: Of the draws, so that a table can be made again.
        draws: How many.
    """
    taken = below > 0
    top, bottom = (above - (0.0 if minus is None else minus))[taken], below[taken]
    if not bottom.size:
        return None
    value = float(top.sum() / bottom.sum())
    if bottom.size < 2:
        return Estimate(value=value, low=None, high=None)
    source = np.random.default_rng(seed)
    units = bottom.size
    ratios = []
    for start in range(0, draws, _CHUNK):
        counts = source.multinomial(units, np.full(units, 1.0 / units), size=min(_CHUNK, draws - start))  # (draws, U)
        ratios.append((counts @ top) / (counts @ bottom))
    tail = 100.0 * (1.0 - LEVEL) / 2.0
    low, high = np.percentile(np.concatenate(ratios), [tail, 100.0 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
