"""Whether the ledger knows all that was spent: compared at each hello with what client.db and the coordinator know.

A ledger file that was restored from a backup has an unbroken chain and yet forgot spending. Three witnesses tell:
the receipts that the coordinator signed and tells again, what the daemon noted in client.db (receipts, charters signed,
the newest entry seen of each chain), and the file's being there at all. What follows:

    (a) the reservation is there    its receipt is committed, if a kill had prevented that
    (b) only the charter is known   the file is an OLDER COPY: the spending is restored from the receipt, and every
                                    charter that is open in it is abandoned until its next order's round, in which
                                    nothing leaves and which is charged: words of it may have left unseen
    (c) the charter is unknown      nobody here knows what was spent. Nothing is answered until a person states it

Left out: what neither side's records tell of. A home restored as a whole from before a charter was signed, where not
one vector of that charter got a receipt; or from before a reservation whose words left in part, or got a receipt that
the coordinator withholds: the round is then trained anew, and its first words are not charged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_protocols.accounting import Event
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter, round_event
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.hello import ToldReceipt
from foedus_protocols.receipt import verify_told_receipt

from foedus_client.allotments import Account, Allotment
from foedus_client.config import Membership
from foedus_client.ledger import Entry, Ledger
from foedus_client.restoring import abandon, charge_abandoned, restore
from foedus_client.seat import Ports, Seat
from foedus_client.state import ClientState
from foedus_client.unexplained import Unexplained, explained, how_to_state, note, unexplained

_LOG = logging.getLogger("foedus.client")

_HEADS = "ledger-heads"

Pull = Callable[[str, int], Path]


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """What a comparison found and wrote.

    Attributes:
        committed: Receipts of known reservations that were not committed before.
        restored: Reservations that the ledger had forgotten.
        older: The ledger is an older copy.
        abandoned: Charters whose open round is abandoned because of that.
    """

    committed: int = 0
    restored: int = 0
    older: bool = False
    abandoned: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Spent:
    """Evidence that words left: a receipt, or words that client.db has of a run that is over."""

    charter: str
    run: str
    round: int
    words: str
    receipt: Mapping[str, Any] | None


def open_ledger(path: Path, state: ClientState, *, clock: Callable[[], float] = time.time) -> Ledger:
    """Open the ledger of a home, or make its first one.

    Raises:
        StateError: There was one and it is gone. It is never made anew: its spending would be forgotten.
        VerificationError: Its chain is broken.
    """
    if ledger_is_gone(path, state):
        for record in state.charters():
            if record.signature is not None or state.rounds(record.digest):
                note(
                    state,
                    Unexplained(
                        run=record.run,
                        charter=record.digest,
                        purpose=record.purpose,
                        rounds=len(state.rounds(record.digest)),
                        event=None,
                        since=clock(),
                    ),
                )
        raise StateError(
            f"expected the ledger that this home had in {path}, it is gone: put the newest copy of it back, or, where "
            f"there is none, {how_to_state(unexplained(state))}"
        )
    ledger = Ledger(path, clock=clock)
    if state.fact(_HEADS) is None:
        remember_heads(ledger, state)
    return ledger


def ledger_is_gone(path: Path, state: ClientState) -> bool:
    """Whether client.db remembers a ledger and there is no file, or an empty one."""
    return (not path.exists() or path.stat().st_size == 0) and state.fact(_HEADS) is not None


def remember_heads(ledger: Ledger, state: ClientState, *, anew: bool = False) -> None:
    """Note the newest entry of every chain in client.db, so that an older copy of the ledger is recognised.

    Args:
        ledger: The ledger.
        state: The daemon's memory.
        anew: The file was compared with all that is known just now, or a person states what it lacks.

    Raises:
        StateError: An entry that was noted is not there: the file was replaced since the last hello. What was noted
            stays, so that the next hello recognises the copy.

    Guarantees:
        Called between a reservation and the departure of its words, no later copy of the file without that reservation
        goes unnoticed as long as client.db is not an older copy as well.
    """
    if not anew and _forgot(ledger, state):
        raise StateError(
            "expected a ledger that goes on from the one seen before, got an older or another copy: it is compared "
            "with the coordinator's receipts at the next hello, and nothing leaves until then"
        )
    with ledger.transaction() as transaction:
        heads = json.dumps(transaction.heads(), sort_keys=True)
    if state.fact(_HEADS) != heads:
        state.remember(_HEADS, heads)


def reconcile(
    told: Sequence[ToldReceipt],
    *,
    ledger: Ledger,
    state: ClientState,
    us: Membership,
    pull: Pull,
    clock: Callable[[], float],
) -> Reconciled:
    """Account for every receipt, before anything is answered.

    Args:
        told: What the coordinator told again: all receipts that were not accounted for in this daemon's life.
        ledger: The ledger.
        state: The daemon's memory.
        us: Who we are, and whose signature a receipt must have.
        pull: Fetches a charter by digest.
        clock: Unix seconds.

    Raises:
        VerificationError: A receipt is not the operator's or not ours, names other words than were reserved, or
            another run than the charter's. Nothing was written.
        StateError: A charter that the ledger does not know was spent on: a person has to state what. What could be
            restored was.

    Guarantees:
        When it returns, the ledger holds a reservation for every vector that the coordinator, or client.db, has a
        receipt for, except in runs that a person's statement covers; and of each charter that was open in an older copy
        nothing leaves before its open round was charged.
    """
    for one in told:
        verify_told_receipt(one.receipt, operator_key=us.operator_key, federation=us.federation, org=us.org)
    book = _Book(ledger.accounts(), state)
    spent = book.agreed([*map(_told, told), *_noted(state)])
    events = _Events(us, pull)
    missing = [one for one in spent if book.misses(one)]
    lost = _unknown_charters(spent, book, state)
    older = bool(missing or lost) or _forgot(ledger, state)
    for evidence in missing:
        events.of(evidence)  # Before anything is written: this may fail.
    abandoned: tuple[str, ...] = ()
    if older:
        _LOG.error(
            "the ledger is an OLDER COPY: it forgot %d rounds and %d runs. Its open rounds are abandoned",
            len({(one.charter, one.round) for one in missing}),
            len(lost),
        )
        abandoned = tuple(_abandon(ledger, book, state, events))
    for evidence in missing:
        namespace = book.charters[evidence.charter][0]
        place = (namespace, evidence.charter, evidence.run, evidence.round)
        restore(ledger, *place, events.of(evidence), evidence.words, evidence.receipt)
    found = Reconciled(committed=_commit(spent, ledger, book), restored=len(missing), older=older, abandoned=abandoned)
    _take_over(spent, state)
    remember_heads(ledger, state, anew=True)
    _settle(lost, book, state, events, clock())
    return found


def abandoned(seat: Seat, number: int, ports: Ports) -> bool:
    """Whether nothing may leave for an order's round because its ledger was an older copy. It is charged then.

    To be asked before anything is trained. The first order that comes after an older copy was recognised, whatever
    round it names, is answered without a vector, and so are its further attempts; later rounds go on.
    """
    event = round_event(seat.charter, seat.me)
    found = charge_abandoned(ports.ledger, seat.namespace, seat.digest, seat.run, number, event)
    if found:
        remember_heads(ports.ledger, ports.state)
        _LOG.error("round %d of %s is abandoned and counts as spent: the ledger was an older copy", number, seat.run)
    return found


class _Book:
    """The ledger by charter: where each one's allotment is, and which runs a statement covers."""

    def __init__(self, accounts: dict[str, Account], state: ClientState) -> None:
        self.charters: dict[str, tuple[str, Allotment]] = {}
        self.stated = frozenset[str]().union(*(account.stated_runs for account in accounts.values()))
        self._runs = {record.digest: record.run for record in state.charters()}
        self._words: dict[tuple[str, int], str] = {}
        for namespace, account in accounts.items():
            for charter, allotment in account.allotments.items():
                known = self.charters.get(charter)
                if known is None or (allotment.reservations and not known[1].reservations):
                    self.charters[charter] = namespace, allotment
                if allotment.run is not None:
                    self._runs.setdefault(charter, allotment.run)
        self._charter_of = {run: charter for charter, run in self._runs.items()}

    def agreed(self, evidence: Sequence[_Spent]) -> list[_Spent]:
        """Compare evidence with the ledger and with itself; one piece a round.

        Raises:
            VerificationError: It contradicts what is known.
        """
        for one in evidence:
            self._check(one)
        return list({(one.charter, one.round): one for one in reversed(evidence)}.values())[::-1]

    def _check(self, one: _Spent) -> None:
        run, charter = self._runs.setdefault(one.charter, one.run), self._charter_of.setdefault(one.run, one.charter)
        if (one.run, one.charter) != (run, charter):
            raise VerificationError(
                f"expected receipts of {run} for charter {one.charter[:12]}, got one of another run"
            )
        if one.run in self.stated:
            return
        entry = self._entry(one)
        words = one.words if entry is None or entry.body["words"] is None else entry.body["words"]
        if self._words.setdefault((one.charter, one.round), words) != one.words:
            raise VerificationError(
                f"expected a receipt for the words {self._words[one.charter, one.round][:12]} of round {one.round} of "
                f"{one.run}, got one for {one.words[:12]}: somebody else sends in our name, or the coordinator errs"
            )

    def rounds(self, charter: str) -> int:
        """How many rounds of a charter there is evidence of."""
        return sum(1 for name, _ in self._words if name == charter)

    def misses(self, one: _Spent) -> bool:
        """Whether the ledger knows the charter and not this round."""
        return one.charter in self.charters and one.run not in self.stated and self._entry(one) is None

    def uncommitted(self, one: _Spent) -> Entry | None:
        """The reservation that a receipt is to be committed to; None where there is nothing to do."""
        entry = self._entry(one)
        if entry is None or one.receipt is None or (one.run, one.round) in self.charters[one.charter][1].commits:
            return None
        return entry

    def _entry(self, one: _Spent) -> Entry | None:
        found = self.charters.get(one.charter)
        return None if found is None else found[1].reservations.get((one.run, one.round))


