"""Keeping the TLS identity alive over the link: a new certificate at half life, and the CAs to trust.

A daemon that runs for months must not need a person for its certificate. At each hello it says which CAs it trusts;
the coordinator answers with the operator's signed bundle where that differs, and says when a certificate is due. The
daemon asks for a new one with a request for the same TLS key. Whatever comes is checked before it is written, each file
is replaced whole, and the order leaves a usable identity at each instant: CAs are added before a certificate of a new
one is taken over, and dropped only once our own certificate does not depend on them.

The signing key is not touched by any of this. A lost or expired identity needs a person (`join.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography import x509
from foedus_protocols.authorities import bundle_pem, fingerprints, open_authorities
from foedus_protocols.certificates import (
    certificate_name,
    check_issuer,
    check_own_certificate,
    half_life,
    make_request,
    parse_certificate,
    parse_certificates,
)
from foedus_protocols.errors import ConnectError, StateError, VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.hello import MINOR, PROGRAM, PROTOCOL, RENEWAL_MINOR, HelloAnswer, HelloRequest
from foedus_protocols.identity import PeerName, load_tls_key

from foedus_client.config import Home, Membership

_LOG = logging.getLogger("foedus.client")


def introduction(home: Home, us: Membership, *, receipts_from: int = 0, request: bytes | None = None) -> HelloRequest:
    """What we say of ourselves in hello.

    Args:
        home: Where our TLS files lie.
        us: Who we are.
        receipts_from: How many of our receipts were accounted for.
        request: A certificate request (PEM).
    """
    return HelloRequest(
        protocol=PROTOCOL,
        minor=MINOR,
        version=PROGRAM,
        org=us.org,
        receipts_from=receipts_from,
        authorities=fingerprints(_trusted(home)),
        request=None if request is None else request.decode(),
    )


def renew_if_due(
    answer: HelloAnswer,
    *,
    home: Home,
    us: Membership,
    hello: Callable[[HelloRequest], HelloAnswer],
    reload: Callable[[], None],
    now: datetime | None = None,
) -> bool:
    """Take over the CAs that a hello's answer brings, and renew our certificate where it is due.

    It is due at half life, or when the coordinator says so. A certificate that does not check out is logged and left;
    the one that we have goes on to serve, and the next hello tries again.

    Args:
        answer: What the coordinator said just now, checked (`membership.open_hello`).
        home: Where our TLS files lie.
        us: Who we are.
        hello: Says hello once more on the same link, and checks the answer.
        reload: Makes the link read its files again (`LinkClient.reload`).
        now: The moment to judge by; the present where absent.

    Returns:
        Whether anything was written.

    Raises:
        VerificationError: The CAs are not signed by the operator, or are of before a rotation that we saw. Nothing was
            written.
        ConnectError: The line broke.

    Guarantees:
        A CA is trusted only by the operator's signature, and a rotation is never turned back: whoever stole the key of
        the older CA cannot replay what the operator signed before. A certificate is written only if it is for our own
        TLS key and our own name, of a trusted CA, and valid now. A kill at any instant leaves files that
        `TlsFiles.read` accepts.
    """
    if answer.minor < RENEWAL_MINOR:
        return False
    now = now or datetime.now(UTC)
    told: list[x509.Certificate] | None = None
    if answer.authorities is not None:
        told = open_authorities(answer.authorities, operator_key=us.operator_key, federation=us.federation)
        _require_not_older(told, _trusted(home))
    written = told is not None and _add(home, told)
    if written:
        reload()
        answer = hello(introduction(home, us, receipts_from=answer.receipts_total))  # Says that we trust them now.
    if answer.renew or _is_due(home, told, now):
        key = load_tls_key(home.tls.key)
        asked = introduction(home, us, receipts_from=answer.receipts_total, request=make_request(key, us.org))
        if _take_over(home, us, _certificate(hello, asked)):
            reload()
            written = True
    if told is not None and _drop_all_but(home, told):
        reload()
        written = True
    return written


def _require_not_older(told: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> None:
    """Refuse a bundle of before a rotation that we saw: without our newest CA or a later one, or with an older one.

    A signed bundle has no number. The CAs' own dates, which the signature covers, tell which came first.
    """
    newest, known = max(map(_made, trusted)), set(fingerprints(trusted))
    added = [ca for ca, name in zip(told, fingerprints(told), strict=True) if name not in known]
    if max(map(_made, told)) < newest or any(_made(ca) < newest for ca in added):
        raise VerificationError(
            "expected CAs that continue those that we trust, got a bundle of before a rotation: ask the coordinator's "
            "administrator whether an old backup was restored; else somebody replays it"
        )


def _made(ca: x509.Certificate) -> datetime:
    return ca.not_valid_before_utc


def _is_due(home: Home, told: Sequence[x509.Certificate] | None, now: datetime) -> bool:
    ours = parse_certificate(home.tls.certificate.read_bytes())
    return now > half_life(ours) or (told is not None and not _is_of(ours, told))


def _certificate(hello: Callable[[HelloRequest], HelloAnswer], asked: HelloRequest) -> str | None:
    """What the coordinator issues on a request; None where it issues nothing now."""
    try:
        return hello(asked).certificate
    except StateError as error:  # Too many of late, for one. The certificate that we have serves meanwhile.
        _LOG.warning("%s", error)
        return None


def _take_over(home: Home, us: Membership, pem: str | None) -> bool:
    """Write a certificate that was issued to us; returns whether it is one that we can use."""
    if pem is None:
        _LOG.warning("our certificate is due, and the coordinator issued no new one; asking again at the next hello")
        return False
    try:
        fresh = parse_certificate(pem.encode())
        check_own_certificate(fresh, key=load_tls_key(home.tls.key), cas=_trusted(home))
        if certificate_name(fresh) != PeerName(federation=us.federation, org=us.org):
            raise VerificationError(f"expected a certificate for {us.org!r} in {us.federation!r}, got another name")
    except (ConnectError, VerificationError) as error:
        _LOG.error("the new certificate cannot be used, the old one stays: %s", error)
        return False
    write_durably(home.tls.certificate, pem.encode())
    _LOG.info("our certificate was renewed; it is valid until %s", f"{fresh.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    return True


def _add(home: Home, told: Sequence[x509.Certificate]) -> bool:
    """Trust the CAs in `told` beside those that we trust; returns whether there was one to add."""
    trusted = _trusted(home)
    known = set(fingerprints(trusted))
    added = [ca for ca, name in zip(told, fingerprints(told), strict=True) if name not in known]
    if added:
        write_durably(home.tls.ca, bundle_pem([*trusted, *added]))
        _LOG.info("by the operator's signature we trust a new CA: %s", ", ".join(fingerprints(added)))
    return bool(added)


def _drop_all_but(home: Home, told: Sequence[x509.Certificate]) -> bool:
    """Trust only the CAs in `told`, once our certificate is of one of them; returns whether there was one to drop."""
    dropped = set(fingerprints(_trusted(home))) - set(fingerprints(told))
    if not dropped or not _is_of(parse_certificate(home.tls.certificate.read_bytes()), told):
        return False
    write_durably(home.tls.ca, bundle_pem(told))
    _LOG.info("by the operator's signature we no longer trust a CA: %s", ", ".join(sorted(dropped)))
    return True


def _is_of(certificate: x509.Certificate, cas: Sequence[x509.Certificate]) -> bool:
    try:
        check_issuer(certificate, cas)
    except VerificationError:
        return False
    return True


def _trusted(home: Home) -> list[x509.Certificate]:
    return parse_certificates(home.tls.ca.read_bytes())
