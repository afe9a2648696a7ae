"""What is written into the ledger afterwards: spending that an older copy forgot, or that only a person knows of.

Unlike `Ledger.reserve` nothing here asks whether a charter is in force or its allotment suffices: what left has left.
Each function is one transaction. When they are called is `receipts.py`'s affair, and a person's
(`foedus client privacy ledger state`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from foedus_protocols.accounting import Event
from foedus_protocols.charter import noise_slack

from foedus_client.allotments import fold, stated_order
from foedus_client.ledger import Entry, Ledger

# No adapter is longer (`charter.Count`): what the noise table costs an event of which only a person's word is left.
_LONGEST_VECTOR = 2**31


def restore(
    ledger: Ledger,
    namespace: str,
    charter_digest: str,
    run: str,
    round: int,
    event: Event | None,
    words_digest: str,
    receipt: Mapping[str, Any] | None,
) -> None:
    """Write down that a round was spent, and its receipt if there is one. Nothing happens if the ledger knows.

    Raises:
        StateError: No such namespace.
    """
    with ledger.transaction() as transaction:
        mine = fold(transaction.require(namespace)).allotments.get(charter_digest)
        if mine is not None and (run, round) in mine.reservations:
            return
        at: dict[str, Any] = {"charter": charter_digest, "run": run, "round": round}
        body = {"event": None if event is None else asdict(event), "words": words_digest, "restored": True}
        entry = transaction.append(namespace, "reserve", body, **at)
        if receipt is not None:
            transaction.append(namespace, "commit", {"reservation": entry.digest, "receipt": dict(receipt)}, **at)


def abandon(ledger: Ledger, namespace: str, charter_digest: str) -> bool:
    """Note that words of an open charter may have left unseen; whether that was new."""
    with ledger.transaction() as transaction:
        mine = fold(transaction.require(namespace)).allotments.get(charter_digest)
        if mine is None or not mine.open or mine.abandoned:
            return False
        transaction.append(namespace, "abandon", {"why": "older copy"}, charter=charter_digest)
    return True


def charge_abandoned(
    ledger: Ledger, namespace: str, charter_digest: str, run: str, round: int, event: Event | None
) -> bool:
    """Whether a round is abandoned; where its charter waits for that, it and all unknown rounds before are charged.

    Guarantees:
        Of a charter that was open in an older copy every round up to this one is spent afterwards, seen or not, and no
        words of the ones that were not seen are ever reserved.
    """
    with ledger.transaction() as transaction:
        mine = fold(transaction.read(namespace)).allotments.get(charter_digest)
        if mine is None:
            return False
        if (first := mine.reservations.get((run, round))) is not None:
            return first.body["words"] is None
        if not mine.abandoned:
            return False
        body = {"event": None if event is None else asdict(event), "words": None, "restored": True}
        for number in range(1, round + 1):
            if (run, number) not in mine.reservations:
                transaction.append(namespace, "reserve", body, charter=charter_digest, run=run, round=number)
    return True


def state_spent(
    ledger: Ledger, namespace: str, events: Sequence[Event], *, runs: Sequence[str], delta: float, cap: float
) -> Entry:
    """Write down a person's word on what was spent in a namespace: it counts for ever.

    Args:
        ledger: The ledger.
        namespace: The unit namespace; it is open.
        events: What was spent beyond what the ledger says. Empty: nothing.
        runs: The runs that this accounts for. Nothing is reserved in them any more.
        delta: The namespace's delta.
        cap: The namespace's epsilon cap. With `delta` it fixes the filter's order where nothing else has.

    Raises:
        StateError: No such namespace.
    """
    slack = noise_slack(length=_LONGEST_VECTOR, steps=sum(event.steps for event in events), epsilon=cap)
    with ledger.transaction() as transaction:
        earlier = (one for one in fold(transaction.require(namespace)).charges if one.charged())
        # The order in force, also where what fixed it is released unspent later: an order must not follow from results.
        order = next((one.filter_order for one in earlier), None)
        body = {
            "events": [asdict(event) for event in events],
            "runs": sorted(runs),
            "delta": delta,
            "delta_slack": slack,
            "cap": cap,
            "filter_order": stated_order(cap, delta) if order is None else order,
        }
        return transaction.append(namespace, "state", body)
