"""Who else is a member, and whose key a person here has compared.

The coordinator could invent members. What makes a member real is a fingerprint that somebody compared over another
channel and that the policy has from then on; a charter with an unconfirmed member is refused (check 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from foedus_protocols.errors import VerificationError
from foedus_protocols.link_client import LinkClient
from foedus_protocols.roster import Member
from foedus_protocols.store import FileStore

from foedus_client import policy
from foedus_client.config import Home
from foedus_client.membership import open_hello, update_rosters
from foedus_client.renewal import introduction
from foedus_client.state import ClientState


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One member as it stands in the policy."""

    org: str
    state: Literal["ourselves", "confirmed", "unconfirmed", "another key"]
    fingerprint: str


def fetch_members(home: Home) -> tuple[Member, ...]:
    """The current members, by the coordinator's signed roster.

    Raises:
        ConnectError: It cannot be reached.
        VerificationError: Its roster is not signed, or forgets what was seen.
    """
    us = home.membership()
    state = ClientState(home.state)
    store = FileStore(home.files)
    try:
        with LinkClient(us.link, home.tls, proxy=us.proxy) as link:
            answer = open_hello(link.hello(introduction(home, us).encode()), us)
            chain = update_rosters(
                answer.roster_digest,
                answer.roster_signature,
                us=us,
                state=state,
                pull=lambda digest, limit: link.pull(digest, store, max_bytes=limit),
            )
    finally:
        state.close()
    return chain[-1].members


def confirm_members(
    home: Home,
    members: tuple[Member, ...],
    wanted: Mapping[str, str | None],
    *,
    everybody: bool,
    ask: Callable[[str, str], bool],
) -> list[Peer]:
    """Confirm the wanted members, and tell how all of them stand.

    Args:
        wanted: Organisation to the fingerprint that was read out; None asks a person.
        everybody: Confirm all, unseen.
        ask: Puts a fingerprint before a person.

    Raises:
        VerificationError: A fingerprint is not the roster's, or there is no such member.
        ConfigError: Another key was confirmed before.
    """
    us = home.load().org
    found = {member.id: member.fingerprint for member in members}
    compared = {org for org in found if everybody and org != us}
    for org, fingerprint in wanted.items():
        if org not in found:
            raise VerificationError(f"expected a member to confirm, {org!r} is none; see `foedus client peers`")
        if fingerprint is not None and fingerprint != found[org]:
            raise VerificationError(
                f"expected the key {fingerprint[:16]}... of {org}, the coordinator's roster has {found[org][:16]}...: "
                "do not sign with this member; ask both sides"
            )
        if fingerprint is not None or ask(org, found[org]):
            compared.add(org)
    if compared:
        policy.confirm_peers(home.policy, {org: found[org] for org in sorted(compared)})
    confirmed = policy.load(home.policy).peers
    return [
        Peer(org=org, state=_state(org, us, confirmed, fingerprint), fingerprint=fingerprint)
        for org, fingerprint in sorted(found.items())
    ]


def _state(
    org: str, us: str, confirmed: Mapping[str, str], fingerprint: str
) -> Literal["ourselves", "confirmed", "unconfirmed", "another key"]:
    if org == us:
        return "ourselves"
    if org not in confirmed:
        return "unconfirmed"
    return "confirmed" if confirmed[org] == fingerprint else "another key"
