"""What a certificate opens ends with the membership, in this process at once and in others within a second."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from foedus_coordinator import certificates
from foedus_coordinator.certificates import Gate
from foedus_coordinator.config import Home
from foedus_coordinator.tables import nodes
from foedus_protocols import channel
from foedus_protocols.certificates import make_request, parse_certificate
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.identity import generate_signing_key, generate_tls_key, public_hex
from foedus_protocols.messages import CharterOffer
from foedus_protocols.roster import check_chain

DAY = 86_400.0


def serial_of(pem: bytes | None) -> str:
    assert pem is not None
    return f"{parse_certificate(pem).serial_number:x}"


def held(home: Home, org: str) -> str:
    """The serial number of the certificate that an organisation enrolled with last."""
    approved = [one for one in home.members.requests(org) if one.state == "approved"]
    return serial_of(approved[0].certificate_pem)


def ask(home: Home, org: str, *, signing_key: str | None = None) -> Any:
    return home.members.request(
        org,
        home.members.invite(org),
        csr_pem=make_request(generate_tls_key(), org),
        signing_key=signing_key or public_hex(generate_signing_key()),
    )


def refused(home: Home, org: str, serial: str) -> None:
    with pytest.raises(VerificationError, match="revoked, replaced or never issued"):
        home.members.gate.check(org, serial)


def test_revoking_takes_everything_at_once(federation: Any) -> None:
    home = federation.home
    serial, before = held(home, "alpha"), home.members.roster()
    home.members.gate.check("alpha", serial)
    unused, waiting = home.members.invite("alpha"), ask(home, "alpha")
    after = home.members.revoke("alpha", key=home.operator_key)
    check_chain([before, after])
    assert [member.id for member in after.members] == ["beta", "gamma"]
    refused(home, "alpha", serial)
    home.members.gate.check("beta", held(home, "beta"))
    assert home.members.find(waiting.id).state == "refused"
    with pytest.raises(VerificationError, match="a token for alpha"):
        home.members.request("alpha", unused, csr_pem=waiting.csr_pem, signing_key=waiting.signing_key)
    with pytest.raises(VerificationError, match="'alpha' is not one"):
        home.members.revoke("alpha", key=home.operator_key)


def test_another_processs_revocation_is_seen_within_a_second(federation: Any) -> None:
    """The gate's memory and the watch's interval together stay below a second; the first is shown, not only stated."""
    now = [0.0]
    gate, serial = Gate(federation.home.storage, clock=lambda: now[0]), held(federation.home, "alpha")
    gate.check("alpha", serial)
    other = Home(federation.root)
    other.members.revoke("alpha", key=other.operator_key)
    other.storage.close()
    now[0] += certificates._FRESH_SECONDS / 2
    gate.check("alpha", serial)  # Still from memory: a transfer of a thousand chunks does not read a thousand times.
    now[0] += certificates._FRESH_SECONDS / 2
    with pytest.raises(VerificationError):
        gate.check("alpha", serial)
    assert certificates._FRESH_SECONDS + channel._WATCH_SECONDS < 1.0


def test_a_newcomer_is_let_in_without_a_wait(federation: Any) -> None:
    gate = Gate(federation.home.storage, clock=lambda: 0.0)
    gate.check("alpha", held(federation.home, "alpha"))
    other = Home(federation.root)
    request = ask(other, "delta")
    other.members.approve(request, authority=other.authority, key=other.operator_key)
    gate.check("delta", held(other, "delta"))
    other.storage.close()


def test_a_revoked_organisation_can_enrol_anew(federation: Any) -> None:
    home = federation.home
    old, node = held(home, "alpha"), home.members.node_of("alpha")
    home.members.revoke("alpha", key=home.operator_key)
    home.members.approve(ask(home, "alpha"), authority=home.authority, key=home.operator_key)
    home.members.gate.check("alpha", held(home, "alpha"))
    refused(home, "alpha", old)
    assert home.members.node_of("alpha") == node


def test_lost_keys_are_replaced_by_a_removal_and_an_entry(federation: Any) -> None:
    home = federation.home
    old, before = held(home, "alpha"), home.members.roster()
    request = ask(home, "alpha")
    with pytest.raises(StateError, match="expected alpha to be no member"):
        home.members.approve(request, authority=home.authority, key=home.operator_key)
    with pytest.raises(StateError, match="the member that was shown"):
        home.members.approve(request, authority=home.authority, key=home.operator_key, replacing="0" * 64)
    assert home.members.roster() == before
    shown = before.member("alpha").fingerprint
    after = home.members.approve(request, authority=home.authority, key=home.operator_key, replacing=shown)
    assert after.version == before.version + 2
    assert after.member("alpha").signing_key == request.signing_key
    refused(home, "alpha", old)
    home.members.gate.check("alpha", held(home, "alpha"))


def test_the_same_signing_key_gets_a_certificate_and_leaves_the_roster(federation: Any) -> None:
    home = federation.home
    old, before = held(home, "alpha"), home.members.roster()
    member = before.member("alpha")
    request = ask(home, "alpha", signing_key=member.signing_key)
    after = home.members.approve(request, authority=home.authority, key=home.operator_key, replacing=member.fingerprint)
    assert after == before
    refused(home, "alpha", old)
    home.members.gate.check("alpha", held(home, "alpha"))


def test_mail_of_an_ended_membership_waits_for_nobody(federation: Any) -> None:
    federation.start_run()
    run = federation.run()
    signature = run.storage.run(run.id).operator_signature
    run.ask(
        "charter",
        dict.fromkeys(run.orgs, CharterOffer(charter_digest=run.charter.digest, operator_signature=signature)),
    )
    run.storage.close()
    assert federation.home.mailbox.next_open("alpha") is not None
    federation.home.members.revoke("alpha", key=federation.home.operator_key)
    assert federation.home.mailbox.next_open("alpha") is None
    assert federation.home.mailbox.next_open("beta") is not None


# Renewal


def test_renewing_needs_a_certificate_that_still_counts(federation: Any) -> None:
    home = federation.home
    serial, csr = held(home, "alpha"), make_request(generate_tls_key(), "alpha")
    fresh = home.members.renew("alpha", serial, csr, authority=home.authority)
    home.members.gate.check("alpha", serial_of(fresh))
    home.members.gate.check("alpha", serial)  # The old one goes on: the answer may have been lost.
    for org, other in (("alpha", "00"), ("beta", serial)):
        with pytest.raises(VerificationError, match="a valid certificate"):
            home.members.renew(org, other, csr, authority=home.authority)
    home.members.revoke("alpha", key=home.operator_key)
    with pytest.raises(VerificationError, match="'alpha' is not one"):
        home.members.renew("alpha", serial, csr, authority=home.authority)
    home.members.approve(ask(home, "alpha"), authority=home.authority, key=home.operator_key)
    with pytest.raises(VerificationError, match="a valid certificate"):
        home.members.renew("alpha", serial, csr, authority=home.authority)


def test_certificates_are_not_issued_without_end(federation: Any) -> None:
    home = federation.home
    serial, csr, now = held(home, "alpha"), make_request(generate_tls_key(), "alpha"), time.time() + DAY
    for _ in range(10):
        home.members.renew("alpha", serial, csr, authority=home.authority, now=now)
    with pytest.raises(StateError, match="an hour"):
        home.members.renew("alpha", serial, csr, authority=home.authority, now=now + 60)
    home.members.renew("beta", held(home, "beta"), csr, authority=home.authority, now=now + 60)
    home.members.renew("alpha", serial, csr, authority=home.authority, now=now + 3700)


def test_a_renewed_certificate_begins_when_it_is_issued(federation: Any) -> None:
    home = federation.home
    csr, now = make_request(generate_tls_key(), "alpha"), time.time() + 3 * DAY
    pem = home.members.renew("alpha", held(home, "alpha"), csr, authority=home.authority, now=now)
    ends = parse_certificate(pem).not_valid_after_utc
    assert abs((ends - datetime.fromtimestamp(now, UTC)).total_seconds() - 14 * DAY) < 2
    issued = home.members.certificate(serial_of(pem))
    assert issued is not None
    assert (issued.org, issued.issuer) == ("alpha", home.authority.fingerprint)
    assert issued.expires == ends.timestamp()


def test_an_introduction_is_noted_and_forgotten_with_the_keys(federation: Any) -> None:
    home = federation.home
    assert home.members.introductions() == {"alpha": None, "beta": None, "gamma": None}
    said = {"protocol": 1, "minor": 1, "version": "9.9", "org": "alpha", "authorities": [home.authority.fingerprint]}
    federation.desk.hello("alpha", said, held(home, "alpha"))
    noted = home.members.introductions()["alpha"]
    assert noted is not None
    assert (noted.protocol, noted.version) == ("1.1", "9.9")
    assert (noted.trusts, noted.issuer) == ((home.authority.fingerprint,), home.authority.fingerprint)
    shown = home.members.roster().member("alpha").fingerprint
    home.members.approve(ask(home, "alpha"), authority=home.authority, key=home.operator_key, replacing=shown)
    assert home.members.introductions()["alpha"] is None
    with home.storage.read() as connection:
        assert connection.execute(nodes.select().where(nodes.c.org == "alpha")).one().version is None
