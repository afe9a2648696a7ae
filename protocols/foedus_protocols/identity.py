"""Keys, signatures, fingerprints and the private certificate authority of a federation.

Every organisation has two keys, both made at its own side and never sent:

* a **TLS key** (P-256, since gRPC refuses Ed25519 leaves) with a short certificate from the federation's CA. The
  certificate carries the organisation's id as the URI ``spiffe://FEDERATION/org/ID`` and nothing else that counts;
* a **signing key** (Ed25519). What binds an organisation is this signature, not the channel.

The CA ignores every name inside a certificate request: the name comes from the one-time token that the request arrived
with. Certificates live 7 to 30 days and are renewed at half life, which is the revocation of last resort; the roster is
checked at each call (`link.py`). Left out: hardware keys, a CRL (gRPC's Python API has none), post-quantum signatures.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from foedus_protocols.errors import ConfigError, ConnectError, StateError, VerificationError
from foedus_protocols.files import write_durably

COORDINATOR = "coordinator"  # The sender name of the coordinator; no organisation may be called this.
MIN_CERTIFICATE_DAYS = 7
MAX_CERTIFICATE_DAYS = 30
_CA_DAYS = 3650
_CLOCK_SKEW = timedelta(minutes=5)  # Certificates are backdated by this, so that a slow clock can use them at once.
_SIGNATURE_PREFIX = b"foedus-signature/1\0"
_ORG_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_FEDERATION_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_CONTEXT_PATTERN = re.compile(r"foedus/[a-z0-9-]+/[0-9]+")

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey


# Names


@dataclass(frozen=True, kw_only=True)
class PeerName:
    """Who a certificate speaks for: an organisation, or the coordinator (`org` is then ``coordinator``)."""

    federation: str
    org: str

    @property
    def uri(self) -> str:
        """The SPIFFE URI of this name."""
        if self.org == COORDINATOR:
            return f"spiffe://{self.federation}/{COORDINATOR}"
        return f"spiffe://{self.federation}/org/{self.org}"

    @classmethod
    def parse(cls, uri: str) -> PeerName:
        """Read a SPIFFE URI.

        Raises:
            VerificationError: The URI names neither an organisation nor a coordinator.
        """
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/")
        if scheme == "spiffe" and _FEDERATION_PATTERN.fullmatch(parts[0]):
            if parts[1:] == [COORDINATOR]:
                return cls(federation=parts[0], org=COORDINATOR)
            if len(parts) == 3 and parts[1] == "org" and parts[2] != COORDINATOR and _ORG_PATTERN.fullmatch(parts[2]):
                return cls(federation=parts[0], org=parts[2])
        raise VerificationError(f"expected spiffe://FEDERATION/org/ID or spiffe://FEDERATION/coordinator, got {uri!r}")


def check_org_id(org: str) -> None:
    """Refuse an organisation id that is malformed or reserved.

    Raises:
        ConfigError: Not lower-case letters, digits and dashes (63 at most), or the coordinator's own name.
    """
    if org == COORDINATOR or not _ORG_PATTERN.fullmatch(org):
        raise ConfigError(
            f"expected an organisation id of 1 to 63 lower-case letters, digits and dashes, not {COORDINATOR!r}; "
            f"got {org!r}"
        )


def check_federation_name(federation: str) -> None:
    """Refuse a federation name that cannot stand in a URI.

    Raises:
        ConfigError: Not lower-case letters, digits, dots and dashes (63 at most).
    """
    if not _FEDERATION_PATTERN.fullmatch(federation):
        raise ConfigError(
            f"expected a federation name of 1 to 63 lower-case letters, digits, dots and dashes; got {federation!r}"
        )


# Signatures


def generate_signing_key() -> Ed25519PrivateKey:
    """A fresh Ed25519 key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def generate_tls_key() -> EllipticCurvePrivateKey:
    """A fresh P-256 key from the operating system's generator."""
    return generate_private_key(SECP256R1())


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half of a signing key, as 64 hexadecimal characters."""
    return key.public_key().public_bytes_raw().hex()


def _signed_bytes(context: str, data: bytes) -> bytes:
    """What Ed25519 sees; the context holds no NUL byte, so that (context, data) is read back in one way only."""
    if not _CONTEXT_PATTERN.fullmatch(context):
        raise ConfigError(f"expected a signature context such as 'foedus/charter/1', got {context!r}")
    return _SIGNATURE_PREFIX + context.encode() + b"\0" + data


def sign(key: Ed25519PrivateKey, context: str, data: bytes) -> str:
    """Sign bytes for one purpose.

    Args:
        key: The signer's key.
        context: The purpose, ``foedus/NAME/VERSION``.
        data: Any bytes; for values, their canonical encoding.

    Returns:
        The signature, as 128 hexadecimal characters.

    Guarantees:
        A signature made for one context verifies for no other context and for no other bytes.
    """
    return key.sign(_signed_bytes(context, data)).hex()


def verify(public: str, context: str, data: bytes, signature: str) -> None:
    """Check a signature of `sign`.

    Raises:
        VerificationError: The key or the signature is malformed, or the signature is not this key's over these bytes
            in this context.
    """
    message = _signed_bytes(context, data)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise VerificationError(
            f"expected a signature by key {public[:16]}... in context {context}, got one that does not check out"
        ) from error


# Fingerprints


def key_fingerprint(public: str) -> str:
    """SHA-256 of a signing key's 32 bytes; two people compare it over another channel."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()


