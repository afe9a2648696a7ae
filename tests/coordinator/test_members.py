"""Tokens are good for one use, one name and one day; approval and roster are one transaction."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from foedus_coordinator.config import Home
from foedus_protocols.certificates import check_issuer, make_request, parse_certificate
from foedus_protocols.errors import ConfigError, StateError, VerificationError
from foedus_protocols.identity import generate_signing_key, generate_tls_key, public_hex
from foedus_protocols.roster import Roster, check_chain

CSR = make_request(generate_tls_key(), "delta")
KEY = public_hex(generate_signing_key())


def ask(home: Home, org: str, token: str, **changes: Any) -> Any:
    return home.members.request(org, token, **({"csr_pem": CSR, "signing_key": KEY} | changes))


def test_a_token_is_used_once(federation: Any) -> None:
    token = federation.home.members.invite("delta")
    request = ask(federation.home, "delta", token)
    assert request.state == "pending"
    assert ask(federation.home, "delta", token) == request  # The same request again, after a lost reply.
    with pytest.raises(StateError, match="this one was used"):
        ask(federation.home, "delta", token, signing_key=public_hex(generate_signing_key()))


def test_a_token_expires(federation: Any) -> None:
    token = federation.home.members.invite("delta", now=1000.0)
    with pytest.raises(StateError, match="has expired"):
        ask(federation.home, "delta", token, now=1000.0 + 24 * 3600 + 1)
    assert federation.home.members.requests("delta") == []


def test_a_token_is_for_one_name_and_the_newest_one_counts(federation: Any) -> None:
    first = federation.home.members.invite("delta")
    with pytest.raises(VerificationError, match="a token for echo"):
        ask(federation.home, "echo", first)
    federation.home.members.invite("delta")
    with pytest.raises(VerificationError, match="a token for delta"):
        ask(federation.home, "delta", first)


def test_no_token_is_kept(federation: Any) -> None:
    token = federation.home.members.invite("delta")
    with sqlite3.connect(federation.root / "coordinator.db") as database:
        dump = "\n".join(database.iterdump())
    assert token not in dump


def test_a_reserved_or_malformed_name_gets_no_token(federation: Any) -> None:
    for org in ("coordinator", "Upper", ""):
        with pytest.raises(ConfigError):
            federation.home.members.invite(org)


def test_approval_makes_the_next_roster(federation: Any) -> None:
    home = federation.home
    before = home.members.roster()
    request = ask(home, "delta", home.members.invite("delta"))
    after = home.members.approve(request, authority=home.authority, key=home.operator_key)
    check_chain([before, after])
    assert after.member("delta").signing_key == KEY
    pem = home.members.find(request.id).certificate_pem
    assert pem is not None
    check_issuer(parse_certificate(pem), home.authorities.trusted())
    assert home.members.node_of("delta") not in {home.members.node_of(one) for one in ("alpha", "beta", "gamma")}
    with pytest.raises(StateError, match="it is approved"):
        home.members.approve(request, authority=home.authority, key=home.operator_key)


def test_a_key_that_is_taken_is_refused_and_changes_nothing(federation: Any) -> None:
    home = federation.home
    taken = home.members.roster().member("alpha").signing_key
    request = ask(home, "delta", home.members.invite("delta"), signing_key=taken)
    with pytest.raises(StateError):
        home.members.approve(request, authority=home.authority, key=home.operator_key)
    assert home.members.find(request.id).state == "pending"
    assert [member.id for member in home.members.roster().members] == ["alpha", "beta", "gamma"]


def test_every_roster_is_a_file_that_members_may_pull(federation: Any) -> None:
    roster = federation.home.members.roster()
    chain = [roster]
    while chain[0].previous is not None:
        chain.insert(0, Roster.parse(federation.desk.path_of("alpha", chain[0].previous).read_bytes()))
    check_chain(chain)
    assert [one.version for one in chain] == [0, 1, 2, 3]


def test_strangers_have_no_node(federation: Any) -> None:
    with pytest.raises(StateError):
        federation.home.members.node_of("stranger")
