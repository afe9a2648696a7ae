"""A whole federation on one machine: one coordinator and some organisations, each a process of its own over real TLS.

Everything goes through the documented commands, in the order of ``docs/walkthrough.md``; what a person decides there
(which operator to trust, which peers are real, whether to sign) is written into each organisation's policy here, with
`auto_sign`, because on this machine one person is all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from foedus_client import policy
from foedus_protocols.errors import FoedusError
from foedus_protocols.files import write_durably

from foedus_local.processes import Process, free_ports, run_command

FEDERATION = "local"
PURPOSE = "demo"
NAMESPACE = "units"
_START_SECONDS = 60.0
_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Organisation:
    """One organisation's data and what it declares about it.

    Attributes:
        org: Its id.
        file: Its records.
        unit: The field that names a record's privacy unit, or ``record``.
        units_at_most: The declared bound, a power of two.
        split_key: Decides which of its units are held out. Elsewhere the organisation draws it; here it follows from
            the demo's seed, so that two demos compare on the same units.
        columns: Role to column, where the file's shape is not recognised.
    """

    org: str
    file: Path
    unit: str
    units_at_most: int
    split_key: bytes
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every organisation's policy grants.

    Attributes:
        epsilon_cap: Of the unit namespace.
        delta: The same.
        allow_unprotected: Whether runs of mode `none` are joined.
        bounds: What the run asks for, by the name of the policy's bound; a bound that is wider stays as it is.
    """

    epsilon_cap: float
    delta: float
    allow_unprotected: bool
    bounds: Mapping[str, float] = field(default_factory=dict)


class LocalFederation:
    """Processes, homes and logs under one folder::

    folder/coordinator/   folder/orgs/ORG/   folder/logs/NAME.log

    Attributes:
        address: Where the organisations dial the coordinator.
    """

    address = "127.0.0.1"

    def __init__(
        self, folder: Path, organisations: Iterable[Organisation], base: Path, *, log_format: str = "text"
    ) -> None:
        self.folder = folder
        self.organisations = {one.org: one for one in organisations}
        self.base = base
        self.logs = folder / "logs"
        logged = ["--log-format", log_format]
        self.coordinator = Process(
            "coordinator",
            ["coordinator", "up", "--home", str(self.coordinator_home), *logged],
            self.logs / "coordinator.log",
        )
        self.daemons = {
            org: Process(org, ["client", "up", "--home", str(self.home(org)), *logged], self.logs / f"{org}.log")
            for org in self.organisations
        }

    @property
    def coordinator_home(self) -> Path:
        """The coordinator's home folder."""
        return self.folder / "coordinator"

    def home(self, org: str) -> Path:
        """An organisation's home folder."""
        return self.folder / "orgs" / org

    def create(self, budget: Budget, say: Callable[[str], None]) -> None:
        """Make keys, enrol everybody, register data, and start every process.

        Raises:
            FoedusError: A command failed, or a process ended.
        """
        self.logs.mkdir(parents=True)
        link_port, enrolment_port = free_ports(2)
        say("the coordinator makes its private CA")
        made = self._coordinator(
            "init", "--federation", FEDERATION, "--address", self.address,
            "--link-port", str(link_port), "--enrolment-port", str(enrolment_port),
        )  # fmt: skip
        self.coordinator.start()
        self._await_coordinator()
        address = f"{self.address}:{enrolment_port}"
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            jobs = [pool.submit(self._enrol, org, address, made["ca_fingerprint"]) for org in self.organisations]
            for org, job in zip(self.organisations, jobs, strict=True):
                job.result()
                say(f"{org} made its keys and was enrolled")
            jobs = [pool.submit(self._register, one, budget) for one in self.organisations.values()]
            for org, job in zip(self.organisations, jobs, strict=True):
                job.result()
                say(f"{org} registered its data and its budget")
        for process in self.daemons.values():
            process.start()

    def start_run(self, charter: dict[str, Any]) -> str:
        """Hand a charter to the coordinator; returns the run's id."""
        path = self.folder / "charter.toml"
        path.write_text(tomlkit.dumps(charter), encoding="utf-8")
        started = self._coordinator("run", "start", str(path), "--base", str(self.base))
        return str(started["run"])

    def check(self) -> None:
        """Raise if any process ended by itself."""
        for process in (self.coordinator, *self.daemons.values()):
            process.check()

    def stop(self) -> None:
        """End every process, the daemons first and all at once."""
        with ThreadPoolExecutor(max(1, len(self.daemons))) as pool:
            list(pool.map(Process.stop, self.daemons.values()))
        self.coordinator.stop()

    # The steps of `create`

    def _coordinator(self, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return run_command("coordinator", *arguments, "--home", str(self.coordinator_home), stdin=stdin)

    def _client(self, org: str, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return run_command("client", *arguments, "--home", str(self.home(org)), stdin=stdin)

    def _await_coordinator(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while "listening" not in self.coordinator.log.read_text(errors="replace"):
            self.coordinator.check()
            if time.monotonic() > deadline:
                raise FoedusError(f"expected the coordinator to listen within {_START_SECONDS:.0f} s; see its log")
            time.sleep(0.1)

    def _enrol(self, org: str, address: str, ca_fingerprint: str) -> None:
        token = self._coordinator("invite", org)["token"]
        join = ("join", "--coordinator", address, "--org", org, "--ca-fingerprint", ca_fingerprint)
        request = self._client(org, *join, "--token-stdin", "--no-wait", stdin=token + "\n")
        self._coordinator("approve", org, "--fingerprint", request["fingerprint"], "--yes")
        self._client(org, "join")

    def _register(self, one: Organisation, budget: Budget) -> None:
        key_file = self.home(one.org) / "keys" / f"split-{NAMESPACE.encode().hex()}.key"
        write_durably(key_file, f"{one.split_key.hex()}\n".encode(), mode=0o600)
        columns = [f"{one.file}:" + ",".join(f"{role}={name}" for role, name in one.columns.items())]
        self._client(
            one.org, "data", "add", str(one.file), "--name", "demo", "--purpose", PURPOSE,
            "--namespace", NAMESPACE, "--unit", one.unit, "--units-at-most", str(one.units_at_most),
            "--epsilon-cap", str(budget.epsilon_cap), "--delta", str(budget.delta), "--base", str(self.base),
            *(["--columns", *columns] if one.columns else []),
        )  # fmt: skip
        self._client(one.org, "peers", "--confirm-all")
        decide(self.home(one.org) / "policy.toml", budget)


def decide(path: Path, budget: Budget) -> None:
    """What a person would write into an organisation's policy."""
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    document["auto_sign"] = True
    document["allow_unprotected"] = budget.allow_unprotected
    bounds: Any = document.setdefault("bounds", tomlkit.table())
    bounds["evaluation"] = ["none", "plain"]
    for name, asked in budget.bounds.items():
        bounds[name] = max(asked, bounds.get(name, asked))
    path.write_text(tomlkit.dumps(document), encoding="utf-8")
    policy.load(path)
