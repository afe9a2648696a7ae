"""The coordinator's database: how far every run is, durable before anyone is told.

SQLite in WAL mode with ``synchronous=FULL``; any other SQLAlchemy URL works through the same calls. A write is one
transaction that takes the lock at its start (``BEGIN IMMEDIATE``), so that "is the round still open? then this vector
is in it" is decided once. What is sent and who is a member live next door (`mailbox.py`, `members.py`), and so does
what the card is made of (`figures.py`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from foedus_protocols.errors import StateError
from sqlalchemy import Connection, Engine, Row, func, select

from foedus_coordinator.database import open_engine
from foedus_coordinator.figures import count_bytes, publish
from foedus_coordinator.tables import participants, rounds, runs, vectors

RunState = Literal["agreeing", "running", "closing", "finished"]
RoundState = Literal["offered", "frozen", "summed", "advanced", "closed", "failed"]
Verdict = Literal["included", "late"]
Wish = Literal["pause", "stop"]


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run. `state` says how far it is, `outcome` (see `messages.CloseNotice`) how it ended."""

    id: str
    charter_digest: str
    operator_signature: str
    base_config: bytes
    agreement_digest: str | None
    state: RunState
    outcome: Literal["complete", "failed", "refused", "stopped"] | None
    reason: str | None
    variant: str | None
    created: float
    finished: float | None
    wish: Wish | None
    wish_reason: str | None
    extends: str | None
    released_after: int | None


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round of a run; the digests are filled in as its steps are done."""

    run: str
    number: int
    state: RoundState
    attempt: int
    deadline: float
    start_digest: str
    history_digest: str
    survivors: tuple[str, ...]
    sum_digest: str | None
    adapter_digest: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class VectorRow:
    """One organisation's vector in one round, and the receipt that it was given."""

    run: str
    round: int
    org: str
    digest: str
    size: int
    verdict: Verdict
    receipt: bytes
    erased: int
    number: int | None


