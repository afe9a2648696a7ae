"""What a ledger holds, as tests ask it."""

from __future__ import annotations

from foedus_client.allotments import merge_events
from foedus_client.ledger import Ledger
from foedus_protocols.accounting import Event


def charged(ledger: Ledger, namespace: str) -> tuple[Event, ...]:
    """What counts against the cap: spent events, and all events of charters that hold an allotment."""
    return merge_events(event for one in ledger.accounts()[namespace].charges for event in one.charged())


def head(ledger: Ledger, namespace: str) -> str:
    """The digest of the newest entry."""
    return ledger.entries(namespace)[-1].digest
