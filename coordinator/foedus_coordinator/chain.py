"""From the sums of closed rounds to the adapter: what the coordinator computes, and every organisation again.

Nothing is kept between restarts but the sums: replaying them gives the optimiser's state and the adapter bit for bit,
which is also how an organisation that was away catches up. An extension begins where the run that it extends ended, and
finds that run's charter, history and sums among the same files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from foedus_protocols import codec, rules
from foedus_protocols.canonical import digest
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter
from foedus_protocols.errors import StateError
from foedus_protocols.messages import MAX_HISTORY_BYTES, ClosedRound, History
from foedus_protocols.store import FileStore

from foedus_coordinator.storage import RoundRow, RoundState

_CLOSED: tuple[RoundState, ...] = ("closed",)


class Chain:
    """Where a run stands after some closed rounds: the adapter, its digest, and the optimiser's state.

    Attributes:
        adapter: Overwritten by the next round.  # (d,)
        digest: Of the adapter's file: raw little-endian float32.
    """

    def __init__(self, charter: Charter, *, run: str, files: FileStore, base_config: bytes) -> None:
        """Stand before round 1, or where the run that is extended ended.

        Args:
            charter: The run's terms.
            run: Its id, part of the coding keys.
            files: Has the sums, and the charters and histories of the ended runs.
            base_config: The base's ``config.json``; an A that trains starts from the layout that it gives.

        Raises:
            StateError: The charter starts from another adapter.
        """
        self._charter = charter
        self._run = run
        self._files = files
        self.closed = 0
        self.adapter: npt.NDArray[np.float32]  # (d,)
        self._state: rules.State
        if charter.extends is not None:
            ended = Chain(_ended(charter, files), run=charter.extends.run, files=files, base_config=base_config)
            ended.follow(History.decode(files.read(charter.extends.history, max_bytes=MAX_HISTORY_BYTES)).rounds)
            self.adapter, self._state = ended.adapter, ended._state
        else:
            self.adapter = charter.adapter.start(lambda: json.loads(base_config))
            self._state = rules.initial_state(charter.rule(), charter.adapter.length)
        self.digest = _digest(self.adapter)
        if self.digest != charter.adapter.initial_digest:
            raise StateError(
                f"expected the charter to start from the adapter {self.digest[:16]}, it names "
                f"{charter.adapter.initial_digest[:16]}; draft it again with this version"
            )

    def follow(self, rounds: Iterable[ClosedRound]) -> None:
        """Apply the closed rounds of a history.

        Raises:
            StateError: The files give another adapter than was announced after one of them.
        """
        for entry in rounds:
            found = self.advance(number=entry.round, survivors=entry.survivors, sum_digest=entry.sum_digest)
            if found != entry.adapter_digest:
                raise StateError(
                    f"expected the adapter {entry.adapter_digest[:16]} after round {entry.round} of {self._run}, its "
                    f"sums give {found[:16]}; restore the coordinator's files, or use the version that wrote them"
                )

    def advance(self, *, number: int, survivors: Sequence[str], sum_digest: str) -> str:
        """Apply one closed round; the survivors are in the history's order.

        Returns:
            The digest of the adapter that follows.
        """
        coding = self._charter.coding()
        key = self._charter.coding_key(self._run, number)
        mean = rules.mean_of_sum(
            codec.decode_file(self._files.path(sum_digest), coding=coding, key=key),
            [self._charter.relative_weight(org) for org in survivors],
        )  # (d,)
        self.adapter, self._state = rules.advance(
            self.adapter, mean, rule=self._charter.rule(), state=self._state, in_place=True
        )
        self.closed += 1
        self.digest = _digest(self.adapter)
        return self.digest


def closed_rounds(rows: Iterable[RoundRow], *, states: Collection[RoundState] = _CLOSED) -> list[ClosedRound]:
    """The entries of a run's history: its rounds in these states, oldest first."""
    return [
        ClosedRound(
            round=row.number,
            attempt=row.attempt,
            survivors=list(row.survivors),
            sum_digest=row.sum_digest,
            adapter_digest=row.adapter_digest,
        )
        for row in rows
        if row.state in states and row.sum_digest is not None and row.adapter_digest is not None
    ]


def first_charter(charter: Charter, files: FileStore) -> Charter:
    """The charter at the beginning of a chain of extensions: this one where it extends nothing."""
    while charter.extends is not None:
        charter = _ended(charter, files)
    return charter


def _ended(charter: Charter, files: FileStore) -> Charter:
    """The charter of the run that this one extends."""
    if charter.extends is None:
        raise StateError(f"expected an extension, charter {charter.digest[:16]} extends nothing")
    return Charter.parse(files.read(charter.extends.charter, max_bytes=MAX_CHARTER_BYTES))


def _digest(adapter: npt.NDArray[np.float32]) -> str:
    return digest(adapter.astype("<f4", copy=False).tobytes())
