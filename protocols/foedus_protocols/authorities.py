"""The CAs that a federation trusts, as the operator tells them: how one CA takes another's place.

For a while both are trusted. The operator signs the whole bundle, so that a CA cannot name its own successor: whoever
steals the CA's key, or the machine that answers on the link, still cannot add one without the operator's signing key.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.certificates import is_ca, parse_certificates
from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import Authorities
from foedus_protocols.identity import sign, spki_fingerprint, verify

AUTHORITIES_CONTEXT = "foedus/authorities/1"
MAX_AUTHORITIES = 4


def bundle_pem(cas: Sequence[x509.Certificate]) -> bytes:
    """CA certificates one after the other, as a file holds them; oldest first."""
    return b"".join(ca.public_bytes(Encoding.PEM) for ca in cas)


def fingerprints(cas: Sequence[x509.Certificate]) -> list[str]:
    """The SPKI fingerprints of CAs, in their order."""
    return [spki_fingerprint(ca) for ca in cas]


def sign_authorities(key: Ed25519PrivateKey, federation: str, cas: Sequence[x509.Certificate]) -> Authorities:
    """Sign a bundle as the operator."""
    pem = bundle_pem(cas).decode()
    return Authorities(pem=pem, signature=sign(key, AUTHORITIES_CONTEXT, _signed_bytes(federation, pem)))


def open_authorities(authorities: Authorities, *, operator_key: str, federation: str) -> list[x509.Certificate]:
    """The CAs of a signed bundle.

    Raises:
        VerificationError: Not signed by this operator for this federation, or not one to four CA certificates.
    """
    verify(operator_key, AUTHORITIES_CONTEXT, _signed_bytes(federation, authorities.pem), authorities.signature)
    cas = parse_certificates(authorities.pem.encode())
    if len(cas) > MAX_AUTHORITIES or not all(map(is_ca, cas)):
        raise VerificationError(f"expected one to {MAX_AUTHORITIES} CA certificates, got {len(cas)} certificates")
    return cas


def _signed_bytes(federation: str, pem: str) -> bytes:
    return canonical_bytes({"federation": federation, "pem": pem})
