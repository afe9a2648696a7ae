"""What an organisation knows when it checks a charter: the federation's roster, its own policy, bases and budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.charter_checks import OrgView, Stage
from foedus_protocols.errors import CheckpointError, VerificationError
from foedus_protocols.hello import MINOR, HelloAnswer, negotiate
from foedus_protocols.identity import public_hex, verify
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.roster import MAX_ROSTER_BYTES, ROSTER_CONTEXT, Roster, check_chain

from foedus_client.budget import budget_check
from foedus_client.config import Membership
from foedus_client.ledger import Ledger
from foedus_client.policy import Policy
from foedus_client.state import ClientState

MAX_ROSTERS = 10_000
_ROSTERS = "rosters"


def open_hello(answer: dict[str, Any], us: Membership) -> HelloAnswer:
    """Check a coordinator's introduction.

    Returns:
        What it says. Its `minor` may be lower or higher than ours by one; what is new in the higher one is absent.

    Raises:
        VerificationError: A version too far from ours (the text says which side to update), another federation or
            operator than we joined, or a field is missing.
    """
    said = HelloAnswer.decode(answer)
    negotiate(said, us="organisation", them="coordinator", minor=MINOR)
    expected = {"federation": us.federation, "org": us.org, "operator_key": us.operator_key}
    for name, value in expected.items():
        if getattr(said, name) != value:
            raise VerificationError(f"expected the {name} that we joined with in the coordinator's hello, got another")
    return said


def update_rosters(
    head: str, signature: str, *, us: Membership, state: ClientState, pull: Callable[[str, int], Path]
) -> list[Roster]:
    """Fetch the roster chain up to its signed head, and remember it.

    Raises:
        VerificationError: The head is not signed by the operator, the chain is broken, or it does not continue the one
            that we knew: the coordinator shows us another federation, or forgot members.

    Guarantees:
        Each roster names the digest of the one before, so the operator's signature of the head covers them all.
    """
    known = remembered(state, pull)
    chain: list[Roster] = []
    wanted: str | None = head
    while wanted is not None and len(chain) < MAX_ROSTERS:
        roster = _read(wanted, pull)
        if not chain:  # Before anything else is fetched.
            verify(us.operator_key, ROSTER_CONTEXT, roster.canonical(), signature)
        chain.append(roster)
        wanted = roster.previous
    chain.reverse()
    if chain[-1].digest != head or chain[-1].federation != us.federation:
        raise VerificationError(f"expected the roster of {us.federation!r} that hello names, got another")
    check_chain(chain)
    if chain[: len(known)] != known:
        raise VerificationError(
            "expected a roster that continues the one seen before, got another history: "
            "ask the coordinator's administrator whether an old backup was restored"
        )
    state.remember(_ROSTERS, canonical_bytes([roster.digest for roster in chain]).decode())
    return chain


def remembered(state: ClientState, pull: Callable[[str, int], Path]) -> list[Roster]:
    """The chain as it was last seen; empty before the first hello."""
    text = state.fact(_ROSTERS)
    return [] if text is None else [_read(digest, pull) for digest in parse_canonical(text.encode())]


def org_view(
    us: Membership,
    *,
    policy: Policy,
    ledger: Ledger,
    rosters: list[Roster],
    signing_key: Ed25519PrivateKey,
    stage: Stage,
    run: str,
    now: float,
) -> OrgView:
    """Everything that `check_charter` compares a charter of a run with."""
    limits = policy.limits()
    return OrgView(
        org=us.org,
        signing_key=public_hex(signing_key),
        federation=us.federation,
        operator_key=us.operator_key,
        rosters=rosters,
        limits=limits,
        base_configs=held_bases(policy),
        budget=budget_check(ledger, limits, stage, run),
        now=now,
    )


def held_bases(policy: Policy) -> dict[str, dict[str, Any]]:
    """Digest to ``config.json`` of the bases that the policy allows and whose folder is there and says the same digest.

    The weights' own digests are compared when the worker loads them.
    """
    held = {}
    for base in policy.bases:
        folder = Path(base.path)
        try:
            if read_manifest(folder).digest == base.digest:
                held[base.digest] = read_config(folder)
        except CheckpointError:
            continue  # A base that is gone is a base that we do not hold: check 7 says so.
    return held


def _read(digest: str, pull: Callable[[str, int], Path]) -> Roster:
    return Roster.parse(pull(digest, MAX_ROSTER_BYTES).read_bytes())
