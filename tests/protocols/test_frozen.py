"""A peer that is frozen (SIGSTOP: its kernel still answers, it does not) is noticed by keepalive, on either side.

In earnest within 20 s (10 s until a ping, 5 s for its answer); the short test takes a tenth of every time.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ENDS = Path(__file__).with_name("frozen_ends.py")


class End:
    """One process, and the lines that it printed."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, str(ENDS), *arguments], stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def says(self, beginning: str, seconds: float) -> str:
        """The next line, which begins like this and comes in time."""
        line = self._lines.get(timeout=seconds)
        assert line.startswith(beginning)
        return line

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def connected(federation: Any, pace: str) -> Iterator[tuple[End, End]]:
    """A server and a client with a poll and a silent push open."""
    ends = [End("server", str(federation.coordinator_tls().ca.parent), pace)]
    try:
        port = ends[0].says("port", 30).split()[1]
        ends.append(End("client", str(federation.org_tls("clinic").ca.parent), port, pace))
        ends[1].says("connected", 30)
        ends[0].says("granted", 30)
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.end()


PACES = [pytest.param("fast", 10.0, id="short"), pytest.param("real", 20.0, id="in earnest", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("pace", "seconds"), PACES)
def test_a_frozen_coordinator_is_noticed(federation: Any, pace: str, seconds: float) -> None:
    with connected(federation, pace) as (server, client):
        server.freeze()
        client.says("noticed", seconds)


@pytest.mark.parametrize(("pace", "seconds"), PACES)
def test_a_frozen_organisation_is_noticed(federation: Any, pace: str, seconds: float) -> None:
    with connected(federation, pace) as (server, client):
        client.freeze()
        server.says("closed", seconds)


def test_a_peer_that_is_only_silent_is_left_alone(federation: Any) -> None:
    """Polls and a push without a byte outlive many pings: the link's own keepalive carries them."""
    with connected(federation, "fast") as (server, client):
        with pytest.raises(queue.Empty):
            server.says("closed", 4.0)
        assert client.process.poll() is None
