"""Who may join, who has asked, and who is in: tokens, enrolment requests and the roster's versions.

The command line approves in one process while the service answers in another, so everything is read from the database
at each call. A token is 256 random bits, good for one use and at most a day; the database keeps its digest only.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.identity import check_org_id, key_fingerprint
from foedus_protocols.roster import Roster, SignedRoster
from foedus_protocols.store import FileStore
from sqlalchemy import Connection, func, select

from foedus_coordinator.figures import publish
from foedus_coordinator.storage import Storage
from foedus_coordinator.tables import nodes, requests, rosters, tokens

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


class Members:
    """The membership tables, and the roster files that members pull."""

    def __init__(self, storage: Storage, files: FileStore) -> None:
        self._storage = storage
        self._files = files

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

    def approve(self, request: Request, *, certificate_pem: bytes, key: Ed25519PrivateKey) -> Roster:
        """Let a requester in: its certificate and the roster's next version become visible in one transaction.

        Raises:
            StateError: It is decided already, or its name or key is in the roster.
        """
        with self._storage.write() as connection:
            state = connection.execute(select(requests.c.state).where(requests.c.id == request.id)).scalar()
            if state != "pending":
                raise StateError(f"expected a pending request of {request.org}, it is {state}")
            roster = _current(connection).add(request.org, request.signing_key, since=int(time.time()))
            self._append(connection, roster, key)
            connection.execute(nodes.insert().values(org=request.org))
            connection.execute(
                requests.update()
                .where(requests.c.id == request.id)
                .values(state="approved", certificate_pem=certificate_pem)
            )
        return roster

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

    def org_of(self, node: int) -> str:
        """The organisation of a node id.

        Raises:
            StateError: There is none.
        """
        with self._storage.read() as connection:
            org = connection.execute(select(nodes.c.org).where(nodes.c.node_id == node)).scalar()
        if org is None:
            raise StateError(f"expected the node id of a member, got {node}")
        return str(org)

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


def _digest(token: str) -> str:
    return hashlib.sha256(token.strip().encode()).hexdigest()
