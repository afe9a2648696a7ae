"""What ties a worker to its daemon and to its folder: it ends with the one, and is alone in the other.

A module of its own, so that it can be loaded without the model.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "worker.lock"
_WATCH_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def leave_with(parent: int) -> None:
    """End this process when `parent` is no longer its parent: at once on Linux, also while frozen, else soon after."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only worker in a work folder: wait for the one before to end, however it ends."""
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
