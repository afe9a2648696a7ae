"""A fault-injecting file layer: Python imports this module by itself in every process that has its folder on the path.

``FOEDUS_FAULT`` says what goes wrong, once, in this process:

    die:fsync:N       at the N-th fsync half of the file's bytes are gone, and so is the process
    die:synced:N      the process dies right after the N-th fsync: before the rename, or before the next one
    die:part:N        the N-th chunk of a vector that comes in is written by half, and the process dies
    die:commit:N      the process dies before the N-th commit to SQLite, with torn frames at the end of the WAL
    die:committed:N   the process dies right after it
    full:N:SECONDS    from the N-th write of any of these kinds on, the disk is full for so long

What is durable by the rules of the file system stays: only bytes that were not synced yet are lost. Death is SIGKILL:
no handler runs, nothing is flushed. Workers are not given the variable.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

_TORN_FRAME = b"\x5a" * 2100  # Less than a frame of a WAL with pages of 4,096 bytes.


class _Fault:
    """Counts events and acts at the one that it was told."""

    def __init__(self, text: str) -> None:
        self.what, *rest = text.split(":")
        self.point = rest[0] if self.what == "die" else "any"
        self.at = int(rest[-1] if self.what == "die" else rest[0])
        self.seconds = float(rest[-1]) if self.what == "full" else 0.0
        self._lock = threading.Lock()
        self._count = 0
        self._full_until: float | None = None

    def due(self, point: str) -> bool:
        """Whether this process is to die at this event."""
        if self.what != "die" or point != self.point:
            return False
        with self._lock:
            self._count += 1
            return self._count == self.at

    def full(self) -> bool:
        """Whether the disk is full at this event."""
        if self.what != "full":
            return False
        with self._lock:
            self._count += 1
            if self._count == self.at:
                self._full_until = time.monotonic() + self.seconds
            return self._full_until is not None and time.monotonic() < self._full_until


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0)  # The signal is on its way.


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_space_for_sqlite() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    error.sqlite_errorname = "SQLITE_FULL"
    return error


def _wrap_fsync(fault: _Fault) -> None:
    real = os.fsync

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if fault.full():
            raise _no_space()
        if fault.due("fsync"):
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(number, status.st_size // 2)
            _die()
        real(number)
        if fault.due("synced"):
            _die()

    os.fsync = fsync


def _wrap_part(fault: _Fault) -> None:
    from foedus_protocols import store

    real: Callable[[Any, bytes], None] = store.Part.write

    def write(self: Any, chunk: bytes) -> None:
        if fault.full():
            raise _no_space()
        if fault.due("part"):
            real(self, chunk[: len(chunk) // 2])
            _die()
        real(self, chunk)

    store.Part.write = write  # type: ignore[method-assign]


def _wrap_sqlite(fault: _Fault) -> None:
    real = sqlite3.connect

    class Connection(sqlite3.Connection):
        """A connection whose commits may fail."""

        foedus_path = ""

        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql.strip().upper() != "COMMIT":
                return super().execute(sql, *parameters)
            return _committing(fault, self.foedus_path, lambda: super(Connection, self).execute(sql, *parameters))

        def commit(self) -> None:
            if self.in_transaction:
                _committing(fault, self.foedus_path, super().commit)

    def connect(database: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(database, *arguments, **{"factory": Connection} | options)
        if isinstance(connection, Connection):
            connection.foedus_path = os.fspath(database)
        return connection

    sqlite3.connect = connect
    sqlite3.dbapi2.connect = connect  # type: ignore[attr-defined]  # SQLAlchemy takes it from there.


def _committing(fault: _Fault, path: str, commit: Callable[[], Any]) -> Any:
    if fault.full():
        raise _no_space_for_sqlite()
    if fault.due("commit"):
        wal = f"{path}-wal"
        if os.path.exists(wal):
            with open(wal, "ab") as file:
                file.write(_TORN_FRAME)
        _die()
    done = commit()
    if fault.due("committed"):
        _die()
    return done


if _text := os.environ.get("FOEDUS_FAULT"):
    _fault = _Fault(_text)
    _wrap_fsync(_fault)
    _wrap_sqlite(_fault)
    _wrap_part(_fault)
