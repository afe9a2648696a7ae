"""Names, keys, signatures and fingerprints.

Every organisation has two keys, both made at its own side and never sent:

* a **TLS key** (P-256, since gRPC refuses Ed25519 leaves) with a short certificate from the federation's CA
  (`certificates.py`), which names the organisation by the URI ``spiffe://FEDERATION/org/ID``;
* a **signing key** (Ed25519). What binds an organisation is this signature, not the channel.

Left out: hardware keys and post-quantum signatures.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.files import write_durably

COORDINATOR = "coordinator"  # The sender name of the coordinator; no organisation may be called this.
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
