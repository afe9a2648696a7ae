"""A whole federation of real processes whose every part can be hurt, and the acting out of `troubles.py`.

The processes are those of ``deploy/foedus_local``; each organisation's daemon dials through a proxy of its own, and a
process can be started under the fault-injecting file layer of ``faults/``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chaos.troubles import Trouble
from foedus_client.config import Home as ClientHome
from foedus_client.datasets.cli import shipped_base
from foedus_local.federation import Budget, LocalFederation, Organisation
from foedus_local.plan import power_of_two
from foedus_local.processes import Process
from foedus_local.text import write_demo_text
from support.proxy import ShapingProxy

DEADLINE_SECONDS = 15.0  # Three workers that load at once on two busy cores need ten.
ROUNDS = 6
_EPSILON = 1.0
_EPSILON_CAP = 40.0  # At 100 the slack of the noise tables would leave nothing of delta.
_DELTA = 1e-5
_UNITS = 24
_DIES_WITHIN_SECONDS = 10.0
_FAULTS = Path(__file__).parent / "faults"
_KILLED = -signal.SIGKILL


class Stage(LocalFederation):
    """A federation that suffers.

    Attributes:
        proxies: The line of each organisation.
        exits: What processes did that nobody had told to end, as lines of text.
        deaths: How often a process was killed, by us or by its own fault layer.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(folder / "federation", _organisations(folder / "data"), shipped_base())
        self.proxies: dict[str, ShapingProxy] = {}
        self.exits: list[str] = []
        self.deaths = 0
        self._say = say
        self._thaws: list[threading.Timer] = []

    # Life

    def open(self) -> None:
        """Make the federation and start it."""
        self.create(Budget(epsilon_cap=_EPSILON_CAP, delta=_DELTA, allow_unprotected=True), self._say)

    def close(self) -> None:
        """End everything, frozen processes included."""
        for timer in self._thaws:
            timer.cancel()
        for process in self.processes():
            _signal(process.pid, signal.SIGCONT)
        for org in self.organisations:
            _signal(self.worker_of(org), signal.SIGCONT)
        self.stop()
        for proxy in self.proxies.values():
            proxy.close()

    def _register(self, one: Organisation, budget: Budget) -> None:
        super()._register(one, budget)
        home = ClientHome(self.home(one.org))
        config = home.load()
        host, _, port = (config.link or "").rpartition(":")
        proxy = ShapingProxy((host, int(port))).start()
        self.proxies[one.org] = proxy
        home.save(config.model_copy(update={"link": f"127.0.0.1:{proxy.port}"}))

    def processes(self) -> list[Process]:
        """The coordinator and every daemon."""
        return [self.coordinator, *self.daemons.values()]

    def worker_of(self, org: str) -> int | None:
        """The process id of an organisation's worker, while its daemon has one."""
        daemon = self.daemons[org].pid
        return None if daemon is None else next(iter(_children(daemon, "foedus_client.worker")), None)

    def revive(self) -> None:
        """Do what systemd does: start again what ended, and note it where nobody had a hand in it."""
        for process in self.processes():
            code = process.exit_code
            if code is None:
                continue
            self.exits.append(f"{process.name} ended by itself with exit code {code}")
            self._say(f"  {self.exits[-1]}")
            process.kill()  # Which closes its log.
            self._start(process)

    # Troubles

    def suffer(self, trouble: Trouble) -> float:
        """Act out one trouble; what lasts goes on in the background.

        Returns:
            The moment (Unix seconds) from which on recovery is possible: the restart, the thaw, the line's return.
        """
        if trouble.kind in ("cut", "hold"):
            proxy = self.proxies[trouble.org]
            (proxy.cut if trouble.kind == "cut" else proxy.hold)(trouble.seconds)
            return time.time() + trouble.seconds
        if trouble.part == "everything":
            return self._restart(self.processes(), trouble)
        if trouble.part == "worker":
            return self._hurt_worker(trouble)
        process = self.coordinator if trouble.part == "coordinator" else self.daemons[trouble.org]
        if trouble.kind == "freeze":
            return self._freeze(process.pid, trouble.seconds)
        return self._restart([process], trouble)

    def _restart(self, processes: list[Process], trouble: Trouble) -> float:
        for process in processes:  # At once, as a power cut would: nobody sees the other go.
            _signal(process.pid, signal.SIGKILL)
        for process in processes:
            process.kill()
            self.deaths += 1
        time.sleep(trouble.seconds if trouble.kind == "kill" else 0.0)
        for process in processes:
            self._start(process, trouble.fault)
        if trouble.kind == "torn":
            self._await_death(processes[0])
        return time.time()

    def _await_death(self, process: Process) -> None:
        """Wait for the fault to strike; a process that never comes to the point is killed where it is."""
        deadline = time.monotonic() + _DIES_WITHIN_SECONDS
        while process.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.02)
        struck = process.exit_code
        if struck not in (None, _KILLED):
            self.exits.append(f"{process.name} ended by itself with exit code {struck}")
        self._say(f"    the fault {'struck' if struck == _KILLED else 'did not come up'}")
        process.kill()
        self.deaths += 1
        self._start(process)

    def _hurt_worker(self, trouble: Trouble) -> float:
        pid = self.worker_of(trouble.org)
        if trouble.kind == "freeze":
            return self._freeze(pid, trouble.seconds)
        _signal(pid, signal.SIGKILL)
        self.deaths += pid is not None
        return time.time()

    def _freeze(self, pid: int | None, seconds: float) -> float:
        _signal(pid, signal.SIGSTOP)
        thaw = threading.Timer(seconds, _signal, (pid, signal.SIGCONT))
        thaw.daemon = True
        thaw.start()
        self._thaws.append(thaw)
        return time.time() + seconds

    def _start(self, process: Process, fault: str = "") -> None:
        with _environment(fault):
            process.start()

    # Runs

    def charter(
        self, name: str, *, private: bool, on_short_round: str, round_seconds: float = DEADLINE_SECONDS
    ) -> dict[str, Any]:
        """Terms of a run of seconds. With `wait` every round needs everybody; with `skip` two of three are enough."""
        privacy: dict[str, Any] = {
            "mode": "local" if private else "none",
            "rounds": ROUNDS,
            "l2_clip_norm": 0.2,
            "target_units": 12,
        }
        if private:
            privacy |= {"epsilon": _EPSILON, "delta": _DELTA}
        return {
            "name": name,
            "purpose": "demo",
            "domain": "chaos",
            **({} if private else {"seed": 7}),
            "participants": [
                {"id": one.org, "unit": one.unit, "units_at_most": one.units_at_most}
                for one in self.organisations.values()
            ],
            "recipe": {"max_tokens": 64, "max_records_per_unit": 2, "optimiser": {"rate": 0.01}},
            "privacy": privacy,
            "masks": {"min_survivors": len(self.organisations) if on_short_round == "wait" else 2},
            "schedule": {"round_seconds": round_seconds, "on_short_round": on_short_round},
            "evaluation": {"term": "plain", "every": ROUNDS, "max_records": 2},
        }


def _organisations(folder: Path) -> list[Organisation]:
    text = write_demo_text(folder, domain="medical", seed=5, units=_UNITS)
    return [
        Organisation(
            org=org,
            file=path,
            unit=text.unit,
            units_at_most=power_of_two(text.units[org]),
            split_key=bytes([index + 1]) * 32,
        )
        for index, (org, path) in enumerate(text.files.items())
    ]


@contextmanager
def _environment(fault: str) -> Iterator[None]:
    """The environment of a child that starts in this block: with the fault layer, or without."""
    before = os.environ.get("PYTHONPATH")
    if fault:
        os.environ["FOEDUS_FAULT"] = fault
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_FAULTS), before)))
    try:
        yield
    finally:
        os.environ.pop("FOEDUS_FAULT", None)
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


def _children(parent: int, module: str) -> list[int]:
    """The processes that `parent` started to run a module."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes()
        except OSError:  # It ended meanwhile.
            continue
        # The second field, the name in parentheses, may hold spaces.
        if int(status.rpartition(")")[2].split()[1]) == parent and module.encode() in command:
            found.append(int(entry.name))
    return found


def _signal(pid: int | None, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    if pid is not None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