def spki_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's public key (SubjectPublicKeyInfo), as 64 hexadecimal characters."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def human_fingerprint(fingerprint: str) -> str:
    """A fingerprint in groups of four characters, for reading aloud. All of it: a shortened one can be imitated."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def parse_fingerprint(text: str) -> str:
    """Read a fingerprint as a person types or pastes it: groups, colons, capitals and ``sha256:`` are accepted.

    Raises:
        ConfigError: Not 64 hexadecimal characters.
    """
    plain = re.sub(r"[\s:-]", "", text.strip().lower().removeprefix("sha256:"))
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise ConfigError(f"expected a SHA-256 fingerprint of 64 hexadecimal characters, got {len(plain)} characters")
    return plain


# Key files


def save_key(path: Path, key: PrivateKey, *, password: bytes | None = None) -> None:
    """Write a private key as PKCS #8 PEM.

    Args:
        path: A file that does not exist yet: keys are never overwritten.
        key: The key.
        password: Encrypts the file where given.

    Raises:
        StateError: The file exists.

    Guarantees:
        The file never exists with a mode other than 0600, and is on the disk in full or not at all.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    write_durably(path, pem, mode=0o600, overwrite=False)


def _read_private(path: Path) -> bytes:
    """The bytes of a key file that only its owner can read."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077 or status.st_uid != os.geteuid():
                raise ConfigError(
                    f"expected key file {path} to be readable by its owner alone, got mode "
                    f"{status.st_mode & 0o777:04o} and owner {status.st_uid}; run: chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise ConfigError(f"expected a readable key file at {path}, got: {error.strerror}") from error


def _load_key(path: Path, password: bytes | None) -> object:
    pem = _read_private(path)
    try:
        return serialization.load_pem_private_key(pem, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"expected a PEM private key in {path} that the given password opens, got none") from error


def load_signing_key(path: Path, *, password: bytes | None = None) -> Ed25519PrivateKey:
    """Read an Ed25519 key file.

    Raises:
        ConfigError: Missing, readable by group or world, of another owner, of another type, or not opened by the
            password.
    """
    key = _load_key(path, password)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"expected an Ed25519 key in {path}, got {type(key).__name__}")
    return key


def load_tls_key(path: Path, *, password: bytes | None = None) -> EllipticCurvePrivateKey:
    """Read a P-256 key file; raises as `load_signing_key` does."""
    key = _load_key(path, password)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise ConfigError(f"expected a P-256 key in {path}, got {type(key).__name__}")
    return key


def key_pem(key: PrivateKey) -> bytes:
    """A key as unencrypted PEM, for gRPC's credentials; it stays in memory."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# Certificates


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
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise VerificationError(f"expected a PEM certificate, got {len(pem)} bytes that hold none") from error


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
    certificate: x509.Certificate, *, key: EllipticCurvePrivateKey, ca: x509.Certificate, now: datetime | None = None
) -> None:
    """Say before dialling what the other side would not: it answers a bad certificate with "Socket closed".

    Raises:
        ConnectError: Expired, not yet valid (or this clock is wrong), for another key, or from another CA.
    """
    now = now or datetime.now(UTC)
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        raise ConnectError(f"expected a valid certificate, ours expired at {ends:%Y-%m-%d %H:%M} UTC; enrol again")
    if now < starts:
        raise ConnectError(
            f"expected a certificate that is valid now, ours starts at {starts:%Y-%m-%d %H:%M} UTC and this clock says "
            f"{now:%Y-%m-%d %H:%M} UTC; set the clock"
        )
    if certificate.public_key() != key.public_key():
        raise ConnectError("expected a certificate for our TLS key, ours is for another key; enrol again")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConnectError("expected a certificate from the federation's CA, ours is another CA's; join again") from error


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
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationError("expected a PEM certificate request, got bytes that are not one") from error
    if not valid or not isinstance(public, EllipticCurvePublicKey) or not isinstance(public.curve, SECP256R1):
        raise VerificationError("expected a certificate request for a P-256 key, signed by that key; got another")
    return public


__all__ = [name for name in dir() if not name.startswith("_")]
