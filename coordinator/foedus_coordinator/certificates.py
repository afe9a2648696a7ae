"""Which certificates members hold, and which of them still open something.

gRPC's Python API has no CRL and looks at a certificate once, in the handshake. So every certificate that is issued is
written down, and each call and each second of a stream asks here: is it written down for this organisation, was it not
revoked, and is its holder in the roster with the key that it was issued beside? A `Gate` keeps the answer in memory
for a quarter of a second, so that a transfer of a thousand chunks does not ask the database a thousand times, and a
revocation by the command line, another process, still counts within a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from foedus_protocols.certificates import parse_certificate
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.roster import Roster
from sqlalchemy import Connection, Row, func, select

from foedus_coordinator.storage import Storage
from foedus_coordinator.tables import certificates, rosters

_FRESH_SECONDS = 0.25
_MOST_AN_HOUR = 10
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate as it was written down. `issuer` is the CA's fingerprint; times are Unix seconds."""

    serial: str
    org: str
    signing_key: str
    issuer: str
    issued: float
    expires: float
    revoked_at: float | None

    @property
    def half_life(self) -> float:
        """When it is due to be renewed."""
        return self.issued + (self.expires - self.issued) / 2


def record(connection: Connection, pem: bytes, *, org: str, signing_key: str, issuer: str) -> None:
    """Write a certificate down, in the transaction that makes it known to anybody."""
    leaf = parse_certificate(pem)
    connection.execute(
        certificates.insert().values(
            serial=f"{leaf.serial_number:x}",
            org=org,
            signing_key=signing_key,
            issuer=issuer,
            issued=leaf.not_valid_before_utc.timestamp(),
            expires=leaf.not_valid_after_utc.timestamp(),
        )
    )


def revoke(connection: Connection, now: float, *, org: str | None = None, unless_issuer: str | None = None) -> int:
    """Revoke the certificates of one organisation, or of every other CA than one; returns how many it were."""
    change = certificates.update().where(certificates.c.revoked_at.is_(None))
    if org is not None:
        change = change.where(certificates.c.org == org)
    if unless_issuer is not None:
        change = change.where(certificates.c.issuer != unless_issuer)
    return connection.execute(change.values(revoked_at=now)).rowcount


def find(connection: Connection, serial: str) -> Issued | None:
    """One certificate, or None where it was never issued."""
    row = connection.execute(select(certificates).where(certificates.c.serial == serial)).first()
    return None if row is None else _issued(row)


def require_pace(connection: Connection, org: str, now: float) -> None:
    """Refuse an organisation that asks for certificates without end.

    Raises:
        StateError: It was issued ten in the last hour.
    """
    lately = select(func.count()).where(certificates.c.org == org, certificates.c.issued > now - _HOUR)
    if int(connection.execute(lately).scalar_one()) >= _MOST_AN_HOUR:
        raise StateError(f"expected at most {_MOST_AN_HOUR} certificates an hour for {org}; try again in an hour")


class Gate:
    """Who may call. Safe to ask from many threads."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._mark: tuple[int, ...] | None = None
        self._valid: dict[str, str] = {}

    def check(self, org: str, serial: str) -> None:
        """Refuse who may not call.

        Raises:
            VerificationError: Not a member, or the certificate is unknown, revoked, or of a key that was replaced.
        """
        if self._holders().get(serial) == org:
            return
        self.forget()  # It may be a moment old.
        if self._holders().get(serial) != org:
            raise VerificationError(
                f"expected a member's current certificate, that of {org!r} was revoked, replaced or never issued; "
                "ask the coordinator's administrator, and join again with a new invitation"
            )

    def forget(self) -> None:
        """Look at the database at the next call: this process changed something."""
        with self._lock:
            self._read_at = float("-inf")

    def _holders(self) -> dict[str, str]:
        """Serial number to organisation, of the certificates that open something."""
        with self._lock:
            now = self._clock()
            if now - self._read_at < _FRESH_SECONDS:
                return self._valid
            with self._storage.read() as connection:
                mark = _mark(connection)
                if mark != self._mark:
                    self._valid = _valid(connection)
            self._mark, self._read_at = mark, now
            return self._valid


def _mark(connection: Connection) -> tuple[int, ...]:
    """What changes with every change of members or certificates: nothing is ever taken out of these tables."""
    version = connection.execute(select(func.max(rosters.c.version))).scalar()
    row = connection.execute(select(func.count(), func.count(certificates.c.revoked_at))).one()
    return (-1 if version is None else int(version), int(row[0]), int(row[1]))


def _valid(connection: Connection) -> dict[str, str]:
    newest = connection.execute(select(rosters.c.body).order_by(rosters.c.version.desc()).limit(1)).scalar()
    members = {} if newest is None else {one.id: one.signing_key for one in Roster.parse(newest).members}
    rows = connection.execute(select(certificates).where(certificates.c.revoked_at.is_(None)))
    return {row.serial: row.org for row in rows if members.get(row.org) == row.signing_key}


def _issued(row: Row[tuple[object, ...]]) -> Issued:
    return Issued(**row._mapping)
