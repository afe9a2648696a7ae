"""The privacy ledger: what was released about the units of a namespace, and what was promised to be releasable.

One SQLite file belongs to the organisation. Each unit namespace ("patients of A") has an append-only chain of entries
(`chain.py`)::

    open      the namespace exists; its privacy unit
    allot     a charter was admitted: its events are set aside, and our signature of it is stored with them
    reserve   one round's words exist on disk and may leave: allotted events turn into spent ones
    commit    the coordinator's receipt for a reservation
    release   the charter ended, expired or was left: what it did not spend is free again
    state     what a person says was spent where no ledger tells it, for ever, and the runs that this covers
    abandon   this file was found to be an older copy while the charter was open: words of it may have left unseen

Entries hold events (noise multiplier, sampling probability, steps), never epsilons alone, so that epsilon is always
recomputed. State is never stored beside the chain: it is folded from the entries (`allotments.py`) in the transaction
that needs it. The heavier alternative, a table of counters, cannot be audited and drifts when a program is killed.
How an older copy or a lost file is recognised is `receipts.py`'s affair, what is then written here `restoring.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foedus_protocols.accounting import Event
from foedus_protocols.errors import BudgetExhausted, StateError

from foedus_client.allotments import (
    Account,
    Admission,
    Allotment,
    Charge,
    Judgement,
    admission,
    epsilon_of_spent,
    fold,
    judge,
    merge_events,
    require_covered,
    require_not_stated,
)
from foedus_client.branches import extensions, require_only_extension
from foedus_client.chain import Chain, Entry, Transaction

__all__ = ["Admission", "Entry", "Ledger"]


class Ledger:
    """The ledger file of one organisation. Safe to use from several threads and processes.

    Guarantees:
        A charter is admitted, and its signature made, inside one transaction that has seen every earlier admission:
        of charters that do not fit together only as many are signed as fit, whoever asks at once. The events reserved
        under a charter never exceed those allotted to it, and a round of a run is spent once. All of it holds across
        kill -9. A ledger that was changed does not open.

    Raises:
        StateError: The file is no ledger, or of a newer format.
        VerificationError: Its chain is broken (`verify_chain`).
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, read_only: bool = False) -> None:
        """Open the file, make it where it is missing, and verify it.

        Args:
            path: The file.
            clock: Unix seconds.
            read_only: Only look: neither make, migrate nor change the file.
        """
        self._clock = clock
        self._chain = Chain(path, clock=clock, read_only=read_only)

    @property
    def format(self) -> int:
        """The format of the file."""
        return self._chain.format

    # --- Namespaces --------------------------------------------------------------------------------------------------

    def open_namespace(self, name: str, *, unit: str) -> None:
        """Start the chain of a unit namespace; nothing happens if it has one for the same unit.

        Raises:
            StateError: The namespace exists for another privacy unit; a budget of patients cannot count matters.
        """
        with self._chain.transaction() as transaction:
            entries = transaction.read(name)
            if not entries:
                transaction.append(name, "open", {"unit": unit, "adjacency": "add-remove-one"})
            elif entries[0].body["unit"] != unit:
                raise StateError(
                    f"expected namespace {name!r} to protect {entries[0].body['unit']!r}, got {unit!r}: "
                    "use another name"
                )

    def namespaces(self) -> list[str]:
        """The names of all unit namespaces, sorted."""
        with self._chain.transaction() as transaction:
            return transaction.namespaces()

    # --- Charters ----------------------------------------------------------------------------------------------------

    def admit(
        self,
        namespace: str,
        charter_digest: str,
        events: Sequence[Event],
        delta: float,
        cap: float,
        *,
        expires: int,
        sign: Callable[[], str],
        delta_slack: float = 0.0,
        extends: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Admission:
        """Sign a charter and set its events aside, or refuse: check 10 at signing.

        Args:
            namespace: The unit namespace that the charter draws on.
            charter_digest: The charter.
            events: All its events for this organisation; empty in mode `none`.
            delta: The namespace's delta, from the organisation's policy.
            cap: The namespace's epsilon cap, from the organisation's policy. An epsilon equal to it is admitted.
            expires: Unix seconds after which nothing can be reserved and what is unspent is free.
            sign: Called once, inside the transaction, when the budget was found to suffice; its result is stored.
            delta_slack: What the noise table costs this charter (`charter.noise_slack` at `cap`).
            extends: The charter of the run that this one goes on from.
            details: Further public facts for the entry: unit, clip, run name.

        Returns:
            The stored admission. Asking again for a charter that holds an allotment returns the first answer.

        Guarantees:
            Everything ever reserved in the namespace under private charters is (cap, delta)-DP with respect to adding
            or removing one unit: by PLD for a first charter alone, by an RDP filter over all events once there is
            another. Nothing is claimed for charters without events.

        Raises:
            BudgetExhausted: The cap would be passed. Nothing was written, nothing signed.
            StateError: No such namespace, this charter was left after rounds of it were spent, or another charter goes
                on from the same run (`branches.py`).
            VerificationError: The noise tables' slack at this cap leaves nothing of delta.
        """
        terms = (events, delta, cap, delta_slack)
        with self._chain.transaction() as transaction:
            known, head = fold(transaction.require(namespace)), transaction.head(namespace)
        # The accountant takes up to seconds: it is asked before the transaction, and again inside it only where
        # somebody wrote to the namespace in between.
        judged = None if self._held(known, charter_digest) else self._fitting(namespace, known, *terms)
        with self._chain.transaction() as transaction:
            if judged is None or transaction.head(namespace) != head:
                known = fold(transaction.require(namespace))
                if (held := self._held(known, charter_digest)) is not None:
                    return held
                judged = self._fitting(namespace, known, *terms)
            self._require_only_extension(transaction, charter_digest, extends)
            self._release_expired(transaction, namespace, known)
            if extends is not None:
                self._release_expired_extensions(transaction, extends)
            body = {
                "events": [asdict(event) for event in events],
                "delta": delta,
                "delta_slack": delta_slack,
                "cap": cap,
                "epsilon": judged.epsilon,
                "accountant": judged.accountant,
                "filter_order": judged.filter_order,
                "expires": expires,
                "signature": sign(),
                "details": dict(details or {}),
            } | ({} if extends is None else {"extends": extends})
            return admission(transaction.append(namespace, "allot", body, charter=charter_digest))

    def _held(self, known: Account, charter_digest: str) -> Admission | None:
        """The admission of a charter that holds an allotment; None where it may be judged.

        Raises:
            StateError: It was left after rounds of it were, or may have been, spent.
        """
        mine = known.allotments.get(charter_digest)
        if mine is not None and mine.open:
            return mine.admission
        if mine is not None and (mine.reservations or mine.abandoned):
            raise StateError(f"expected a charter that was never left, got {charter_digest[:12]}: draft a new one")
        return None

    def require_fits(
        self,
        namespace: str,
        charter_digest: str,
        events: Sequence[Event],
        delta: float,
        cap: float,
        *,
        delta_slack: float = 0.0,
        extends: str | None = None,
    ) -> Judgement:
        """Ask what `admit` would say, and write nothing: a person may still take days to decide.

        Returns:
            The epsilon that the namespace would reach; for a charter that holds an allotment, that of its admission.

        Raises:
            BudgetExhausted: The cap would be passed.
            StateError: No such namespace, or another charter goes on from the same run.
            VerificationError: The noise tables' slack at this cap leaves nothing of delta.
        """
        with self._chain.transaction() as transaction:
            known = fold(transaction.require(namespace))
            if (mine := known.allotments.get(charter_digest)) is not None and mine.open:
                return Judgement(mine.admission.epsilon, mine.admission.accountant, mine.filter_order)
            self._require_only_extension(transaction, charter_digest, extends)
        return self._fitting(namespace, known, events, delta, cap, delta_slack)

    def _require_only_extension(self, transaction: Transaction, charter_digest: str, extends: str | None) -> None:
        if extends is not None:
            require_only_extension(_accounts(transaction).values(), charter_digest, extends, now=self._clock())

    def _fitting(
        self, namespace: str, known: Account, events: Sequence[Event], delta: float, cap: float, delta_slack: float
    ) -> Judgement:
        """The judgement on one more charter; BudgetExhausted if it is beyond the cap.

        Charters that expired are closed in `known`: what they did not spend no longer counts.
        """
        now = self._clock()
        for allotment in known.allotments.values():
            if allotment.open and allotment.expires < now:
                allotment.close()
                allotment.expired = True
        judged = judge(known.charges, events, delta=delta, delta_slack=delta_slack, cap=cap)
        if judged.epsilon > cap:
            raise BudgetExhausted(
                10,
                f"expected epsilon of at most {cap:g} at delta {delta:g} in namespace {namespace!r}, got "
                f"{judged.epsilon:.6g} ({judged.accountant}) with this charter: ask for fewer rounds or more noise, or "
                "raise epsilon_cap in policy.toml",
            )
        return judged

    def _release_expired(self, transaction: Transaction, namespace: str, known: Account) -> None:
        """Write down that charters whose share was taken to be free are over: a clock set back cannot revive them."""
        for charter, allotment in known.allotments.items():
            if allotment.expired:
                transaction.append(namespace, "release", {"why": "expired"}, charter=charter)

    def _release_expired_extensions(self, transaction: Transaction, extended: str) -> None:
        """The same for extensions of a run that another one goes on from now, whatever their namespace."""
        now, accounts = self._clock(), _accounts(transaction)
        others = extensions(accounts.values(), extended)
        for namespace, account in accounts.items():
            for charter in others.keys() & account.allotments.keys():
                if account.allotments[charter].open and account.allotments[charter].expires < now:
                    transaction.append(namespace, "release", {"why": "expired"}, charter=charter)

    def admission(self, charter_digest: str) -> Admission | None:
        """The admission of a charter that holds an allotment, with our signature; None if it holds none."""
        with self._chain.transaction() as transaction:
            for _, allotment in _find(transaction, charter_digest):
                if allotment.open:
                    return allotment.admission
        return None

    def release_allotment(self, charter_digest: str, why: str = "ended") -> None:
        """Free what a charter did not spend. It can reserve nothing more; if it holds nothing, nothing happens.

        Args:
            charter_digest: The charter.
            why: For the entry: the run's outcome, ``left``, or ``ended`` where the outcome is not known.
        """
        with self._chain.transaction() as transaction:
            for namespace, allotment in _find(transaction, charter_digest):
                if allotment.open:
                    transaction.append(namespace, "release", {"why": why}, charter=charter_digest)

    # --- Rounds ------------------------------------------------------------------------------------------------------

    def require_not_stated(self, run: str) -> None:
        """Check that no person's statement covers a run: what it spent is charged already, and it is over for us.

        Raises:
            StateError: One does.
        """
        with self._chain.transaction() as transaction:
            require_not_stated(_accounts(transaction).values(), run)

    def require_allotted(self, namespace: str, charter_digest: str, event: Event | None) -> None:
        """Check 10 before a round: one more round of this charter is covered by its allotment.

        Raises:
            StateError: The charter holds no allotment in this namespace, or expired.
            BudgetExhausted: Its events are all spent.
        """
        with self._chain.transaction() as transaction:
            known = fold(transaction.require(namespace))
            require_covered(self._in_force(known, namespace, charter_digest), event)

    def reserve(
        self, namespace: str, charter_digest: str, run: str, round: int, event: Event | None, words_digest: str
    ) -> Entry:
        """Spend one round's event on words that are already on disk. Only after this may they leave.

        Returns:
            The reservation. The same words again (after a kill) return the first one and spend nothing.

        Raises:
            StateError: Other words were reserved for this round, or the charter holds no allotment.
            BudgetExhausted: The allotment does not cover this event.
        """
        with self._chain.transaction() as transaction:
            known = fold(transaction.require(namespace))
            mine = known.allotments.get(charter_digest)
            if mine is not None and (first := mine.reservations.get((run, round))) is not None:
                if first.body["words"] is None:
                    raise StateError(f"expected a round that goes on, round {round} of {run!r} was abandoned")
                if first.body["words"] != words_digest:
                    raise StateError(
                        f"expected the words {first.body['words'][:12]} reserved for round {round} of {run!r}, got "
                        f"{words_digest[:12]}: send the reserved ones; a round is spent once"
                    )
                return first
            require_not_stated(_accounts(transaction).values(), run)
            mine = self._in_force(known, namespace, charter_digest)
            if mine.abandoned:
                raise StateError(f"expected the open round of {run!r} to be abandoned first: this is an older copy")
            require_covered(mine, event)
            body = {"event": None if event is None else asdict(event), "words": words_digest}
            return transaction.append(namespace, "reserve", body, charter=charter_digest, run=run, round=round)

    def _in_force(self, known: Account, namespace: str, charter_digest: str) -> Allotment:
        allotment = known.allotments.get(charter_digest)
        if allotment is None or not allotment.open:
            raise StateError(
                f"expected an allotment of charter {charter_digest[:12]} in namespace {namespace!r}, got none: "
                "it was never signed here, it ended, or it was left"
            )
        if allotment.expires < self._clock():
            raise StateError(f"expected charter {charter_digest[:12]} to be in force, got one that expired")
        return allotment

    def reservation(self, charter_digest: str, run: str, round: int) -> Entry | None:
        """What was reserved for a round, if anything: after a kill, the words to send."""
        with self._chain.transaction() as transaction:
            for _, allotment in _find(transaction, charter_digest):
                if (run, round) in allotment.reservations:
                    return allotment.reservations[run, round]
        return None

    def commit(self, entry: Entry, receipt: Mapping[str, Any]) -> Entry:
        """Write down the coordinator's receipt for a reservation; a second receipt for it changes nothing.

        Raises:
            StateError: `entry` is no reservation of this ledger.
        """
        if entry.charter is None or entry.run is None or entry.round is None:
            raise StateError(f"expected a reservation to commit, got an entry of kind {entry.kind!r}")
        key = (entry.run, entry.round)
        with self._chain.transaction() as transaction:
            allotment = fold(transaction.require(entry.namespace)).allotments.get(entry.charter)
            if allotment is None or allotment.reservations.get(key) != entry:
                raise StateError(
                    f"expected a reservation of this ledger, got {entry.digest[:12]}: it is of another file"
                )
            if key in allotment.commits:
                return allotment.commits[key]
            body = {"reservation": entry.digest, "receipt": dict(receipt)}
            return transaction.append(entry.namespace, "commit", body, charter=entry.charter, run=key[0], round=key[1])

    # --- Reading -----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Read and append as the only writer (`restoring.py`)."""
        with self._chain.transaction() as transaction:
            yield transaction

    def accounts(self) -> dict[str, Account]:
        """Every namespace as its chain tells it, all of one instant."""
        with self._chain.transaction() as transaction:
            return _accounts(transaction)

    def spent(self, namespace: str) -> tuple[Event, ...]:
        """Everything reserved or stated so far, equal events merged."""
        return merge_events(event for one in self._charges(namespace) for event in one.spent)

    def epsilon_spent(self, namespace: str, delta: float) -> float:
        """The epsilon at `delta` of everything spent so far, by the accountant that its history allows."""
        return epsilon_of_spent(self._charges(namespace), delta)

    def entries(self, namespace: str) -> list[Entry]:
        """The chain of a namespace, oldest first."""
        with self._chain.transaction() as transaction:
            return transaction.require(namespace)

    def export(self) -> list[bytes]:
        """The canonical JSON of every entry, by namespace and place. The SHA-256 of one is `previous` in the next."""
        with self._chain.transaction() as transaction:
            return transaction.contents()

    def backup(self, target: Path) -> None:
        """Copy the file into one that is complete in itself and only its owner reads; see `Chain.backup`."""
        self._chain.backup(target)

    def verify_chain(self) -> None:
        """Recompute every link of every namespace.

        Raises:
            VerificationError: An entry was changed, removed from the middle, added out of turn, or moved.
        """
        with self._chain.transaction() as transaction:
            transaction.verify()

    def _charges(self, namespace: str) -> list[Charge]:
        return fold(self.entries(namespace)).charges


def _accounts(transaction: Transaction) -> dict[str, Account]:
    return {name: fold(transaction.read(name)) for name in transaction.namespaces()}


def _find(transaction: Transaction, charter_digest: str) -> list[tuple[str, Allotment]]:
    """The allotments of a charter, with their namespaces."""
    found = [
        (name, fold(transaction.read(name)).allotments.get(charter_digest))
        for name in transaction.namespaces(charter=charter_digest)
    ]
    return [(name, allotment) for name, allotment in found if allotment is not None]
