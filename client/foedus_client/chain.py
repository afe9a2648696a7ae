"""The append-only, hash-chained table under the privacy ledger (`ledger.py`).

Every unit namespace has one chain in one SQLite file. An entry is canonical JSON that names its place and the digest
of the entry before it, so that a changed, moved or removed one breaks every later link. What entries mean is the
ledger's affair. Formats of the file, forward only::

    1    open, allot, reserve, commit, release
    2    also state and abandon, and reservations that were restored from receipts

Left out: that the newest entries were cut off (a restored backup) is not visible from the file alone. `receipts.py`
compares it with what the daemon and the coordinator remember.
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
from foedus_protocols.files import DiskTrouble, disk_errors, sync_folder

Kind = Literal["open", "allot", "reserve", "commit", "release", "state", "abandon"]

FORMAT = 2
_GENESIS = "0" * 64
_BUSY_SECONDS = 60.0  # An accountant's answer inside another process's transaction takes seconds, never minutes.
_MEND = (
    "keep the file aside, put the newest copy of the ledger in its place and start the daemon, which compares it with "
    "the coordinator's receipts; without a copy see `foedus client privacy ledger state`"
)

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
    def decode(cls, content: bytes, *, place: str) -> Entry:
        """Read the stored bytes of an entry.

        Args:
            content: They are.
            place: Where they stand, for the error's text.

        Raises:
            VerificationError: They are no entry.
        """
        try:
            return cls(**json.loads(content), digest=digest(content))
        except (ValueError, TypeError) as error:
            raise VerificationError(
                f"expected an entry of the ledger at {place}, got {len(content)} other bytes: "
                f"the file was changed; {_MEND}"
            ) from error


class Transaction:
    """Reading and appending while this process is the only writer. Made by `Chain.transaction`."""

    def __init__(self, connection: sqlite3.Connection, path: Path, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._path = path
        self._clock = clock

    def namespaces(self, *, charter: str | None = None) -> list[str]:
        """The names of all chains, or of those with an entry about a charter; sorted."""
        query = "SELECT DISTINCT namespace FROM entries WHERE ?1 IS NULL OR charter = ?1 ORDER BY namespace"
        return [name for (name,) in self._connection.execute(query, (charter,)).fetchall()]

    def read(self, namespace: str) -> list[Entry]:
        """The chain of a namespace, oldest first; empty if it was never opened."""
        query = "SELECT sequence, content FROM entries WHERE namespace = ? ORDER BY sequence"
        rows = self._connection.execute(query, (namespace,)).fetchall()
        return [Entry.decode(content, place=_place(namespace, sequence, self._path)) for sequence, content in rows]

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
        return Entry.decode(content, place=_place(namespace, sequence, self._path))

    def head(self, namespace: str) -> str | None:
        """The digest of a chain's newest entry; None where it was never opened."""
        query = "SELECT digest FROM entries WHERE namespace = ? ORDER BY sequence DESC LIMIT 1"
        found = self._connection.execute(query, (namespace,)).fetchone()
        return None if found is None else str(found[0])

    def heads(self) -> dict[str, tuple[int, str]]:
        """Place and digest of the newest entry of every chain."""
        # Beside max() SQLite gives the other columns of the row that has it.
        query = "SELECT namespace, max(sequence), digest FROM entries GROUP BY namespace"
        return {name: (sequence, found) for name, sequence, found in self._connection.execute(query).fetchall()}

    def digest_at(self, namespace: str, sequence: int) -> str | None:
        """The digest of the entry at a place; None where the chain does not reach it."""
        query = "SELECT digest FROM entries WHERE namespace = ? AND sequence = ?"
        found = self._connection.execute(query, (namespace, sequence)).fetchone()
        return None if found is None else str(found[0])

    def contents(self) -> list[bytes]:
        """The stored bytes of every entry, by namespace and place."""
        query = "SELECT content FROM entries ORDER BY namespace, sequence"
        return [content for (content,) in self._connection.execute(query).fetchall()]

    def verify(self) -> None:
        """Recompute every link of every namespace.

        Raises:
            VerificationError: An entry was changed, removed from the middle, added out of turn, or moved.
        """
        rows = self._connection.execute("SELECT * FROM entries ORDER BY namespace, sequence").fetchall()
        last: dict[str, tuple[int, str]] = {}  # The newest verified place and digest of each namespace.
        for namespace, sequence, charter, content, stored in rows:
            place = _place(namespace, sequence, self._path)
            number, previous = last.get(namespace, (-1, _GENESIS))
            entry = Entry.decode(content, place=place)
            expected = (namespace, number + 1, charter, previous, stored)
            if expected != (entry.namespace, entry.sequence, entry.charter, entry.previous, entry.digest):
                raise VerificationError(f"expected an unbroken ledger, got a changed {place}: {_MEND}")
            last[namespace] = (entry.sequence, stored)


