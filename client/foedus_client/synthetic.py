"""Records and units of random tokens, which the checks before round 1 run on in place of real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foedus_client.noise import RandomBytes


@dataclass(frozen=True, kw_only=True)
class SyntheticRecord:
    """Random tokens; the second half are answers."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SyntheticUnit:
    """A unit of synthetic records."""

    records: list[SyntheticRecord]


def synthetic_record(vocabulary: int, length: int, rng: RandomBytes) -> SyntheticRecord:
    """`length` tokens below `vocabulary`, made of `rng`."""
    words = np.frombuffer(rng(8 * length), "<u8") % np.uint64(vocabulary)
    return SyntheticRecord(tokens=words.astype(np.int32), loss_mask=np.arange(length) >= length // 2)


def synthetic_units(*, vocabulary: int, max_tokens: int, max_records: int, rng: RandomBytes) -> list[SyntheticUnit]:
    """Four units of unlike size, from as large as a unit may be down to a record of eight tokens."""
    half, quarter = max(8, max_tokens // 2), max(8, max_tokens // 4)
    shapes = [[max_tokens] * max_records, [quarter], [half] * min(2, max_records), [8]]
    return [
        SyntheticUnit(records=[synthetic_record(vocabulary, length, rng) for length in lengths]) for lengths in shapes
    ]
