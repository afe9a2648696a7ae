"""Certificates and CAs are taken over only when they check out, and at each instant the files are usable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from foedus_client import renewal
from foedus_client.config import Home, Membership
from foedus_client.renewal import introduction, renew_if_due
from foedus_protocols.authorities import bundle_pem, fingerprints, sign_authorities
from foedus_protocols.certificates import CertificateAuthority, make_request, parse_certificate, parse_certificates
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.hello import HelloAnswer, HelloRequest
from foedus_protocols.identity import generate_signing_key, generate_tls_key, load_tls_key, public_hex, save_key

LEAGUE = "test-league"
DAYS = timedelta(days=1)


@dataclass
class Coordinator:
    """Answers hello as a coordinator with these CAs does; the newest signs."""

    us: Membership
    operator: Any
    cas: list[CertificateAuthority]
    renew: bool = False
    minor: int = 1
    said: list[HelloRequest] = field(default_factory=list)
    reloads: list[list[str]] = field(default_factory=list)
    issue: Callable[[bytes], bytes] | None = None

    def hello(self, request: HelloRequest) -> HelloAnswer:
        self.said.append(request)
        trusted = [one.certificate for one in self.cas]
        differs = set(request.authorities) != set(fingerprints(trusted))
        certificate = None
        if request.request is not None:
            certificate = (self.issue or self.sign)(request.request.encode()).decode()
            self.renew = False
        return HelloAnswer(
            protocol=1,
            minor=self.minor,
            federation=LEAGUE,
            org=self.us.org,
            operator_key=self.us.operator_key,
            roster_digest="1" * 64,
            roster_version=1,
            roster_signature="2" * 128,
            server_time=1.0,
            receipts_total=7,
            authorities=sign_authorities(self.operator, LEAGUE, trusted) if differs else None,
            renew=self.renew,
            certificate=certificate,
        )

    def sign(self, request: bytes, **more: Any) -> bytes:
        return self.cas[-1].issue_certificate(request, **({"org": self.us.org, "federation": LEAGUE} | more))


@dataclass
class Side:
    """An organisation's home and its coordinator."""

    home: Home
    us: Membership
    coordinator: Coordinator

    def greet(self, *, now: datetime | None = None) -> bool:
        def reload() -> None:
            self.home.tls.read()  # As the link does: what lies there is usable at each reload.
            self.coordinator.reloads.append(self.trusted())

        answer = self.coordinator.hello(introduction(self.home, self.us))
        return renew_if_due(answer, home=self.home, us=self.us, hello=self.coordinator.hello, reload=reload, now=now)

    def trusted(self) -> list[str]:
        return fingerprints(parse_certificates(self.home.tls.ca.read_bytes()))

    def serial(self) -> int:
        return parse_certificate(self.home.tls.certificate.read_bytes()).serial_number


@pytest.fixture
def side(tmp_path: Path) -> Side:
    home = Home(tmp_path / "home")
    home.make()
    operator, ca = generate_signing_key(), CertificateAuthority.create(LEAGUE)
    us = Membership(org="clinic", federation=LEAGUE, operator_key=public_hex(operator), link="127.0.0.1:1", proxy=None)
    save_key(home.tls.key, generate_tls_key())
    home.tls.ca.write_bytes(ca.pem)
    coordinator = Coordinator(us, operator, [ca])
    home.tls.certificate.write_bytes(coordinator.sign(make_request(load_tls_key(home.tls.key), "clinic")))
    return Side(home, us, coordinator)


def test_before_half_life_nothing_happens(side: Side) -> None:
    before = side.serial()
    assert not side.greet()
    assert not side.greet(now=datetime.now(UTC) + 6.9 * DAYS)
    assert (side.serial(), side.coordinator.reloads) == (before, [])
    assert all(one.request is None for one in side.coordinator.said)