class _Events:
    """What a round of a charter costs us; each charter is fetched once."""

    def __init__(self, us: Membership, pull: Pull) -> None:
        self.us = us
        self._pull = pull
        self._charters: dict[str, Charter] = {}

    def charter(self, digest: str) -> Charter:
        """A charter by digest.

        Raises:
            VerificationError: The coordinator has none of this digest.
        """
        if digest not in self._charters:
            charter = Charter.parse(self._pull(digest, MAX_CHARTER_BYTES).read_bytes())
            if charter.digest != digest:
                raise VerificationError(f"expected charter {digest[:12]}, got {charter.digest[:12]}")
            self._charters[digest] = charter
        return self._charters[digest]

    def of(self, one: _Spent) -> Event | None:
        """The event of one round.

        Raises:
            VerificationError: The charter cannot be fetched, does not name us, or has no such round.
        """
        charter = self.charter(one.charter)
        if not 1 <= one.round <= charter.privacy.rounds:
            raise VerificationError(f"expected a round up to {charter.privacy.rounds} of {one.run}, got {one.round}")
        return round_event(charter, charter.participant(self.us.org))


def _told(one: ToldReceipt) -> _Spent:
    receipt = one.receipt
    return _Spent(
        charter=one.charter,
        run=receipt.run,
        round=receipt.round,
        words=receipt.digest,
        receipt=receipt.model_dump(mode="json"),
    )


