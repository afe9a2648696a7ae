"""Small files that are on the disk in full or not at all, and one name for a disk that does not do its part.

A full, read-only or broken disk is nobody's mistake in the protocol: it passes, or a person mends it, and what was
asked before can be done then. `DiskTrouble` sets it apart from a state that will never allow what is asked.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foedus_protocols.errors import StateError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: raise it or free some space",
    errno.EROFS: "the disk is mounted read-only: remount it for writing",
    errno.EIO: "the disk reports an input/output error: look at the system's log, and restore nothing over it",
    errno.EACCES: "this user may not use it: give it to the user that runs Foedus",
    errno.EPERM: "this user may not use it: give it to the user that runs Foedus",
    errno.EMFILE: "this process has too many open files: raise its limit",
    errno.ENFILE: "this machine has too many open files: raise its limit",
}
# SQLite's primary result codes (https://www.sqlite.org/rescode.html); the low byte of an extended one.
_DATABASE_ADVICE = {
    sqlite3.SQLITE_FULL: _ADVICE[errno.ENOSPC],
    sqlite3.SQLITE_READONLY: "the database cannot be written: is the disk read-only, or the file another user's?",
    sqlite3.SQLITE_IOERR: "the disk reports an input/output error or has no space left: look at the system's log",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened: is the folder there, writable, and this user's?",
    sqlite3.SQLITE_PERM: _ADVICE[errno.EACCES],
    sqlite3.SQLITE_BUSY: "another process holds the database: end it, or wait until it is done",
    sqlite3.SQLITE_LOCKED: "another process holds the database: end it, or wait until it is done",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: keep it aside and restore the newest backup",
    sqlite3.SQLITE_NOTADB: "the file is damaged or no database: keep it aside and restore the newest backup",
}


class DiskTrouble(StateError):
    """The disk or a database on it does not take or give what it should. What failed can be tried again later."""


class DiskFull(DiskTrouble):
    """No space, or no quota, is left: it passes when somebody frees some, and nothing has to be mended."""


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Report trouble of the disk under `place` as a DiskTrouble that says what to do.

    Errors that say something else (no such file, a name that is taken) pass through unchanged.

    Raises:
        DiskTrouble: The block met a full, read-only or broken disk, or a database that cannot be used.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        trouble = disk_trouble(error, place)
        if trouble is None:
            raise
        raise trouble from error


def disk_trouble(error: sqlite3.Error | OSError, place: Path | str) -> DiskTrouble | None:
    """The error of ours for trouble of the disk; None where an OSError says something else."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        advice = None if code is None else _DATABASE_ADVICE.get(code & 0xFF)
        kind = DiskFull if code is not None and code & 0xFF == sqlite3.SQLITE_FULL else DiskTrouble
        return kind(
            f"expected a database that can be used in {place}, got: {error}; "
            f"{advice or 'this may be a defect of Foedus, report it'}"
        )
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskTrouble
    return kind(f"expected to read and write in {place}, got: {error.strerror}; {advice}")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut: without this the file's name can be lost."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o644, overwrite: bool = True) -> None:
    """Write a file by way of a temporary neighbour.

    Args:
        path: The file; its folder exists.
        data: All of its bytes.
        mode: The permission bits, set when the temporary file is made (the umask can only take away from them).
        overwrite: Whether an existing file is replaced.

    Raises:
        StateError: The file exists and `overwrite` is false.
        DiskTrouble: The disk is full, read-only or broken. The old file, if any, is as it was.

    Guarantees:
        A crash at any instant leaves the old file, or the new one, never a part.
    """
    with disk_errors(path):
        _write(path, data, mode, overwrite)


def _write(path: Path, data: bytes, mode: int, overwrite: bool) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    except FileExistsError as error:
        raise StateError(f"expected no file at {path}, there is one; move it away if it is not needed") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
