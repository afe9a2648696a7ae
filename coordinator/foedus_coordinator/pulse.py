"""What a coordinator says of itself while it serves, for commands in other processes: ``status.json`` in its home.

It is written when something changes and says nothing that has to survive; a file of an earlier life is told by the lock
that nobody holds (`health.py`).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from foedus_protocols.errors import StateError
from foedus_protocols.files import write_durably

from foedus_coordinator.runner import Trouble

_LOG = logging.getLogger("foedus.coordinator")
FILE = "status.json"


class Pulse:
    """The file's writer: one for each life of a coordinator."""

    def __init__(self, root: Path, *, link: str, enrolment: str) -> None:
        self._path = root / FILE
        self._lock = threading.Lock()
        self._troubles: dict[str, Trouble] = {}
        self._said = {"pid": os.getpid(), "started": time.time(), "link": link, "enrolment": enrolment}
        self._write()

    def report(self, run: str, trouble: Trouble | None) -> None:
        """Note the trouble that a run's thread is in, or that it is over."""
        with self._lock:
            if self._troubles.get(run) == trouble:
                return
            if trouble is None:
                del self._troubles[run]
            else:
                self._troubles[run] = trouble
            self._write()

    def _write(self) -> None:
        troubles = {run: vars(trouble) for run, trouble in self._troubles.items()}
        try:
            write_durably(self._path, json.dumps(self._said | {"troubles": troubles}).encode(), mode=0o600)
        except (StateError, OSError) as error:
            # What it would say may be that the disk is full; the log says so in any case.
            _LOG.warning("%s cannot be written: %s", FILE, error)


def read(root: Path) -> dict[str, Any]:
    """What the coordinator of this home said last; empty where it never did, or not so that it can be read."""
    try:
        said: dict[str, Any] = json.loads((root / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