def _noted(state: ClientState) -> Iterator[_Spent]:
    """The receipts in client.db. They were checked when they came."""
    for record in state.charters():
        for made in state.rounds(record.digest):
            if made.receipt is not None:
                yield _Spent(
                    charter=record.digest, run=record.run, round=made.round, words=made.words, receipt=made.receipt
                )


def _unknown_charters(spent: Sequence[_Spent], book: _Book, state: ClientState) -> dict[str, str]:
    """Run to charter, for each that was signed or spent on and of which the ledger knows nothing."""
    known = [(one.run, one.charter) for one in spent]
    known += [(record.run, record.digest) for record in state.charters() if record.signature is not None]
    return {run: charter for run, charter in known if charter not in book.charters and run not in book.stated}


def _forgot(ledger: Ledger, state: ClientState) -> bool:
    """Whether an entry that client.db has seen as the newest of its chain is not there."""
    heads = json.loads(state.fact(_HEADS) or "{}")
    with ledger.transaction() as transaction:
        return any(transaction.digest_at(name, sequence) != digest for name, (sequence, digest) in heads.items())


def _abandon(ledger: Ledger, book: _Book, state: ClientState, events: _Events) -> Iterator[str]:
    """Abandon what is open in an older copy; end what client.db knows to be over, with all words that it made."""
    for charter, (namespace, allotment) in book.charters.items():
        if not allotment.open:
            continue
        record = state.charter(charter) if state.knows(charter) else None
        if record is None or record.state not in ("closed", "left"):
            abandon(ledger, namespace, charter)
            yield charter
            continue
        for made in state.rounds(charter):
            one = _Spent(charter=charter, run=record.run, round=made.round, words=made.words, receipt=made.receipt)
            restore(ledger, namespace, charter, one.run, one.round, events.of(one), one.words, one.receipt)
        ledger.release_allotment(charter, why="left" if state.was_left(charter) else "ended")


def _take_over(spent: Sequence[_Spent], state: ClientState) -> None:
    """Give client.db, which may be the older copy, the rounds that it forgot: a replay asks it for our own part."""
    for one in spent:
        if one.receipt is not None and state.knows(one.charter) and state.round(one.charter, one.round) is None:
            size, receipt = int(one.receipt["bytes"]), dict(one.receipt)
            state.restore_round(one.charter, one.round, words=one.words, size=size, receipt=receipt)


def _commit(spent: Sequence[_Spent], ledger: Ledger, book: _Book) -> int:
    count = 0
    for one in spent:
        entry = book.uncommitted(one)
        if entry is not None and one.receipt is not None:
            ledger.commit(entry, one.receipt)
            count += 1
    return count


def _settle(lost: Mapping[str, str], book: _Book, state: ClientState, events: _Events, now: float) -> None:
    """Drop the notes of runs that are explained by now, and refuse to go on where one is not.

    Raises:
        StateError: A person has to state what was spent.
    """
    for one in unexplained(state):
        if one.run in book.stated or (one.run not in lost and one.charter in book.charters):
            explained(state, one.run)
    if not lost:
        return
    for run, charter in lost.items():
        purpose = state.charter(charter).purpose if state.knows(charter) else None
        event = None
        try:
            terms = events.charter(charter)
            event, purpose = round_event(terms, terms.participant(events.us.org)), terms.purpose
        except VerificationError as error:
            _LOG.error("the charter of %s cannot be read: %s", run, error)
        rounds = book.rounds(charter)
        note(state, Unexplained(run=run, charter=charter, purpose=purpose, rounds=rounds, event=event, since=now))
    raise StateError(
        "expected a ledger that knows every run that was spent on, it was lost or is a copy from before they were "
        f"signed: put the newest copy back, or, where there is none, {how_to_state(unexplained(state))}"
    )
