"""The peer: Flower's SuperLink with SuperNodes as processes on this machine, moving the same arrays.

Stock settings, chosen in Flower's favour where there is a choice: state in memory, no TLS, no node authentication, and
packages are not installed at run time. A round is `Grid.send_and_receive` of fp32 arrays to every node and the mean of
what returns; the client trains nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from foedus_local.processes import child_environment, free_ports

APP = Path(__file__).with_name("flower_app")
_BIN = Path(sys.executable).parent
_STOP_SECONDS = 20.0


def flower_rounds(folder: Path, *, members: int, parameters: int, rounds: int, seconds: float = 900.0) -> list[float]:
    """The seconds of each round; the first one warms up.

    Raises:
        RuntimeError: A process ended, or the rounds took too long.
    """
    folder.mkdir(parents=True)
    out = folder / "rounds.json"
    port, *node_ports = free_ports(members + 1)
    environment = child_environment() | {
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
    }
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    shutil.copytree(APP, folder / "app")
    link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
    nodes = [
        ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(node)]
        for node in node_ports
    ]
    with ExitStack() as stack:
        children = [_start(stack, command, folder, environment) for command in (link, *nodes)]
        settings = f'parameters={parameters} rounds={rounds} members={members} out="{out}"'
        _submit([str(_BIN / "flwr"), "run", str(folder / "app"), "bench", "-c", settings], environment, children)
        return _await(out, rounds, children, seconds)


def _start(stack: ExitStack, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one process in a session of its own; with the stack, all that it started ends too."""
    log = stack.enter_context((folder / f"{command[0]}.log").open("ab"))
    child = subprocess.Popen(
        [str(_BIN / command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    stack.callback(_end, child)
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # What it left behind: executors and apps.
    child.wait()


def _submit(command: list[str], environment: dict[str, str], children: list[subprocess.Popen[bytes]]) -> None:
    """Hand the app in, as soon as the SuperLink answers."""
    deadline = time.monotonic() + 120.0
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            raise RuntimeError(f"expected `flwr run` to succeed, got: {done.stdout[-500:]} {done.stderr[-500:]}")
        time.sleep(0.5)


def _await(out: Path, rounds: int, children: list[subprocess.Popen[bytes]], seconds: float) -> list[float]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            found: list[float] = json.loads(out.read_text())
        except (FileNotFoundError, ValueError):
            found = []
        if len(found) == rounds:
            return found
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            raise RuntimeError(f"expected {rounds} rounds of SuperLink, got {len(found)}; see {out.parent}")
        time.sleep(0.1)
