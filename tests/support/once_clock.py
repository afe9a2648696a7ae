"""A clock of the GPU bench that runs each job once and takes every time for half a second."""

from __future__ import annotations

from typing import Any


class OnceClock:
    """Runs a job once."""

    def seconds(self, job: Any) -> float:
        job()
        return 0.5

    def peak_bytes(self) -> int:
        return 10**9

    def synchronise(self) -> None:
        """Nothing runs elsewhere."""

    def clear(self) -> None:
        """Nothing is held."""