@pytest.mark.parametrize("by_their_word", [False, True])
def test_at_half_life_or_at_the_coordinators_word_a_new_one_is_taken_over(side: Side, by_their_word: bool) -> None:
    side.coordinator.renew = by_their_word
    before, key = side.serial(), side.home.tls.key.read_bytes()
    assert side.greet(now=datetime.now(UTC) + (0 if by_their_word else 7.1) * DAYS)
    assert side.serial() != before
    assert side.home.tls.key.read_bytes() == key
    assert side.home.tls.read().name.org == "clinic"
    assert side.coordinator.reloads == [side.trusted()]
    assert side.coordinator.said[-1].receipts_from == 7  # What was told need not be told again.


def of_another_key(coordinator: Coordinator, request: bytes) -> bytes:
    return coordinator.sign(make_request(generate_tls_key(), "clinic"))


def of_another_name(coordinator: Coordinator, request: bytes) -> bytes:
    return coordinator.sign(request, org="bank")


def of_another_federation(coordinator: Coordinator, request: bytes) -> bytes:
    return coordinator.sign(request, federation="another-league")


def of_another_ca(coordinator: Coordinator, request: bytes) -> bytes:
    return CertificateAuthority.create(LEAGUE).issue_certificate(request, org="clinic", federation=LEAGUE)


def expired(coordinator: Coordinator, request: bytes) -> bytes:
    return coordinator.sign(request, now=datetime.now(UTC) - 20 * DAYS)


def not_yet_valid(coordinator: Coordinator, request: bytes) -> bytes:
    return coordinator.sign(request, now=datetime.now(UTC) + 20 * DAYS)


def garbage(coordinator: Coordinator, request: bytes) -> bytes:
    return b"-----BEGIN NOTHING-----"