class Storage:
    """The database of one coordinator. Safe to use from many threads and, for SQLite, from several processes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._generation = 0

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    # Transactions and waiting

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state and changes nothing."""
        with self.engine.connect().execution_options(foedus_read=True) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its first statement; waiters wake when it has been committed."""
        with self.engine.begin() as connection:
            yield connection
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    @property
    def generation(self) -> int:
        """Counts this process's commits; hand it to `wait` to miss none."""
        return self._generation

    def wait(self, seconds: float, *, since: int) -> None:
        """Sleep until this process has committed something after `since`, or `seconds` are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._generation != since, timeout=max(0.0, seconds))

    # Runs

    def add_run(
        self,
        run: str,
        *,
        charter_digest: str,
        operator_signature: str,
        base_config: bytes,
        orgs: list[str],
        files: list[str],
        extends: str | None = None,
    ) -> None:
        """Start a run, perhaps one that goes on from an ended one: from here on the executor finds it.

        Raises:
            StateError: A run of this name, and so of this charter, exists.
        """
        with self.write() as connection:
            if connection.execute(select(runs.c.id).where(runs.c.id == run)).first():
                raise StateError(f"expected a new run, but {run} exists; see `foedus coordinator run show {run}`")
            connection.execute(
                runs.insert().values(
                    id=run,
                    charter_digest=charter_digest,
                    operator_signature=operator_signature,
                    base_config=base_config,
                    state="agreeing",
                    created=time.time(),
                    extends=extends,
                )
            )
            connection.execute(participants.insert(), [{"run": run, "org": org} for org in orgs])
            for digest in files:
                publish(connection, digest, run)

    def run(self, run: str) -> RunRow:
        """One run.

        Raises:
            StateError: There is no such run.
        """
        with self.read() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run)).first()
        if row is None:
            raise _no_run(run)
        return RunRow(**row._mapping)

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        with self.read() as connection:
            return [RunRow(**row._mapping) for row in connection.execute(select(runs).order_by(runs.c.created))]

    def update_run(self, run: str, **values: Any) -> None:
        """Write some columns of a run."""
        with self.write() as connection:
            connection.execute(runs.update().where(runs.c.id == run).values(**values))

    def wish(self, run: str, wish: Wish | None, reason: str | None = None) -> bool:
        """Ask the run's thread, in whatever process it is, to hold the run up, to end it, or (None) to go on.

        It is durable, and stands until it is taken back or the run has ended. Asking again changes nothing. A run that
        is ending by itself needs no stop.

        Args:
            run: The run.
            wish: `pause` opens no further round; `stop` ends the open one as well.
            reason: Why, for people: it becomes the reason of the run's end.

        Returns:
            Whether this changed anything.

        Raises:
            StateError: There is no such run, it has ended, or it was stopped and so cannot be paused or resumed.
        """
        with self.write() as connection:
            row = connection.execute(select(runs.c.state, runs.c.wish, runs.c.outcome).where(runs.c.id == run)).first()
            if row is None:
                raise _no_run(run)
            if row.state == "finished":
                raise StateError(f"expected a run that goes on, but {run} has ended ({row.outcome})")
            if wish != "stop" and (row.wish == "stop" or row.state == "closing"):
                raise StateError(f"expected a run that goes on, but {run} is ending; what has ended can be extended")
            if row.wish == wish or row.state == "closing":
                return False
            connection.execute(runs.update().where(runs.c.id == run).values(wish=wish, wish_reason=reason))
            return True

    def record_signature(self, run: str, org: str, *, signature: str | None, refused_step: int | None) -> None:
        """Keep an organisation's answer to the charter."""
        with self.write() as connection:
            connection.execute(
                participants.update()
                .where(participants.c.run == run, participants.c.org == org)
                .values(signature=signature, refused_step=refused_step)
            )

    def signatures(self, run: str) -> dict[str, tuple[str | None, int | None]]:
        """For each participant: its signature, or the step that it refused at, or neither yet."""
        with self.read() as connection:
            rows = connection.execute(select(participants).where(participants.c.run == run))
            return {row.org: (row.signature, row.refused_step) for row in rows}

    # Rounds

    def add_round(self, run: str, number: int, *, deadline: float, start_digest: str, history_digest: str) -> None:
        """Open a round, or do nothing where it is open already."""
        with self.write() as connection:
            at = (rounds.c.run == run, rounds.c.number == number)
            if connection.execute(select(rounds.c.number).where(*at)).first() is None:
                connection.execute(
                    rounds.insert().values(
                        run=run,
                        number=number,
                        state="offered",
                        attempt=1,
                        deadline=deadline,
                        start_digest=start_digest,
                        history_digest=history_digest,
                    )
                )

    def rounds(self, run: str) -> list[RoundRow]:
        """The rounds of a run, in order."""
        with self.read() as connection:
            found = connection.execute(select(rounds).where(rounds.c.run == run).order_by(rounds.c.number))
            return [_round(row) for row in found]

    def round(self, run: str, number: int) -> RoundRow:
        """One round.

        Raises:
            StateError: It was never opened.
        """
        with self.read() as connection:
            row = connection.execute(select(rounds).where(rounds.c.run == run, rounds.c.number == number)).first()
        if row is None:
            raise StateError(f"expected an open round, but round {number} of run {run!r} was never offered")
        return _round(row)

    def update_round(self, run: str, number: int, **values: Any) -> None:
        """Write some columns of a round."""
        with self.write() as connection:
            connection.execute(rounds.update().where(rounds.c.run == run, rounds.c.number == number).values(**values))

    def freeze(self, run: str, number: int, *, at_least: int, short: str | None) -> bool:
        """Fix whose vectors are in the round, once: later ones are late.

        Args:
            run: The run.
            number: The round.
            at_least: How many vectors the charter asks for.
            short: Where fewer came, fail the round for this reason; None leaves it open.

        Returns:
            Whether the round is past collecting, frozen or failed.
        """
        at = (rounds.c.run == run, rounds.c.number == number)
        with self.write() as connection:
            if connection.execute(select(rounds.c.state).where(*at)).scalar_one() != "offered":
                return True
            included = select(vectors.c.org).where(
                vectors.c.run == run, vectors.c.round == number, vectors.c.verdict == "included"
            )
            survivors = sorted(connection.execute(included).scalars())
            if len(survivors) >= at_least:
                values = {"state": "frozen", "survivors": json.dumps(survivors)}
            elif short is not None:
                values = {"state": "failed", "reason": short}
            else:
                return False
            connection.execute(rounds.update().where(*at).values(**values))
        return True

    # Vectors

    def require_first_vector(self, run: str, number: int, org: str, digest: str) -> None:
        """Refuse another vector of an organisation than the one that was acknowledged, before a byte of it is sent.

        Raises:
            StateError: Another one was.
        """
        at = (vectors.c.run == run, vectors.c.round == number, vectors.c.org == org)
        with self.read() as connection:
            _same_vector(connection.execute(select(vectors.c.digest).where(*at)).scalar(), number, org, digest)

    def accept_vector(
        self, *, run: str, number: int, org: str, digest: str, size: int, receipt: Callable[[Verdict], bytes]
    ) -> bytes:
        """Decide, in one transaction, whether a vector that lies on disk is in its round, and keep the receipt.

        Returns:
            The receipt's bytes; the first one again where the same vector comes again.

        Raises:
            StateError: Another vector of this organisation was acknowledged in this round.
        """
        at = (vectors.c.run == run, vectors.c.round == number, vectors.c.org == org)
        with self.write() as connection:
            known = connection.execute(select(vectors).where(*at)).first()
            if known is not None:
                _same_vector(known.digest, number, org, digest)
                # Its file may have come a second time after it was erased; whoever asked erases it again.
                connection.execute(vectors.update().where(*at).values(erased=0))
                return bytes(known.receipt)
            state = connection.execute(
                select(rounds.c.state).where(rounds.c.run == run, rounds.c.number == number)
            ).scalar_one()
            verdict: Verdict = "included" if state == "offered" else "late"
            signed = receipt(verdict)
            last = connection.execute(select(func.max(vectors.c.number)).where(vectors.c.org == org)).scalar()
            connection.execute(
                vectors.insert().values(
                    number=(last or 0) + 1,
                    run=run,
                    round=number,
                    org=org,
                    digest=digest,
                    size=size,
                    verdict=verdict,
                    receipt=signed,
                    erased=0,
                )
            )
            count_bytes(connection, run, org, up=size)
        return signed

    def vectors(self, run: str, number: int) -> list[VectorRow]:
        """The vectors of a round, by organisation."""
        with self.read() as connection:
            found = select(vectors).where(vectors.c.run == run, vectors.c.round == number).order_by(vectors.c.org)
            return [VectorRow(**row._mapping) for row in connection.execute(found)]

    def erase_vectors(self, run: str, number: int, delete: Callable[[str], None]) -> None:
        """Erase the files of a round's vectors; `delete` gets each digest that no other open round still needs."""
        with self.write() as connection:
            mine = (vectors.c.run == run, vectors.c.round == number, vectors.c.erased == 0)
            digests = list(connection.execute(select(vectors.c.digest).where(*mine)).scalars())
            connection.execute(vectors.update().where(*mine).values(erased=1))
            for digest in set(digests):
                others = select(vectors.c.org).where(vectors.c.digest == digest, vectors.c.erased == 0)
                if connection.execute(others).first() is None:
                    delete(digest)


def open_storage(url: str) -> Storage:
    """Open the database, building or upgrading its tables where they are behind.

    Raises:
        StateError: It was written by a newer version of this program.
    """
    return Storage(open_engine(url))


def _no_run(run: str) -> StateError:
    return StateError(f"expected a run, but there is none named {run!r}; see `foedus coordinator run list`")


def _same_vector(known: str | None, number: int, org: str, digest: str) -> None:
    if known is not None and known != digest:
        raise StateError(
            f"expected the vector {known[:16]} that {org} sent before in round {number}, got {digest[:16]}: one round "
            "has one vector, whatever the attempt"
        )


def _round(row: Row[Any]) -> RoundRow:
    values = dict(row._mapping)
    values["survivors"] = tuple(json.loads(values["survivors"] or "[]"))
    return RoundRow(**values)
