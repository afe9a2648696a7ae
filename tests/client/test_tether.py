"""A worker dies with its daemon, and two of them never share a folder."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from foedus_client.tether import LOCK

pytestmark = pytest.mark.unit

DAEMON = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""
TIED = """
import os, signal, time
from pathlib import Path
from foedus_client.tether import leave_with
leave_with(os.getppid())
Path("tied").touch()
BEHAVIOUR
"""
SECOND = """
from pathlib import Path
from foedus_client.tether import alone
with alone(Path.cwd()):
    print("alone", flush=True)
"""


def _state_of(pid: int) -> str:
    """The state letter of a process, ``-`` where there is none (or only what its parent has not collected)."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "-"
    return "-" if found in "ZX" else found


def _await(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("behaviour", "state"), [("os.kill(os.getpid(), signal.SIGSTOP)", "T"), ("time.sleep(600)", "S")]
)
def test_a_worker_dies_with_its_daemon_also_a_frozen_one(tmp_path: Path, behaviour: str, state: str) -> None:
    command = [sys.executable, "-c", DAEMON, TIED.replace("BEHAVIOUR", behaviour)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        try:
            _await(lambda: (tmp_path / "tied").exists(), "the worker never tied itself")
            _await(lambda: _state_of(pid) == state, f"the worker never came to state {state}")
        finally:
            daemon.kill()
        _await(lambda: _state_of(pid) == "-", "the worker outlived its daemon")


def test_a_worker_waits_for_the_one_before_it_in_its_folder(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("a") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        command = [sys.executable, "-c", SECOND]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            _await(lambda: _waits_for_a_lock(second.pid), "the second worker never asked for the lock")
            fcntl.flock(before, fcntl.LOCK_UN)
            assert second.stdout.read() == "alone\n"


def _waits_for_a_lock(pid: int) -> bool:
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())
