"""Folders for dry steps: what is in them may follow from real records, so that none outlives its process for long."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "check-"


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for a dry step or a rehearsal, which is gone when the block ends.

    Guarantees:
        What a killed process left is erased by the next call, and by the daemon at its start (`sweep`).
    """
    sweep(folder)
    place = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    place.mkdir(mode=0o700, parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Erase the folders whose processes are gone."""
    for place in folder.glob(f"{_PREFIX}*-*"):
        owner = place.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not is_alive(int(owner)):
            shutil.rmtree(place, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs, whoever's it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
