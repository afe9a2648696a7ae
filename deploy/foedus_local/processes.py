"""Child processes of a local federation: started with a log file, stopped with patience, killed when that fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from foedus_protocols.errors import FoedusError

FOEDUS = (sys.executable, "-m", "foedus_protocols.cli")
_STOP_SECONDS = 20.0


def child_environment() -> dict[str, str]:
    """The environment of every child: one BLAS thread, no inherited proxy between processes of one machine."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return environment | {"OMP_NUM_THREADS": "1", "FOEDUS_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def run_command(*arguments: str, stdin: str | None = None, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Run a `foedus` command with ``--format json`` and return its object.

    Args:
        arguments: The command's words.
        stdin: What it reads.
        prefix: Words to put before it, such as ``ip netns exec NAME``.

    Raises:
        FoedusError: The command failed; the text and the exit code are the command's own.
    """
    done = subprocess.run(
        [*prefix, *FOEDUS, *arguments, "--format", "json"],
        input=stdin,
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    if done.returncode != 0:
        raise command_error(arguments, done.returncode, done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def command_error(arguments: tuple[str, ...], code: int, stderr: str) -> FoedusError:
    """A failed command as an error: its last line, under its own exit code."""
    lines = stderr.strip().splitlines() or ["no message"]
    error = FoedusError(f"`foedus {' '.join(arguments)}` left with exit code {code}: {lines[-1]}")
    error.exit_code = code  # type: ignore[misc]
    return error


class Process:
    """A long-running `foedus` command with its output in a file; `prefix` is as in `run_command`."""

    def __init__(self, name: str, arguments: list[str], log: Path, prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.log = log
        self.prefix = prefix
        self._file: IO[bytes] | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._child.pid if self._child and self._child.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """How it ended (negative: by which signal); None while it runs or was never started."""
        return None if self._child is None else self._child.poll()

    def start(self) -> None:
        """Start (again); output is appended to the log."""
        self._file = self.log.open("ab")
        self._child = subprocess.Popen(
            [*self.prefix, *FOEDUS, *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            # An interrupt from the keyboard reaches the parent alone, which then stops its children in order.
            start_new_session=True,
        )

    def check(self) -> None:
        """Raise if the process ended by itself.

        Raises:
            FoedusError: It did; the last lines of its log are in the text.
        """
        if self._child is not None and (code := self._child.poll()) is not None:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise FoedusError(f"{self.name} ended with exit code {code}: {' / '.join(tail)}")

    def kill(self) -> None:
        """`kill -9`, as a power cut would."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGKILL)
            self._child.wait()
        self._close()

    def stop(self) -> None:
        """Ask it to end; kill its whole session if it does not within 20 s."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
