"""Closed rounds replayed the plain way, whole sums in memory: what the packages' own replays must equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from foedus_protocols.codec import Coding
from foedus_protocols.layout import Vector
from foedus_protocols.rules import Rule, State, advance, initial_state, mean_of_sum
from numpy.typing import NDArray
from support.coded import decode_sum


@dataclass(frozen=True, kw_only=True)
class RoundSum:
    """One closed round, as `replay` needs it.

    Attributes:
        words: The published sum.  # int64 (padded,)
        weights: ``w_i / max w`` of the survivors.
        key: The round's coding key.
    """

    words: NDArray[np.int64]
    weights: Sequence[float]
    key: bytes


def replay(
    adapter: Vector, rounds: Iterable[RoundSum], *, coding: Coding, rule: Rule, state: State | None = None
) -> tuple[Vector, State]:
    """Advance an adapter through closed rounds, oldest first: the plain reading of what every party does.

    `rounds` may be a generator, so that only one sum is in memory. Without a `state` the run starts at its beginning.
    """
    state = state or initial_state(rule, adapter.size)
    for closed in rounds:
        decoded = decode_sum(closed.words, coding=coding, key=closed.key)
        adapter, state = advance(adapter, mean_of_sum(decoded, closed.weights), rule=rule, state=state)
    return adapter, state
