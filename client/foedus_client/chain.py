"""The append-only, hash-chained table under the privacy ledger (`ledger.py`).

Every unit namespace has one chain in one SQLite file. An entry is canonical JSON that names its place and the digest
of the entry before it, so that a changed, moved or removed one breaks every later link. What entries mean is the
ledger's affair.

Left out: that the newest entries were cut off (a restored backup) is not visible from the file alone. Compare the
last digest with one that somebody else has seen.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.errors import StateError, VerificationError

Kind = Literal["open", "allot", "reserve", "commit", "release"]

_FORMAT = 1
_GENESIS = "0" * 64
_BUSY_SECONDS = 60.0  # An accountant's answer inside another process's transaction takes seconds, never minutes.

_CREATE = (
    """CREATE TABLE IF NOT EXISTS entries (
        namespace TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        charter TEXT,
        content BLOB NOT NULL,
        digest TEXT NOT NULL,
        PRIMARY KEY (namespace, sequence)
    ) STRICT""",
    "CREATE INDEX IF NOT EXISTS entries_by_charter ON entries (charter)",
    """CREATE TRIGGER IF NOT EXISTS entries_are_not_changed BEFORE UPDATE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS entries_are_not_removed BEFORE DELETE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One link of a namespace's chain. `digest` is SHA-256 of the canonical JSON of all other fields."""

    namespace: str
    sequence: int
    kind: Kind
    charter: str | None
    run: str | None
    round: int | None
    body: Mapping[str, Any]
    time: float
    previous: str
    digest: str

    @classmethod
    def decode(cls, content: bytes) -> Entry:
        """Read the stored bytes of an entry.

        Raises:
            VerificationError: They are no entry.
        """
        try:
            return cls(**json.loads(content), digest=digest(content))
        except (ValueError, TypeError) as error:
            raise VerificationError(
                f"expected an entry of the ledger, got {len(content)} other bytes: the file was changed; "
                "restore a copy that is not older than the last receipt"
            ) from error


class Transaction:
    """Reading and appending while this process is the only writer. Made by `Chain.transaction`."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock

    def namespaces(self, *, charter: str | None = None) -> list[str]:
        """The names of all chains, or of those with an entry about a charter; sorted."""
        query = "SELECT DISTINCT namespace FROM entries WHERE ?1 IS NULL OR charter = ?1 ORDER BY namespace"
        return [name for (name,) in self._connection.execute(query, (charter,)).fetchall()]

    def read(self, namespace: str) -> list[Entry]:
        """The chain of a namespace, oldest first; empty if it was never opened."""
        query = "SELECT content FROM entries WHERE namespace = ? ORDER BY sequence"
        return [Entry.decode(content) for (content,) in self._connection.execute(query, (namespace,)).fetchall()]

    def require(self, namespace: str) -> list[Entry]:
        """The chain of a namespace that must exist.

        Raises:
            StateError: It was never opened.
        """
        entries = self.read(namespace)
        if not entries:
            raise StateError(f"expected a unit namespace of this ledger, got {namespace!r}: register its data first")
        return entries

    def append(
        self,
        namespace: str,
        kind: Kind,
        body: Mapping[str, Any],
        *,
        charter: str | None = None,
        run: str | None = None,
        round: int | None = None,
    ) -> Entry:
        """Write the next link of a namespace."""
        query = "SELECT sequence + 1, digest FROM entries WHERE namespace = ? ORDER BY sequence DESC LIMIT 1"
        sequence, previous = self._connection.execute(query, (namespace,)).fetchone() or (0, _GENESIS)
        value = {
            "namespace": namespace,
            "sequence": sequence,
            "kind": kind,
            "charter": charter,
            "run": run,
            "round": round,
            "body": body,
            "time": self._clock(),
            "previous": previous,
        }
        content = canonical_bytes(value)
        row = (namespace, sequence, charter, content, digest(content))
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
        return Entry.decode(content)

    def rows(self) -> list[tuple[str, int, str | None, bytes, str]]:
        """Every stored row as it stands, by namespace and place."""
        return self._connection.execute("SELECT * FROM entries ORDER BY namespace, sequence").fetchall()


class Chain:
    """The file. Every transaction has its own connection, so that threads and processes may share a path.

    Guarantees:
        What a transaction appended is on disk when it returned (`synchronous=FULL`), and nothing of it is when it
        raised. Two transactions never overlap, whichever processes they are in (`BEGIN IMMEDIATE`).
    """

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with self._connected() as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, _FORMAT):
                raise StateError(f"expected a ledger of format {_FORMAT} in {path}, got {found}: use a newer Foedus")
            for statement in _CREATE:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Become the only writer; commit at the end, forget everything if the block raises.

        Raises:
            StateError: The file is no ledger, or another process held it for a minute.
        """
        with self._connected() as connection:
            yield Transaction(connection, self._clock)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            # Closing without the commit rolls back.
            with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StateError(f"expected a readable ledger in {self._path}, got: {error}") from error

    def verify(self) -> None:
        """Recompute every link of every namespace.

        Raises:
            VerificationError: An entry was changed, removed from the middle, added out of turn, or moved.
        """
        with self.transaction() as transaction:
            rows = transaction.rows()
        last: dict[str, tuple[int, str]] = {}  # The newest verified place and digest of each namespace.
        for namespace, sequence, charter, content, stored in rows:
            place, previous = last.get(namespace, (-1, _GENESIS))
            entry = Entry.decode(content)
            expected = (namespace, place + 1, charter, previous, stored)
            if expected != (entry.namespace, entry.sequence, entry.charter, entry.previous, entry.digest):
                raise VerificationError(
                    f"expected an unbroken ledger, got a changed entry {sequence} of namespace {namespace!r} in "
                    f"{self._path}: restore a copy that is not older than the last receipt"
                )
            last[namespace] = (entry.sequence, stored)
