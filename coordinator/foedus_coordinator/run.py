"""What the steps of a run stand on: its terms, its files, its messages, and waiting that a shutdown can interrupt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from foedus_protocols.charter import Charter
from foedus_protocols.errors import RoundFailed
from foedus_protocols.messages import Body, History
from foedus_protocols.store import FileStore

from foedus_coordinator import figures
from foedus_coordinator.chain import Chain, closed_rounds
from foedus_coordinator.grid import LinkGrid
from foedus_coordinator.mailbox import Mailbox
from foedus_coordinator.presence import Presence
from foedus_coordinator.storage import Storage

Outcome = Literal["complete", "failed", "refused", "stopped"]
Answer = TypeVar("Answer", bound=Body)
_HEED_SECONDS = 0.25
_POLL_SECONDS = 1.0  # How long a change by another process, or a shutdown, may go unnoticed.


class Interrupted(Exception):
    """The coordinator is shutting down; the run goes on when it is started again."""


class RunEnded(Exception):
    """The run cannot go on; it is closed with this outcome."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome: Outcome = outcome
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run and what its steps reach for.

    Attributes:
        files: What organisations pull: charter, agreement, histories, sums.
        vectors: What organisations pushed; nobody pulls from it.
        presence: Who is there to be waited for.
        stop: Set when the coordinator shuts down.
        say: Takes one line of progress.
        write_variant: Writes the result and returns its folder (`variant.py`).
        alive: Called whenever the run has got as far as to wait for somebody: whatever troubled it is over.
        clock: Unix seconds.
    """

    id: str
    charter: Charter
    storage: Storage
    mailbox: Mailbox
    grid: LinkGrid
    files: FileStore
    vectors: FileStore
    presence: Presence
    stop: threading.Event
    say: Callable[[str], None]
    write_variant: Callable[[Run, Chain], Path]
    alive: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.time

    @property
    def orgs(self) -> list[str]:
        """The participants, in ascending order."""
        return sorted(participant.id for participant in self.charter.participants)

    def ask(self, kind: str, bodies: Mapping[str, Body], *, round: int = 0, attempt: int = 0) -> dict[str, str]:
        """Queue one message for each organisation, durably; returns their ids by organisation."""
        messages = [self.grid.message(org, kind, body, round=round, attempt=attempt) for org, body in bodies.items()]
        return dict(zip(bodies, self.grid.push_messages(messages), strict=True))

    def answers(self, ids: Mapping[str, str], kind: type[Answer]) -> dict[str, Answer]:
        """The answers that have come to these messages, by organisation."""
        replies = self.grid.pull_messages(ids.values())
        return {self.grid.sender(reply): kind.decode(self.grid.body(reply)) for reply in replies}

    def wait(self, done: Callable[[], bool], deadline: float, *, heeding: bool = False) -> bool:
        """Wait until `done` or the deadline; returns whether it was done.

        A clock that is set back meanwhile does not prolong the wait.

        Args:
            done: Looked at after every commit, and every second.
            deadline: Unix seconds.
            heeding: Whether a wish to stop the run ends the wait, as `heed` does.

        Raises:
            Interrupted: The coordinator shuts down.
            RunEnded: Only where `heeding`.
        """
        ends = time.monotonic() + deadline - self.clock()
        heed_at = 0.0
        while True:
            since = self.storage.generation
            if self.stop.is_set():
                raise Interrupted(self.id)
            self.presence.look()
            self.alive()
            if heeding and time.monotonic() >= heed_at:
                # Every commit of every organisation wakes this loop; a wish has time until the next look.
                heed_at = time.monotonic() + _HEED_SECONDS
                self.heed()
            if done():
                return True
            left = min(deadline - self.clock(), ends - time.monotonic())
            if left <= 0:
                return False
            self.storage.wait(min(left, _POLL_SECONDS), since=since)

    def all_here(self, answered: Collection[str], among: Collection[str]) -> bool:
        """Whether everybody among these has answered, those left out who are away or no members any more."""
        open_ = set(among) - set(answered)
        return not open_ or not open_ & self.presence.here()

    def heed(self) -> None:
        """Look whether the run is to end before its time.

        Raises:
            RunEnded: Somebody asked for that, or a participant is no member any more.
        """
        row = self.storage.run(self.id)
        if row.wish == "stop":
            raise RunEnded("stopped", row.wish_reason or "the run was stopped")
        if gone := self.presence.gone():
            raise RunEnded(
                "stopped", f"no longer a member of the federation under the charter's key: {', '.join(gone)}"
            )

    def publish(self, body: Body) -> str:
        """Put a file where the participants may pull it; returns its digest."""
        digest = self.files.put_bytes(body.encode())
        self.allow(digest)
        return digest

    def allow(self, digest: str) -> None:
        """Let the participants pull a file that is in the store."""
        with self.storage.write() as connection:
            figures.publish(connection, digest, self.id)

    def agreement(self) -> str:
        """Digest of the file with everyone's signatures.

        Raises:
            RoundFailed: Not everybody has signed yet.
        """
        digest = self.storage.run(self.id).agreement_digest
        if digest is None:
            raise RoundFailed(f"expected the agreement of {self.id} to be on disk before its first round, it is not")
        return digest

    def history(self) -> History:
        """The rounds that lead to the newest adapter, the one that was just advanced included."""
        rows = self.storage.rounds(self.id)
        return History(charter_digest=self.charter.digest, rounds=closed_rounds(rows, states=("advanced", "closed")))

    def chain(self, closed: int | None = None) -> Chain:
        """Replay the closed rounds, all of them or only the first `closed`.

        Raises:
            StateError: The files on disk give another adapter than the one that was announced.
        """
        base_config = self.storage.run(self.id).base_config
        chain = Chain(self.charter, run=self.id, files=self.files, base_config=base_config)
        chain.follow(closed_rounds(self.storage.rounds(self.id))[:closed])
        return chain

    @contextmanager
    def timed(self, number: int, phase: str) -> Iterator[None]:
        """Add what the block takes to the round's seconds in this phase."""
        begun = time.monotonic()
        try:
            yield
        finally:
            with self.storage.write() as connection:
                figures.add_seconds(connection, self.id, number, phase, time.monotonic() - begun)
