"""One CA takes another's place without a moment at which a member that follows could not connect."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from foedus_coordinator import service
from foedus_coordinator.config import Home
from foedus_protocols.authorities import fingerprints, open_authorities
from foedus_protocols.certificates import check_issuer, make_request, parse_certificate
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.hello import HelloAnswer
from foedus_protocols.identity import generate_tls_key, public_hex

DAY = timedelta(days=1)


def shown(home: Home) -> str:
    """The CA under which the ports show their certificate; the files are what `TlsFiles.read` accepts."""
    leaf = home.tls.read().certificate
    issuer = check_issuer(leaf, home.authorities.trusted())
    assert fingerprints([issuer]) == [home.shown_ca]
    return home.shown_ca


def serial(home: Home, org: str) -> str:
    pem = home.members.requests(org)[0].certificate_pem
    assert pem is not None
    return f"{parse_certificate(pem).serial_number:x}"


def say_hello(federation: Any, org: str, *, trusts: list[str], minor: int = 1, **more: Any) -> HelloAnswer:
    body = {"protocol": 1, "minor": minor, "version": "0.1.0", "org": org, "authorities": trusts} | more
    return HelloAnswer.decode(federation.desk.hello(org, body, serial(federation.home, org)))


def follow(federation: Any) -> None:
    """Everybody trusts what there is."""
    trusts = fingerprints(federation.home.authorities.trusted())
    for org in federation.orgs:
        say_hello(federation, org, trusts=trusts)


def test_the_newest_ca_signs_members_at_once_and_the_ports_once_all_trust_it(federation: Any) -> None:
    home = federation.home
    old = home.authority.fingerprint
    follow(federation)
    new = home.authorities.rotate("test").fingerprint
    assert fingerprints(home.authorities.trusted()) == [old, new]
    assert home.authority.fingerprint == new
    assert (home.renew_certificate(), shown(home)) == (False, old)
    for org in ("alpha", "beta"):
        say_hello(federation, org, trusts=[old, new])
    assert home.who_distrusts(new) == ["gamma"]
    assert (home.renew_certificate(), shown(home)) == (False, old)
    say_hello(federation, "gamma", trusts=[old, new])
    assert (home.renew_certificate(), shown(home)) == (True, new)
    say_hello(federation, "gamma", trusts=[old])  # Never back: others may have dropped the old one.
    assert (home.renew_certificate(), shown(home)) == (False, new)


def test_a_clock_before_the_present_cas_making_makes_no_later_one(federation: Any) -> None:
    home = federation.home
    before = home.authorities.bundle.read_bytes(), sorted(home.authorities.bundle.parent.glob("keys/*"))
    with pytest.raises(StateError, match="clock"):
        home.authorities.rotate("test", now=datetime.now(UTC) - DAY)
    assert (home.authorities.bundle.read_bytes(), sorted(home.authorities.bundle.parent.glob("keys/*"))) == before


def test_the_ports_certificate_is_renewed_at_half_life_by_the_ca_that_signs_it(federation: Any) -> None:
    home = federation.home
    now, old = datetime.now(UTC), home.authority.fingerprint
    home.authorities.rotate("test")
    assert not home.renew_certificate(now=now + 14 * DAY)
    assert home.renew_certificate(now=now + 16 * DAY)
    assert parse_certificate(home.tls.certificate.read_bytes()).not_valid_after_utc > now + 45 * DAY
    assert home.shown_ca == old


def test_retiring_leaves_the_newest_alone_and_erases_the_key(federation: Any) -> None:
    home = federation.home
    old, keys = home.authority.fingerprint, home.root / "keys"
    with pytest.raises(StateError, match="one CA only"):
        home.authorities.retire()
    new = home.authorities.rotate("test").fingerprint
    with pytest.raises(StateError, match="rotation is going on"):
        home.authorities.rotate("test")
    home.show_under(home.authority)
    assert home.authorities.retire() == [old]
    assert fingerprints(home.authorities.trusted()) == [new]
    assert shown(home) == new
    assert sorted(path.name for path in keys.iterdir()) == [f"ca-{new[:16]}.pem", "operator.pem", "tls.pem"]
    newer = home.authorities.rotate("test").fingerprint  # And on to the next.
    assert fingerprints(home.authorities.trusted()) == [new, newer]


def test_a_kill_in_the_middle_of_a_rotation_leaves_a_home_that_works(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is written first; without the bundle nobody trusts it, and the next rotation makes another."""
    home = federation.home
    old = home.authority.fingerprint
    with monkeypatch.context() as broken:
        broken.setattr(type(home.authorities), "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            home.authorities.rotate("test")
    assert home.authority.fingerprint == shown(home) == old
    assert home.authorities.rotate("test").fingerprint != old


# What hello says of it


def test_hello_tells_the_signed_bundle_to_who_trusts_another_one(federation: Any) -> None:
    home = federation.home
    old = home.authority.fingerprint
    assert say_hello(federation, "alpha", trusts=[old]).authorities is None
    new = home.authorities.rotate("test").fingerprint
    told = say_hello(federation, "alpha", trusts=[old]).authorities
    assert told is not None
    cas = open_authorities(told, operator_key=public_hex(home.operator_key), federation="test")
    assert fingerprints(cas) == [old, new]
    assert say_hello(federation, "alpha", trusts=[new, old]).authorities is None
    home.show_under(home.authority)
    home.authorities.retire()
    told = say_hello(federation, "alpha", trusts=[new, old]).authorities
    assert told is not None
    assert "".join(told.pem.split()) == "".join(home.authority.pem.decode().split())


def test_hello_says_when_a_certificate_is_due(federation: Any) -> None:
    home = federation.home
    old = home.authority.fingerprint
    assert not say_hello(federation, "alpha", trusts=[old]).renew
    new = home.authorities.rotate("test").fingerprint
    assert say_hello(federation, "alpha", trusts=[old]).renew  # Its CA is on its way out.
    home.show_under(home.authority)
    home.authorities.retire()
    federation.desk = dataclasses.replace(federation.desk, clock=lambda: time.time() + 6.5 * 86_400)
    assert not say_hello(federation, "alpha", trusts=[new]).renew
    federation.desk = dataclasses.replace(federation.desk, clock=lambda: time.time() + 7.5 * 86_400)
    assert say_hello(federation, "alpha", trusts=[new]).renew


def test_a_request_in_hello_gets_a_certificate_of_the_newest_ca(federation: Any) -> None:
    home = federation.home
    home.authorities.rotate("test")
    csr = make_request(generate_tls_key(), "whoever").decode()
    answer = say_hello(federation, "alpha", trusts=[], request=csr)
    assert answer.certificate is not None
    fresh = parse_certificate(answer.certificate.encode())
    check_issuer(fresh, [home.authority.certificate])
    home.members.gate.check("alpha", f"{fresh.serial_number:x}")
    with pytest.raises(VerificationError, match="certificate request"):
        say_hello(federation, "alpha", trusts=[], request="no request")


def test_who_speaks_1_0_is_told_nothing_new(federation: Any) -> None:
    federation.home.authorities.rotate("test")
    body = {"protocol": 1, "org": "alpha"}
    said = federation.desk.hello("alpha", body, serial(federation.home, "alpha"))
    assert not {"authorities", "certificate"} & said.keys()
    assert (said["renew"], said["receipts"]) == (False, [])
    noted = federation.home.members.introductions()["alpha"]
    assert (noted.protocol, noted.trusts) == ("1.0", ())


def test_a_hello_in_anothers_name_is_refused(federation: Any) -> None:
    with pytest.raises(VerificationError, match="another organisation's"):
        federation.desk.hello("alpha", {"protocol": 1, "org": "beta"}, serial(federation.home, "alpha"))


@pytest.mark.parametrize(("ours", "theirs", "older"), [(2, 0, "organisation"), (0, 2, "coordinator")])
def test_too_far_a_version_is_refused_and_not_noted(
    federation: Any, monkeypatch: pytest.MonkeyPatch, ours: int, theirs: int, older: str
) -> None:
    monkeypatch.setattr(service, "MINOR", ours)
    with pytest.raises(VerificationError, match=f"update the {older}"):
        say_hello(federation, "alpha", trusts=[], minor=theirs)
    assert federation.home.members.introductions()["alpha"] is None


def test_a_new_home_shows_its_one_ca(federation: Any, tmp_path: Path) -> None:
    assert shown(federation.home) == federation.home.authority.fingerprint
