"""Control messages between the coordinator and its organisations, kept until they are answered.

A message is queued once, under (run, round, attempt, type, organisation), however often a resumed run queues it; it is
handed out until its answer has been stored; and one answer to it counts. What is in an envelope, and whether its
signature holds, is decided before anything arrives here (`service.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from foedus_protocols.errors import StateError
from sqlalchemy import Connection, func, select

from foedus_coordinator.figures import count_bytes
from foedus_coordinator.storage import Storage
from foedus_coordinator.tables import messages


@dataclass(frozen=True, kw_only=True)
class Question:
    """What identifies a queued message."""

    run: str
    round: int
    attempt: int
    type: str
    org: str


class Mailbox:
    """The durable queue of one coordinator."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._changed = threading.Condition()
        self._generation = 0

    @property
    def generation(self) -> int:
        """Counts what this process queued; hand it to `wait` to miss nothing."""
        return self._generation

    def wait(self, seconds: float, *, since: int) -> None:
        """Sleep until something was queued after `since`, or `seconds` are over.

        Every organisation waits here: were all of them woken by every commit, a round of n organisations would look
        into the database n times n times.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._generation != since, timeout=max(0.0, seconds))

    def queue(self, questions: Mapping[Question, Callable[[int], tuple[str, bytes]]]) -> list[str]:
        """Queue messages, all or none, except those that are queued already.

        Args:
            questions: What each is about, and what makes its envelope for a sequence number: digest and bytes.

        Returns:
            The digests of the envelopes that are queued, in order; some may be earlier ones.
        """
        with self._storage.write() as connection:
            queued = [_queue(connection, question, seal) for question, seal in questions.items()]
        with self._changed:
            self._generation += 1
            self._changed.notify_all()
        return queued

    def next_open(self, org: str, *, skip: Collection[str] = ()) -> tuple[str, bytes] | None:
        """The oldest unanswered message for an organisation, except those in `skip`: digest and envelope."""
        found = select(messages.c.digest, messages.c.envelope).where(
            messages.c.org == org, messages.c.state == "open", messages.c.digest.not_in(list(skip))
        )
        with self._storage.read() as connection:
            row = connection.execute(found.order_by(messages.c.sequence).limit(1)).first()
        return None if row is None else (row.digest, row.envelope)

    def question(self, digest: str, org: str) -> Question:
        """What a queued message was about.

        Raises:
            StateError: No such message was ever sent to this organisation.
        """
        with self._storage.read() as connection:
            row = connection.execute(select(messages).where(messages.c.digest == digest, messages.c.org == org)).first()
        if row is None:
            raise StateError(f"expected an answer to a message that {org} was sent, got one to {digest[:16]}")
        return Question(run=row.run, round=row.round, attempt=row.attempt, type=row.type, org=row.org)

    def answer(self, digest: str, *, answer: bytes, answer_digest: str) -> bool:
        """Store the answer to a message.

        Returns:
            Whether it counts. One that comes again, or to a message that was withdrawn, does not.

        Raises:
            StateError: Another answer was stored before.
        """
        with self._storage.write() as connection:
            row = connection.execute(select(messages).where(messages.c.digest == digest)).one()
            if row.state == "answered" and row.answer_digest != answer_digest:
                raise StateError(f"expected the answer {row.answer_digest[:16]} that came before, got another one")
            if row.state != "open":
                return False
            connection.execute(
                messages.update()
                .where(messages.c.digest == digest)
                .values(state="answered", answer=answer, answer_digest=answer_digest, answered_at=time.time())
            )
            count_bytes(connection, row.run, row.org, up=len(answer))
        return True

    def answers(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The stored answers among these messages, by the message's digest."""
        found = select(messages.c.digest, messages.c.answer).where(
            messages.c.digest.in_(list(digests)), messages.c.state == "answered"
        )
        with self._storage.read() as connection:
            return {row.digest: row.answer for row in connection.execute(found)}

    def latest(self, run: str, number: int, kind: str) -> dict[str, str]:
        """For each organisation, its message of this type in a round; of several attempts the last."""
        found = select(messages.c.org, messages.c.digest).where(
            messages.c.run == run, messages.c.round == number, messages.c.type == kind
        )
        with self._storage.read() as connection:
            return {row.org: row.digest for row in connection.execute(found.order_by(messages.c.attempt))}

    def withdraw(
        self, run: str, *, before_round: int | None = None, only: str | None = None, orgs: Collection[str] | None = None
    ) -> None:
        """Take back unanswered messages of a run.

        Args:
            run: The run.
            before_round: Only those of earlier rounds.
            only: Only those of this type.
            orgs: Only those to these organisations.
        """
        change = messages.update().where(messages.c.run == run, messages.c.state == "open")
        if before_round is not None:
            change = change.where(messages.c.round < before_round)
        if only is not None:
            change = change.where(messages.c.type == only)
        if orgs is not None:
            change = change.where(messages.c.org.in_(list(orgs)))
        with self._storage.write() as connection:
            connection.execute(change.values(state="withdrawn"))


def _queue(connection: Connection, question: Question, seal: Callable[[int], tuple[str, bytes]]) -> str:
    same = [getattr(messages.c, name) == value for name, value in vars(question).items()]
    known = connection.execute(select(messages.c.digest).where(*same)).scalar()
    if known is not None:
        return str(known)
    last = connection.execute(select(func.max(messages.c.sequence)).where(messages.c.org == question.org)).scalar()
    sequence = (last or 0) + 1
    digest, envelope = seal(sequence)
    connection.execute(
        messages.insert().values(digest=digest, sequence=sequence, envelope=envelope, state="open", **vars(question))
    )
    count_bytes(connection, question.run, question.org, down=len(envelope))
    return digest
