"""CAs are trusted by the operator's word alone."""

from __future__ import annotations

import pytest
from foedus_protocols.authorities import fingerprints, open_authorities, sign_authorities
from foedus_protocols.certificates import (
    CertificateAuthority,
    check_issuer,
    half_life,
    is_ca,
    make_request,
    parse_certificate,
    parse_certificates,
)
from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import Authorities
from foedus_protocols.identity import generate_signing_key, generate_tls_key, public_hex

LEAGUE = "test-league"
OPERATOR = generate_signing_key()
OLD, NEW = (CertificateAuthority.create(LEAGUE) for _ in range(2))
LEAF = parse_certificate(
    NEW.issue_certificate(make_request(generate_tls_key(), "clinic"), org="clinic", federation=LEAGUE)
)


def opened(signed: Authorities, *, operator: str | None = None, federation: str = LEAGUE) -> list[str]:
    key = operator or public_hex(OPERATOR)
    return fingerprints(open_authorities(signed, operator_key=key, federation=federation))


def test_a_signed_bundle_opens_in_its_order() -> None:
    signed = sign_authorities(OPERATOR, LEAGUE, [OLD.certificate, NEW.certificate])
    assert opened(signed) == [OLD.fingerprint, NEW.fingerprint]


def test_another_operator_federation_or_bundle_is_refused() -> None:
    signed = sign_authorities(OPERATOR, LEAGUE, [NEW.certificate])
    with pytest.raises(VerificationError, match="signature"):
        opened(signed, operator=public_hex(generate_signing_key()))
    with pytest.raises(VerificationError, match="signature"):
        opened(signed, federation="another")
    with pytest.raises(VerificationError, match="signature"):
        opened(signed.model_copy(update={"pem": OLD.pem.decode()}))


@pytest.mark.parametrize("cas", [[LEAF], [NEW.certificate] * 5, [NEW.certificate, LEAF]])
def test_what_is_no_short_list_of_cas_is_refused_even_signed(cas: list[object]) -> None:
    with pytest.raises(VerificationError, match="CA certificates"):
        opened(sign_authorities(OPERATOR, LEAGUE, cas))  # type: ignore[arg-type]


def test_a_certificate_names_its_issuer_among_several() -> None:
    assert check_issuer(LEAF, [OLD.certificate, NEW.certificate]) == NEW.certificate
    with pytest.raises(VerificationError, match="another CA"):
        check_issuer(LEAF, [OLD.certificate])
    assert [is_ca(one) for one in (LEAF, NEW.certificate)] == [False, True]


def test_half_of_a_life_is_half_of_it() -> None:
    due = half_life(LEAF)
    assert due - LEAF.not_valid_before_utc == LEAF.not_valid_after_utc - due


@pytest.mark.parametrize("pem", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_bytes_that_are_no_certificates_are_refused(pem: bytes) -> None:
    with pytest.raises(VerificationError, match="PEM certificates"):
        parse_certificates(pem)
