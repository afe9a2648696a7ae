"""Who may join, who has asked, and who is in: tokens, enrolment requests, the roster's versions, and certificates.

The command line approves in one process while the service answers in another, so everything is read from the database
at each call. A token is 256 random bits, good for one use and at most a day; the database keeps its digest only.

A member that lost its keys asks again under its own id: approving that takes the old key out of the roster and puts the
new one in, so that nothing that was signed under the old one goes on. One that only let its certificate run out asks
with the same signing key, and nothing but its certificate changes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.certificates import CertificateAuthority
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.identity import check_org_id, key_fingerprint
from foedus_protocols.roster import Roster, SignedRoster
from foedus_protocols.store import FileStore
from sqlalchemy import Connection, Row, func, select

from foedus_coordinator import certificates
from foedus_coordinator.figures import publish
from foedus_coordinator.storage import Storage
from foedus_coordinator.tables import messages, nodes, requests, rosters, tokens

TOKEN_SECONDS = 24 * 3600
_TOKEN_BYTES = 32
_ASK_AGAIN = "the administrator makes another with: foedus coordinator invite"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One organisation's request to join. `fingerprint` is of its signing key: people compare it."""

    id: str
    org: str
    csr_pem: bytes
    signing_key: str
    fingerprint: str
    state: Literal["pending", "approved", "refused"]
    certificate_pem: bytes | None
    created: float


@dataclass(frozen=True, kw_only=True)
class Introduced:
    """What a member's last hello said.

    Attributes:
        protocol: ``MAJOR.MINOR``.
        version: The program's.
        trusts: Fingerprints of the CAs that it trusts.
        issuer: The fingerprint of the CA that signed the certificate that it came with.
    """

    protocol: str
    version: str
    trusts: tuple[str, ...]
    issuer: str