class Chain:
    """The file. Every transaction has its own connection, so that threads and processes may share a path.

    Guarantees:
        What a transaction appended is on disk when it returned (`synchronous=FULL`), and nothing of it is when it
        raised. Two transactions never overlap, whichever processes they are in (`BEGIN IMMEDIATE`). A file that goes
        away is never made anew by a transaction.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float], read_only: bool) -> None:
        """Open the file; make it where it is missing, and bring an older format up to date.

        Args:
            path: The file.
            clock: Unix seconds, written into entries.
            read_only: Neither make nor change anything: a copy, perhaps of an older format.

        Raises:
            StateError: The file is no ledger, of a newer format, missing (`read_only`), or it is damaged.
            VerificationError: Its chain is broken. A file of an older format was left as it was.
        """
        self._path = path
        self._clock = clock
        self._read_only = read_only
        if not read_only:
            self._make()
        elif not path.is_file():
            raise StateError(f"expected a ledger in {path}, there is no such file")
        with self._connected() as connection:
            self.format = self._known_format(connection)
            self._require_whole(connection)
            if self.format == 0:
                for statement in _CREATE:
                    connection.execute(statement)
            Transaction(connection, path, clock).verify()
            if not read_only and self.format != FORMAT:
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                self.format = FORMAT

    def _make(self) -> None:
        with disk_errors(self._path):
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
                sync_folder(self._path.parent)

    def _known_format(self, connection: sqlite3.Connection) -> int:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > FORMAT:
            raise StateError(
                f"expected a ledger of format {FORMAT} or older in {self._path}, got {found}: a newer Foedus wrote it, "
                "update Foedus here; nothing was changed"
            )
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if found == 0 and (tables or self._read_only):
            raise StateError(f"expected a ledger in {self._path}, got another or an empty database")
        return int(found)

    def _require_whole(self, connection: sqlite3.Connection) -> None:
        """Ask SQLite for the structure of the file, index included: a reservation is found by the index."""
        (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise StateError(f"expected a whole ledger in {self._path}, got a torn or damaged file ({said}): {_MEND}")

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Become the only writer; commit at the end, forget everything if the block raises.

        Raises:
            StateError: The file is no ledger or is damaged.
            DiskTrouble: It is gone, the disk is full or read-only, or another process held the file for a minute.
        """
        with self._connected() as connection:
            yield Transaction(connection, self._path, self._clock)

    def backup(self, target: Path) -> None:
        """Copy the file as it stands between two transactions, into one complete file that only its owner reads.

        Raises:
            StateError: There is a file of this name.
            DiskTrouble: The disk is full or read-only. No part of a copy is left.
        """
        with disk_errors(target):
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError as error:
                raise StateError(f"expected no file at {target}, there is one; name another") from error
            try:
                with (
                    closing(self._connect(read_only=True)) as source,
                    closing(sqlite3.connect(target, isolation_level=None)) as copy,
                ):
                    source.backup(copy)
                    # One file, without the journal beside it: it can be moved, and read where nothing can be written.
                    copy.execute("PRAGMA journal_mode = DELETE")
                with target.open("rb") as file:
                    os.fsync(file.fileno())
                sync_folder(target.parent)
            except BaseException:
                target.unlink(missing_ok=True)
                raise

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        # Never "rwc": a ledger that was taken away under a running daemon must not come back empty.
        address = f"{self._path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
        connection = sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        # A damaged name must reach the comparison that names its place, instead of failing on the way.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        return connection

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            # Closing without the commit rolls back.
            with disk_errors(self._path), closing(self._connect(read_only=self._read_only)) as connection:
                if self._read_only:
                    connection.execute("BEGIN")
                else:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = FULL")
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except UnicodeDecodeError as error:  # sqlite3 cannot decode its own message where that quotes a damaged schema.
            raise StateError(
                f"expected a whole ledger in {self._path}, got a torn or damaged file (its schema): {_MEND}"
            ) from error
        except DiskTrouble as error:
            if _damaged(error.__cause__):
                raise StateError(
                    f"expected a whole ledger in {self._path}, got a torn or damaged file ({error.__cause__}): {_MEND}"
                ) from error
            raise


def _place(namespace: str, sequence: int, path: Path) -> str:
    return f"entry {sequence} of namespace {namespace!r} in {path}"


def _damaged(error: BaseException | None) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
