"""The SQLite file under `state.py`: one connection, durable transactions, single values by name.

Left out: migrations. The file has a format number, and a newer one than this program knows is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from foedus_protocols.errors import StateError
from foedus_protocols.files import disk_errors

_FORMAT = 1
_BUSY_SECONDS = 30.0

Value = str | int | float | bytes | None


class Database:
    """A file with tables. Every write is one transaction; nothing is cached.

    Guarantees:
        When a write returns, it survives a kill of the process and, but for `note`, a power cut (WAL, synchronous =
        FULL). When it raises, nothing of it is there.

    Raises:
        DiskTrouble: By every method: the disk is full, read-only or broken, or the file is damaged.
    """

    def __init__(self, path: Path, schema: str) -> None:
        """Open the file, and make its tables where they are missing.

        Raises:
            StateError: A newer version of this program wrote it.
        """
        self._path = path
        with disk_errors(path):
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._prepare(schema)
            except UnicodeDecodeError as error:  # sqlite3 cannot decode its own message about a damaged schema.
                self._db.close()
                raise sqlite3.DatabaseError("its schema is damaged") from error
            except BaseException:
                self._db.close()
                raise

    def _prepare(self, schema: str) -> None:
        self._db.row_factory = sqlite3.Row
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found > _FORMAT:
            raise StateError(
                f"expected {self._path} in format {_FORMAT} or older, it is in format {found}: update Foedus here"
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(schema)
        if found != _FORMAT:
            self._db.execute(f"PRAGMA user_version = {_FORMAT}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with disk_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # A full disk makes SQLite roll back by itself.
                    self._db.execute("ROLLBACK")
                raise

    def _one(self, query: str, *values: Value) -> sqlite3.Row | None:
        with disk_errors(self._path):
            found: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return found

    def _all(self, query: str, *values: Value) -> list[sqlite3.Row]:
        with disk_errors(self._path):
            return self._db.execute(query, values).fetchall()

    # Facts: single values by name.

    def fact(self, name: str) -> str | None:
        """A remembered value, or None."""
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row["value"])

    def facts(self, prefix: str) -> dict[str, str]:
        """The remembered values whose names begin with `prefix`, by the rest of their names."""
        rows = self._all("SELECT name, value FROM facts WHERE substr(name, 1, ?) = ?", len(prefix), prefix)
        return {row["name"][len(prefix) :]: row["value"] for row in rows}

    def remember(self, name: str, value: str) -> None:
        """Set a value."""
        self.remember_all({name: value})

    def remember_all(self, values: dict[str, str]) -> None:
        """Set several values in one transaction."""
        with self._write() as db:
            db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(values.items()))

    def note(self, values: dict[str, str]) -> None:
        """Set several values that may be lost in a power cut: status lines, which are written often."""
        with disk_errors(self._path):
            self._db.execute("PRAGMA synchronous = OFF")
        try:
            self.remember_all(values)
        finally:
            with disk_errors(self._path):
                self._db.execute("PRAGMA synchronous = FULL")

    def remember_first(self, name: str, value: str) -> str:
        """Set a value where there is none, and return the one that stands from then on."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, value))
        stored = self.fact(name)
        return value if stored is None else stored

    def forget(self, name: str) -> None:
        """Drop a value."""
        with self._write() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (name,))
