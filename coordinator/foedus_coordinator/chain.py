"""From the sums of closed rounds to the adapter: what the coordinator computes, and every organisation again.

Nothing is kept between restarts but the sums: replaying them gives the optimiser's state and the adapter bit for bit,
which is also how an organisation that was away catches up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from foedus_protocols import codec, rules
from foedus_protocols.canonical import digest
from foedus_protocols.charter import Charter
from foedus_protocols.errors import StateError
from foedus_protocols.store import FileStore

PHASE = "train"
"""The phase in the coding key of a round's vectors."""


class Chain:
    """Where a run stands after some closed rounds: the adapter, its digest, and the optimiser's state."""

    def __init__(self, charter: Charter, *, run: str, files: FileStore) -> None:
        self._charter = charter
        self._run = run
        self._files = files
        self.closed = 0
        self.adapter: npt.NDArray[np.float32] = np.zeros(charter.adapter.length, dtype=np.float32)  # (d,)
        self._state = rules.initial_state(charter.rule(), charter.adapter.length)
        if self.digest != charter.adapter.initial_digest:
            raise StateError(
                f"expected the charter to start from the adapter {self.digest[:16]}, it names "
                f"{charter.adapter.initial_digest[:16]}; draft it again with this version"
            )

    @property
    def digest(self) -> str:
        """Digest of the adapter's file: raw little-endian float32."""
        return digest(self.adapter.astype("<f4", copy=False).tobytes())

    def advance(self, *, number: int, survivors: Sequence[str], sum_digest: str) -> str:
        """Apply one closed round; the survivors are in the history's order.

        Returns:
            The digest of the adapter that follows.
        """
        coding = self._charter.coding()
        key = codec.coding_key(self._charter.digest, self._run, number, PHASE)
        words = codec.read_packed(self._files.path(sum_digest), coding)
        total = codec.decode_sum(words, coding=coding, key=key)  # (d,)
        mean = rules.mean_of_sum(total, [self._charter.relative_weight(org) for org in survivors])
        self.adapter, self._state = rules.advance(self.adapter, mean, rule=self._charter.rule(), state=self._state)
        self.closed += 1
        return self.digest