@pytest.mark.parametrize(
    "issue",
    [of_another_key, of_another_name, of_another_federation, of_another_ca, expired, not_yet_valid, garbage],
)
def test_a_certificate_that_does_not_check_out_is_left(
    side: Side, issue: Callable[[Coordinator, bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    side.coordinator.renew = True
    side.coordinator.issue = lambda request: issue(side.coordinator, request)
    before = side.home.tls.certificate.read_bytes()
    with caplog.at_level(logging.ERROR):
        assert not side.greet()
    assert "the old one stays" in caplog.text
    assert side.home.tls.certificate.read_bytes() == before
    assert side.coordinator.reloads == []


def test_no_answer_to_a_request_is_said_and_borne(side: Side, caplog: pytest.LogCaptureFixture) -> None:
    side.coordinator.renew = True
    answers = iter([side.coordinator.hello(introduction(side.home, side.us)), None])
    first = next(answers)
    assert first is not None
    silent = first.model_copy(update={"certificate": None})
    assert not renew_if_due(first, home=side.home, us=side.us, hello=lambda _: silent, reload=lambda: None)
    assert "issued no new one" in caplog.text


def test_a_coordinator_that_issues_none_now_does_not_end_the_greeting(side: Side) -> None:
    side.coordinator.renew = True
    before = side.serial()

    def refuse(request: bytes) -> bytes:
        raise StateError("expected at most 10 certificates an hour")

    side.coordinator.issue = refuse
    assert not side.greet()
    assert side.serial() == before


# Rotation


def test_a_rotation_from_its_beginning_to_its_end(side: Side) -> None:
    coordinator = side.coordinator
    old, new = coordinator.cas[0], CertificateAuthority.create(LEAGUE)
    coordinator.cas, coordinator.renew = [old, new], True
    assert side.greet()
    assert side.trusted() == [old.fingerprint, new.fingerprint]
    assert fingerprints(parse_certificates(new.pem)) == [new.fingerprint]
    parse_certificate(side.home.tls.certificate.read_bytes()).verify_directly_issued_by(new.certificate)
    # The new connection trusts the new CA before the coordinator is told so, and then asks for a certificate of it.
    assert coordinator.reloads[0] == [old.fingerprint, new.fingerprint]
    assert [sorted(one.authorities) for one in coordinator.said[1:]] == [sorted([old.fingerprint, new.fingerprint])] * 2
    coordinator.cas = [new]
    assert side.greet()
    assert side.trusted() == [new.fingerprint]
    assert not side.greet()


def test_a_ca_that_is_dropped_before_we_followed_is_kept_until_we_did(side: Side) -> None:
    """The rotation was over before this daemon came back: at each reload its files are usable, and in the end new."""
    coordinator = side.coordinator
    old, new = coordinator.cas[0], CertificateAuthority.create(LEAGUE)
    coordinator.cas = [new]
    assert side.greet()
    assert coordinator.reloads == [[old.fingerprint, new.fingerprint]] * 2 + [[new.fingerprint]]
    assert side.trusted() == [new.fingerprint]


def test_without_a_certificate_of_the_new_one_the_old_ca_is_not_dropped(side: Side) -> None:
    coordinator = side.coordinator
    old, new = coordinator.cas[0], CertificateAuthority.create(LEAGUE)
    coordinator.cas, coordinator.issue = [new], lambda request: garbage(coordinator, request)
    assert side.greet()
    assert side.trusted() == [old.fingerprint, new.fingerprint]
    side.home.tls.read()


@pytest.mark.parametrize(("trusted", "replayed"), [("ab", "a"), ("b", "a"), ("b", "ab"), ("bc", "ab")])
def test_a_signed_bundle_of_before_a_rotation_is_not_taken_over(side: Side, trusted: str, replayed: str) -> None:
    """Who has the older CA's key, and the operator's signature of that time, must not turn a rotation back."""
    coordinator, start = side.coordinator, datetime.now(UTC) - 3 * DAYS
    cas = {one: CertificateAuthority.create(LEAGUE, now=start + at * DAYS) for at, one in enumerate("abc")}
    coordinator.cas = [cas[one] for one in trusted]
    side.home.tls.ca.write_bytes(bundle_pem([one.certificate for one in coordinator.cas]))
    key = load_tls_key(side.home.tls.key)
    side.home.tls.certificate.write_bytes(coordinator.sign(make_request(key, "clinic")))
    before = side.trusted(), side.serial()
    coordinator.cas, coordinator.renew = [cas[one] for one in replayed], True
    with pytest.raises(VerificationError, match="before a rotation"):
        side.greet()
    assert (side.trusted(), side.serial()) == before


def test_cas_that_the_operator_did_not_sign_stop_the_greeting(side: Side) -> None:
    coordinator = side.coordinator
    coordinator.operator = generate_signing_key()
    coordinator.cas, coordinator.renew = [coordinator.cas[0], CertificateAuthority.create(LEAGUE)], True
    before, certificate = side.trusted(), side.serial()
    with pytest.raises(VerificationError, match="signature"):
        side.greet()
    assert (side.trusted(), side.serial()) == (before, certificate)


def test_a_kill_after_any_write_leaves_usable_files(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that a rotation writes is the last one before a kill, once; the next greeting ends what was begun."""
    coordinator = side.coordinator
    write = renewal.write_durably
    for survived in range(1, 4):
        old, new = coordinator.cas[-1], CertificateAuthority.create(LEAGUE)
        coordinator.cas = [new]
        written: list[Path] = []

        def writing(path: Path, data: bytes, written: list[Path] = written, survived: int = survived) -> None:
            write(path, data)
            written.append(path)
            if len(written) == survived:
                raise KeyboardInterrupt

        with monkeypatch.context() as killing:
            killing.setattr(renewal, "write_durably", writing)
            with pytest.raises(KeyboardInterrupt):
                side.greet()
        side.home.tls.read()
        side.greet()
        assert side.trusted() == [new.fingerprint]
        assert old.fingerprint not in side.trusted()


def test_with_a_coordinator_of_1_0_nothing_is_asked(side: Side) -> None:
    side.coordinator.minor = 0
    side.coordinator.renew = True
    assert not side.greet(now=datetime.now(UTC) + 10 * DAYS)
    assert len(side.coordinator.said) == 1


def test_the_introduction_names_every_trusted_ca(side: Side) -> None:
    more = CertificateAuthority.create(LEAGUE)
    side.home.tls.ca.write_bytes(bundle_pem([side.coordinator.cas[0].certificate, more.certificate]))
    said = introduction(side.home, side.us, receipts_from=3)
    assert said.authorities == [side.coordinator.cas[0].fingerprint, more.fingerprint]
    assert (said.org, said.receipts_from, said.request) == ("clinic", 3, None)