class Members:
    """The membership tables, and the roster files that members pull.

    Attributes:
        gate: Says who may call (`certificates.Gate`).
    """

    def __init__(self, storage: Storage, files: FileStore) -> None:
        self._storage = storage
        self._files = files
        self.gate = certificates.Gate(storage)

    # Tokens

    def invite(self, org: str, *, now: float | None = None) -> str:
        """Make a token for one organisation; an unused one that it had is void from now on.

        Returns:
            The token, which is written nowhere.
        """
        check_org_id(org)
        now = time.time() if now is None else now
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._storage.write() as connection:
            connection.execute(tokens.delete().where(tokens.c.org == org, tokens.c.used_at.is_(None)))
            connection.execute(tokens.insert().values(digest=_digest(token), org=org, expires=now + TOKEN_SECONDS))
        return token

    def request(self, org: str, token: str, *, csr_pem: bytes, signing_key: str, now: float | None = None) -> Request:
        """Use a token up and keep the request that came with it; the same request may come again.

        Raises:
            VerificationError: The token is unknown, or another organisation's.
            StateError: It was used, or has expired.
        """
        now = time.time() if now is None else now
        request_id = hashlib.sha256(_digest(token).encode() + csr_pem + signing_key.encode()).hexdigest()
        with self._storage.write() as connection:
            known = connection.execute(select(requests).where(requests.c.id == request_id)).first()
            if known is not None and known.org == org:
                return Request(**known._mapping)
            row = connection.execute(select(tokens).where(tokens.c.digest == _digest(token))).first()
            if row is None or row.org != org:
                raise VerificationError(f"expected a token for {org}, got one that is not; {_ASK_AGAIN} {org}")
            if row.used_at is not None:
                raise StateError(f"expected a fresh token for {org}, this one was used; {_ASK_AGAIN} {org}")
            if row.expires < now:
                raise StateError(f"expected a fresh token for {org}, this one has expired; {_ASK_AGAIN} {org}")
            connection.execute(tokens.update().where(tokens.c.digest == row.digest).values(used_at=now))
            values = {
                "id": request_id,
                "org": org,
                "csr_pem": csr_pem,
                "signing_key": signing_key,
                "fingerprint": key_fingerprint(signing_key),
                "state": "pending",
                "created": now,
            }
            connection.execute(requests.insert().values(**values))
        return self.find(request_id)

    # Requests

    def find(self, request_id: str) -> Request:
        """One request.

        Raises:
            VerificationError: There is none of this id.
        """
        with self._storage.read() as connection:
            row = connection.execute(select(requests).where(requests.c.id == request_id)).first()
        if row is None:
            raise VerificationError("expected the id of an enrolment request, got one that is unknown; join again")
        return Request(**row._mapping)

    def requests(self, org: str | None = None) -> list[Request]:
        """Requests, newest first, of one organisation or of all."""
        found = select(requests).order_by(requests.c.created.desc())
        if org is not None:
            found = found.where(requests.c.org == org)
        with self._storage.read() as connection:
            return [Request(**row._mapping) for row in connection.execute(found)]

    def approve(
        self,
        request: Request,
        *,
        authority: CertificateAuthority,
        key: Ed25519PrivateKey,
        replacing: str | None = None,
        now: float | None = None,
    ) -> Roster:
        """Let a requester in: certificate and roster become visible in one transaction.

        A member's older certificates are revoked. Where its signing key is another than before, the roster gets two
        versions: one without the member, one with its new key. The caller ends the runs that it took part in.

        Args:
            request: A pending request.
            authority: The CA that signs the certificate.
            key: The operator's signing key.
            replacing: The fingerprint of the member's present signing key that a person saw; None for a newcomer.
            now: Unix seconds; the present where absent.

        Raises:
            StateError: It is decided already, its key is another member's, or the member's present key is not the one
                that the person saw.
        """
        now = time.time() if now is None else now
        with self._storage.write() as connection:
            state = connection.execute(select(requests.c.state).where(requests.c.id == request.id)).scalar()
            if state != "pending":
                raise StateError(f"expected a pending request of {request.org}, it is {state}")
            roster = _current(connection)
            pem = authority.issue_certificate(
                request.csr_pem, org=request.org, federation=roster.federation, now=datetime.fromtimestamp(now, UTC)
            )
            current = _fingerprint_in(roster, request.org)
            if current != replacing:
                shown = "no member" if replacing is None else "the member that was shown"
                raise StateError(
                    f"expected {request.org} to be {shown}, the roster says otherwise; look at the fingerprints again "
                    "with `foedus coordinator approve`"
                )
            if current != request.fingerprint:
                versions = [roster.remove(request.org)] if current is not None else []
                before = versions[-1] if versions else roster
                versions.append(before.add(request.org, request.signing_key, since=int(now)))
                for version in versions:
                    self._append(connection, version, key)
                roster = versions[-1]
                _withdraw_mail(connection, request.org)
            certificates.revoke(connection, now, org=request.org)
            self._record(connection, pem, request.org, request.signing_key, authority)
            _forget_introduction(connection, request.org)
            connection.execute(
                requests.update().where(requests.c.id == request.id).values(state="approved", certificate_pem=pem)
            )
        self.gate.forget()
        return roster

    def revoke(self, org: str, *, key: Ed25519PrivateKey, now: float | None = None) -> Roster:
        """Take a member out: roster, certificates, tokens, open requests and mail, in one transaction.

        The caller ends the runs that it took part in. Open streams end within a second, at their next look at `gate`.

        Raises:
            VerificationError: No member.
        """
        now = time.time() if now is None else now
        with self._storage.write() as connection:
            roster = _current(connection).remove(org)
            self._append(connection, roster, key)
            certificates.revoke(connection, now, org=org)
            connection.execute(tokens.delete().where(tokens.c.org == org, tokens.c.used_at.is_(None)))
            connection.execute(
                requests.update().where(requests.c.org == org, requests.c.state == "pending").values(state="refused")
            )
            _withdraw_mail(connection, org)
        self.gate.forget()
        return roster

    # Certificates

    def renew(
        self, org: str, serial: str, csr_pem: bytes, *, authority: CertificateAuthority, now: float | None = None
    ) -> bytes:
        """Issue a further certificate to a member that called with a valid one; the old one goes on until it expires.

        Args:
            org: The caller.
            serial: The certificate that it called with.
            csr_pem: Its request.
            authority: The CA that signs.
            now: Unix seconds; the present where absent.

        Returns:
            The certificate (PEM).

        Raises:
            VerificationError: The caller's certificate was revoked meanwhile, or the request is malformed.
            StateError: Too many in the last hour.
        """
        now = time.time() if now is None else now
        with self._storage.write() as connection:
            roster, held = _current(connection), certificates.find(connection, serial)
            member = roster.member(org)
            if held is None or held.org != org or held.signing_key != member.signing_key or held.revoked_at is not None:
                raise VerificationError(f"expected a valid certificate of {org!r} to renew, got one that is not")
            certificates.require_pace(connection, org, now)
            pem = authority.issue_certificate(
                csr_pem, org=org, federation=roster.federation, now=datetime.fromtimestamp(now, UTC)
            )
            self._record(connection, pem, org, member.signing_key, authority)
        self.gate.forget()
        return pem

    def certificate(self, serial: str) -> certificates.Issued | None:
        """One certificate, or None where it was never issued."""
        with self._storage.read() as connection:
            return certificates.find(connection, serial)

    def revoke_other_issuers(self, issuer: str, *, now: float | None = None) -> int:
        """Revoke every certificate that another CA than this one issued; returns how many it were."""
        with self._storage.write() as connection:
            count = certificates.revoke(connection, time.time() if now is None else now, unless_issuer=issuer)
        self.gate.forget()
        return count

    def _record(
        self, connection: Connection, pem: bytes, org: str, signing_key: str, authority: CertificateAuthority
    ) -> None:
        certificates.record(connection, pem, org=org, signing_key=signing_key, issuer=authority.fingerprint)

    # Rosters

    def found(self, federation: str, key: Ed25519PrivateKey) -> Roster:
        """Write version 0 of the roster, which is empty."""
        roster = Roster.genesis(federation)
        with self._storage.write() as connection:
            self._append(connection, roster, key)
        return roster

    def roster(self) -> Roster:
        """The current version."""
        with self._storage.read() as connection:
            return _current(connection)

    def version(self) -> int:
        """The current version's number."""
        with self._storage.read() as connection:
            return int(connection.execute(select(func.max(rosters.c.version))).scalar() or 0)

    def signed_roster(self) -> SignedRoster:
        """The current version with the operator's signature."""
        with self._storage.read() as connection:
            row = connection.execute(select(rosters).order_by(rosters.c.version.desc()).limit(1)).one()
        return SignedRoster(roster=Roster.parse(row.body), signature=row.signature)

    def _append(self, connection: Connection, roster: Roster, key: Ed25519PrivateKey) -> None:
        signed = SignedRoster.make(key, roster)
        digest = self._files.put_bytes(roster.canonical())
        connection.execute(
            rosters.insert().values(
                version=roster.version,
                digest=digest,
                body=roster.canonical(),
                signature=signed.signature,
                created=time.time(),
            )
        )
        publish(connection, digest)

    # Flower's node ids

    def node_of(self, org: str) -> int:
        """The integer by which Flower knows an organisation.

        Raises:
            StateError: It never was a member.
        """
        with self._storage.read() as connection:
            node = connection.execute(select(nodes.c.node_id).where(nodes.c.org == org)).scalar()
        if node is None:
            raise StateError(f"expected a member, {org!r} never was one")
        return int(node)

    def introduce(self, org: str, said: Introduced) -> None:
        """Note what a member's hello said."""
        values = {
            "protocol": said.protocol,
            "version": said.version,
            "authorities": json.dumps({"trusts": said.trusts, "issuer": said.issuer}),
        }
        with self._storage.write() as connection:
            connection.execute(nodes.update().where(nodes.c.org == org).values(**values))

    def introductions(self) -> dict[str, Introduced | None]:
        """What each current member's last hello said; None where it has said none since it was let in."""
        with self._storage.read() as connection:
            orgs = [member.id for member in _current(connection).members]
            rows = {row.org: row for row in connection.execute(select(nodes))}
        return {org: _introduced(rows.get(org)) for org in orgs}

    def seen(self, org: str, at: float) -> None:
        """Note when an organisation was last heard of."""
        with self._storage.write() as connection:
            connection.execute(nodes.update().where(nodes.c.org == org).values(last_seen=at))

    def last_seen(self) -> dict[str, float | None]:
        """When each organisation was last heard of, in Unix seconds."""
        with self._storage.read() as connection:
            return {row.org: row.last_seen for row in connection.execute(select(nodes).order_by(nodes.c.org))}


