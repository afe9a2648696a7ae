"""Small files that are on the disk in full or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from foedus_protocols.errors import StateError


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

    Guarantees:
        A crash at any instant leaves the old file, or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
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
