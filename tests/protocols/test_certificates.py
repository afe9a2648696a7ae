from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from foedus_protocols import certificates, identity
from foedus_protocols.certificates import (
    CertificateAuthority,
    certificate_name,
    check_own_certificate,
    parse_certificate,
)
from foedus_protocols.errors import ConfigError, ConnectError, VerificationError

LEAGUE = "test-league"


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority.create(LEAGUE)


def issue(ca: CertificateAuthority, request: bytes, **more) -> x509.Certificate:
    return parse_certificate(ca.issue_certificate(request, org="clinic", federation=LEAGUE, **more))


def test_the_ca_ignores_the_names_in_a_request(ca):
    key = identity.generate_tls_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"spiffe://{LEAGUE}/org/bank")])
    wanted = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{LEAGUE}/org/bank")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(wanted, critical=False)
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    certificate = issue(ca, request)
    assert certificate_name(certificate) == identity.PeerName(federation=LEAGUE, org="clinic")
    assert b"bank" not in certificate.public_bytes(serialization.Encoding.DER)


def test_an_organisation_cannot_serve_and_the_coordinator_cannot_call(ca):
    key = identity.generate_tls_key()
    client = issue(ca, certificates.make_request(key, "clinic"))
    chain = ca.issue_server_certificate(key.public_key(), federation=LEAGUE, hosts=["127.0.0.1", "hub.example"])
    server, behind = x509.load_pem_x509_certificates(chain)

    def usage(certificate):
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert usage(client) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert usage(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert behind == ca.certificate
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert certificate_name(server).org == identity.COORDINATOR


def test_requests_without_possession_or_of_another_kind_are_refused(ca):
    good = x509.load_pem_x509_csr(certificates.make_request(identity.generate_tls_key(), "clinic"))
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # The signature's last byte.
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clinic")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    p384 = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    ed = builder.sign(ed25519.Ed25519PrivateKey.generate(), None)
    others = [request.public_bytes(serialization.Encoding.PEM) for request in (p384, ed)]
    for request in (
        forged,
        *others,
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ):
        with pytest.raises(VerificationError):
            issue(ca, request)


def test_life_times_and_names_have_bounds(ca):
    request = certificates.make_request(identity.generate_tls_key(), "clinic")
    for days in (6, 31):
        with pytest.raises(ConfigError):
            issue(ca, request, days=days)
    with pytest.raises(ConfigError):
        ca.issue_certificate(request, org="coordinator", federation=LEAGUE)
    with pytest.raises(ConfigError):
        ca.issue_server_certificate(identity.generate_tls_key().public_key(), federation=LEAGUE, hosts=[])


def test_a_party_knows_what_is_wrong_with_its_own_certificate(ca):
    key, now = identity.generate_tls_key(), datetime.now(UTC)
    request = certificates.make_request(key, "clinic")

    def check(certificate, key=key, authority=ca):
        check_own_certificate(certificate, key=key, cas=[authority.certificate])

    check(issue(ca, request))
    with pytest.raises(ConnectError, match="expired"):
        check(issue(ca, request, days=7, now=now - timedelta(days=8)))
    with pytest.raises(ConnectError, match="set the clock"):
        check(issue(ca, request, now=now + timedelta(hours=1)))
    with pytest.raises(ConnectError, match="another key"):
        check(issue(ca, request), key=identity.generate_tls_key())
    with pytest.raises(ConnectError, match="another CA"):
        check(issue(ca, request), authority=CertificateAuthority.create(LEAGUE))


def test_a_certificate_must_have_exactly_one_name(ca):
    with pytest.raises(VerificationError, match="got 0"):
        certificate_name(ca.certificate)
    with pytest.raises(VerificationError):
        parse_certificate(b"nothing")


def test_a_saved_ca_is_the_same_ca(ca, tmp_path: Path):
    ca.save(tmp_path / "ca.pem", tmp_path / "ca.key")
    again = CertificateAuthority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    assert again.fingerprint == ca.fingerprint
    assert again.key.public_key() == again.certificate.public_key()
    assert CertificateAuthority.create(LEAGUE).fingerprint != ca.fingerprint