def _current(connection: Connection) -> Roster:
    row = connection.execute(select(rosters.c.body).order_by(rosters.c.version.desc()).limit(1)).first()
    if row is None:
        raise StateError("expected a roster, this home has none; run `foedus coordinator init` first")
    return Roster.parse(row.body)


def _fingerprint_in(roster: Roster, org: str) -> str | None:
    """The fingerprint of a member's signing key, or None where there is no such member."""
    return next((member.fingerprint for member in roster.members if member.id == org), None)


def _withdraw_mail(connection: Connection, org: str) -> None:
    """What was asked of a membership that ended waits for no answer."""
    open_mail = (messages.c.org == org, messages.c.state == "open")
    connection.execute(messages.update().where(*open_mail).values(state="withdrawn"))


def _forget_introduction(connection: Connection, org: str) -> None:
    """Make sure that an organisation has a node id, and forget what an earlier home of it said in hello."""
    if connection.execute(select(nodes.c.node_id).where(nodes.c.org == org)).first() is None:
        connection.execute(nodes.insert().values(org=org))
    connection.execute(nodes.update().where(nodes.c.org == org).values(protocol=None, version=None, authorities=None))


def _introduced(row: Row[Any] | None) -> Introduced | None:
    if row is None or row.protocol is None or row.authorities is None:
        return None
    said = json.loads(row.authorities)
    return Introduced(
        protocol=row.protocol, version=row.version or "", trusts=tuple(said["trusts"]), issuer=said["issuer"]
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.strip().encode()).hexdigest()
