"""The private certificate authority of a federation, and the certificates that it issues.

The CA ignores every name inside a certificate request: the name comes from the one-time token that the request arrived
with. Certificates live 7 to 30 days and are renewed at half life; that is the revocation of last resort, since gRPC's
Python API has no CRL. What removes a member at once is the coordinator's list of certificates, which is looked at in
each call (`link.py`). A CA is replaced by another while both are trusted (`authorities.py`).

An organisation's certificate is for clients only and the coordinator's for servers only, so that no organisation can
pose as the coordinator to another.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from foedus_protocols.errors import ConfigError, ConnectError, VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import (
    COORDINATOR,
    PeerName,
    check_federation_name,
    check_org_id,
    generate_tls_key,
    load_tls_key,
    save_key,
    spki_fingerprint,
)

MIN_CERTIFICATE_DAYS = 7
MAX_CERTIFICATE_DAYS = 30
_CA_DAYS = 3650
_CLOCK_SKEW = timedelta(minutes=5)  # Certificates are backdated by this, so that a slow clock can use them at once.
# What the library raises for a certificate of which a part cannot be read (found by fuzzing, tests/fuzz).
_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def make_request(key: EllipticCurvePrivateKey, org: str) -> bytes:
    """A certificate request (PEM), which proves possession of the TLS key. Its name is a hint that the CA ignores."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, org)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def parse_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate in PEM bytes.

    Raises:
        VerificationError: There is none.
    """
    try:
        return _whole(x509.load_pem_x509_certificate(pem))
    except _MALFORMED as error:
        raise VerificationError(f"expected a PEM certificate, got {len(pem)} bytes that hold none") from error


def parse_der_certificate(der: bytes) -> x509.Certificate:
    """A certificate as a TLS server shows it.

    Raises:
        VerificationError: It is none.
    """
    try:
        return _whole(x509.load_der_x509_certificate(der))
    except _MALFORMED as error:
        raise VerificationError(f"expected a certificate, got {len(der)} bytes that are none") from error


def parse_certificates(pem: bytes) -> list[x509.Certificate]:
    """All certificates in PEM bytes, at least one, in their order.

    Raises:
        VerificationError: There is none, or one is malformed.
    """
    try:
        found = list(map(_whole, x509.load_pem_x509_certificates(pem)))
    except _MALFORMED as error:
        raise VerificationError(f"expected PEM certificates, got {len(pem)} bytes that hold none") from error
    if not found:
        raise VerificationError(f"expected PEM certificates, got {len(pem)} bytes that hold none")
    return found


def _whole(certificate: x509.Certificate) -> x509.Certificate:
    """A certificate whose parts can all be read: the library parses key and extensions when they are asked for."""
    certificate.public_key()
    _ = certificate.extensions
    return certificate


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def half_life(certificate: x509.Certificate) -> datetime:
    """When a certificate is due to be renewed."""
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return starts + (ends - starts) / 2


def check_issuer(certificate: x509.Certificate, cas: Sequence[x509.Certificate]) -> x509.Certificate:
    """The CA among `cas` that signed a certificate.

    Raises:
        VerificationError: None of them did.
    """
    for ca in cas:
        try:
            certificate.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return ca
    raise VerificationError(f"expected a certificate of one of {len(cas)} trusted CAs, got another CA's")


def certificate_name(certificate: x509.Certificate) -> PeerName:
    """The one SPIFFE name in a certificate. The subject and its common name are never looked at.

    Raises:
        VerificationError: None, more than one, or not a name of this protocol.
    """
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    if len(uris) != 1:
        raise VerificationError(f"expected one SPIFFE URI in the certificate, got {len(uris)}")
    return PeerName.parse(uris[0])


@dataclass(frozen=True)
class CertificateAuthority:
    """The private CA of a federation. Its identity is its key: it depends on no version, build or project name."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    @classmethod
    def create(cls, federation: str, *, now: datetime | None = None) -> CertificateAuthority:
        """Make a CA with a fresh key, valid for ten years, that can sign leaves and no further CA."""
        check_federation_name(federation)
        now = now or datetime.now(UTC)
        key = generate_tls_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Foedus CA of {federation}"[:64])])
        builder = _builder(name, name, key.public_key(), now=now, days=_CA_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(ca=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(certificate=builder.sign(key, hashes.SHA256()), key=key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> CertificateAuthority:
        """Read a CA that `save` wrote."""
        return cls(certificate=parse_certificate(certificate.read_bytes()), key=load_tls_key(key))

    def save(self, certificate: Path, key: Path) -> None:
        """Write both files; neither may exist."""
        save_key(key, self.key)
        write_durably(certificate, self.pem, mode=0o644, overwrite=False)

    @property
    def pem(self) -> bytes:
        """The CA's own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """What an organisation pins when it joins."""
        return spki_fingerprint(self.certificate)

    def issue_certificate(
        self, request_pem: bytes, *, org: str, federation: str, days: int = 14, now: datetime | None = None
    ) -> bytes:
        """Sign an organisation's certificate (client use only).

        Args:
            request_pem: The organisation's certificate request; only its key is used.
            org: The id that the token is bound to.
            federation: The federation's name.
            days: Life time, 7 to 30.
            now: The start of validity; the present where absent.

        Returns:
            The certificate as PEM.

        Raises:
            VerificationError: The request is malformed, signed by another key, or for a key that is not P-256.
            ConfigError: `days`, `org` or `federation` is out of range.
        """
        check_org_id(org)
        public = _requested_key(request_pem)
        name = PeerName(federation=federation, org=org)
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name.uri)]
        return self._leaf(public, name, alternatives, ExtendedKeyUsageOID.CLIENT_AUTH, days=days, now=now)

    def issue_server_certificate(
        self,
        public: EllipticCurvePublicKey,
        *,
        federation: str,
        hosts: Sequence[str],
        days: int = MAX_CERTIFICATE_DAYS,
        now: datetime | None = None,
    ) -> bytes:
        """Sign the coordinator's certificate (server use only) for the DNS names and IP addresses it is dialled at.

        Returns:
            The certificate and the CA's, as PEM: a joining organisation learns the CA from this chain and checks it
            against its pin.
        """
        if not hosts:
            raise ConfigError("expected at least one host name or address for the coordinator's certificate, got none")
        name = PeerName(federation=federation, org=COORDINATOR)
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name.uri), *map(_host_name, hosts)]
        return self._leaf(public, name, alternatives, ExtendedKeyUsageOID.SERVER_AUTH, days=days, now=now) + self.pem

    def _leaf(
        self,
        public: EllipticCurvePublicKey,
        name: PeerName,
        alternatives: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        *,
        days: int,
        now: datetime | None,
    ) -> bytes:
        if not MIN_CERTIFICATE_DAYS <= days <= MAX_CERTIFICATE_DAYS:
            raise ConfigError(
                f"expected a certificate life of {MIN_CERTIFICATE_DAYS} to {MAX_CERTIFICATE_DAYS} days, got {days}"
            )
        check_federation_name(name.federation)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name.org)])
        builder = _builder(subject, self.certificate.subject, public, now=now or datetime.now(UTC), days=days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_own_certificate(
    certificate: x509.Certificate,
    *,
    key: EllipticCurvePrivateKey,
    cas: Sequence[x509.Certificate],
    now: datetime | None = None,
) -> None:
    """Say before dialling what the other side would not: it answers a bad certificate with "Socket closed".

    Args:
        certificate: Ours.
        key: Our TLS key.
        cas: The CAs that we trust: two while one takes the other's place.
        now: The moment to judge by; the present where absent.

    Raises:
        ConnectError: Expired, not yet valid (or this clock is wrong), for another key, or from another CA.
    """
    now = now or datetime.now(UTC)
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        raise ConnectError(
            f"expected a valid certificate, ours expired at {ends:%Y-%m-%d %H:%M} UTC and this clock says "
            f"{now:%Y-%m-%d %H:%M} UTC. If the clock is right it can no longer be renewed over the link: an "
            "organisation asks the coordinator's administrator for an invitation and joins again with `foedus client "
            "join --again --keep-signing-key`; a coordinator renews its own with `foedus coordinator up`"
        )
    if now < starts:
        raise ConnectError(
            f"expected a certificate that is valid now, ours starts at {starts:%Y-%m-%d %H:%M} UTC and this clock says "
            f"{now:%Y-%m-%d %H:%M} UTC; set the clock"
        )
    if certificate.public_key() != key.public_key():
        raise ConnectError("expected a certificate for our TLS key, ours is for another key; enrol again")
    try:
        check_issuer(certificate, cas)
    except VerificationError as error:
        raise ConnectError(
            "expected a certificate from the federation's CA, ours is another CA's; join again"
        ) from error


def _builder(
    subject: x509.Name, issuer: x509.Name, public: EllipticCurvePublicKey, *, now: datetime, days: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _CLOCK_SKEW).not_valid_after(now + timedelta(days=days))


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _requested_key(request_pem: bytes) -> EllipticCurvePublicKey:
    """The key of a certificate request, once its proof of possession holds."""
    try:
        request = x509.load_pem_x509_csr(request_pem)
        valid = request.is_signature_valid
        public = request.public_key()
    except _MALFORMED as error:
        raise VerificationError("expected a PEM certificate request, got bytes that are not one") from error
    if not valid or not isinstance(public, EllipticCurvePublicKey) or not isinstance(public.curve, SECP256R1):
        raise VerificationError("expected a certificate request for a P-256 key, signed by that key; got another")
    return public
