"""Waiting for a condition, with a deadline: a test never sleeps and hopes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 420.0  # Real processes on two loaded cores.


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Return once `condition` holds; fail the test, naming `what`, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(_LOOK_SECONDS)
