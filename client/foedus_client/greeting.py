"""The introduction on the link, as the organisation lives it: before anything is answered, both sides are known.

who      the federation, the operator and the version that we joined with
when     the coordinator's clock against ours
keys     our certificate at half life, CAs that are rotated
peers    the signed roster, which continues the one seen before
spent    every receipt that we ever got is accounted for in the ledger: a restored backup is recognised here
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import HelloAnswer, HelloRequest, ToldReceipt
from foedus_protocols.roster import Roster

from foedus_client.clock import Clock
from foedus_client.config import Home, Membership
from foedus_client.ledger import Ledger
from foedus_client.membership import open_hello, update_rosters
from foedus_client.receipts import reconcile
from foedus_client.renewal import introduction, renew_if_due
from foedus_client.state import ClientState


@dataclass(frozen=True, kw_only=True)
class Greeter:
    """What a greeting needs of the organisation."""

    home: Home
    us: Membership
    state: ClientState
    ledger: Ledger
    clock: Clock


@dataclass(frozen=True, kw_only=True)
class Greeted:
    """What a greeting found: the roster chain, and how many receipts were accounted for in this daemon's life."""

    rosters: list[Roster]
    receipts: int


def greet(
    greeter: Greeter,
    *,
    hello: Callable[[dict[str, Any]], dict[str, Any]],
    reload: Callable[[], None],
    pull: Callable[[str, int], Path],
    receipts: int,
) -> Greeted:
    """Introduce ourselves, and check everything that the coordinator says of itself and of us.

    Args:
        hello: Says hello on the link.
        reload: Makes the link read our TLS files again.
        pull: Fetches a file by digest, of at most so many bytes.
        receipts: How many receipts were accounted for before.

    Raises:
        VerificationError: The coordinator is not the one that we joined, speaks too different a version, or its roster
            or a receipt contradicts what was seen.
        StateError: The ledger does not know what was spent, and a person has to say it. Nothing may be answered.
        ConnectError: The line broke.
    """
    us, home = greeter.us, greeter.home

    def say(request: HelloRequest) -> HelloAnswer:
        asked = time.time()
        answer = open_hello(hello(request.encode()), us)
        greeter.clock.follow(float(answer.server_time), (asked + time.time()) / 2)
        return answer

    answer = say(introduction(home, us, receipts_from=receipts))
    renew_if_due(answer, home=home, us=us, hello=say, reload=reload)
    rosters = update_rosters(answer.roster_digest, answer.roster_signature, us=us, state=greeter.state, pull=pull)
    told = list(answer.receipts)
    while answer.receipts and receipts + len(told) < answer.receipts_total:
        answer = say(introduction(home, us, receipts_from=receipts + len(told)))
        _require_once(answer.receipts, told)
        told += answer.receipts
    _require_all(answer, receipts, told)
    reconcile(told, ledger=greeter.ledger, state=greeter.state, us=us, pull=pull, clock=greeter.clock)
    # A coordinator that knows fewer than before lost some; all of them are told again next time.
    accounted = receipts + len(told)
    return Greeted(rosters=rosters, receipts=accounted if accounted <= answer.receipts_total else 0)


def _require_once(page: list[ToldReceipt], told: list[ToldReceipt]) -> None:
    """Refuse a page that was told before: whoever tells the same for ever would keep us here, and fill our memory."""
    known = {(one.receipt.run, one.receipt.round) for one in told}
    if any((one.receipt.run, one.receipt.round) in known for one in page):
        raise VerificationError("expected each receipt once in the coordinator's pages, got one again")


def _require_all(answer: HelloAnswer, receipts: int, told: list[ToldReceipt]) -> None:
    if receipts + len(told) < answer.receipts_total:
        raise VerificationError(
            f"expected {answer.receipts_total} receipts as the coordinator announced, it told {receipts + len(told)}: "
            "what was spent cannot be compared with the ledger"
        )
