"""One daemon a home."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from foedus_protocols.errors import StateError
from foedus_protocols.files import disk_errors


class HomeLock:
    """An exclusive lock on a home directory, held as long as the process lives; the kernel frees it after a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        with disk_errors(self._path):
            file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise StateError(
                f"expected no other daemon on {self._path.parent}, found one (process {holder}); "
                "stop it first, or give this one another --home"
            ) from error
        self._file = file
        with suppress(OSError):  # The process id is a courtesy to whoever comes second; a full disk takes none.
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def held(path: Path) -> bool:
        """Whether some process holds the lock now."""
        if not path.exists():
            return False
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False
