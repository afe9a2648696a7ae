"""A federation of hundreds of virtual organisations under Flower's simulation engine: method studies and scale tests.

The coordinator's `ServerApp` and the worker's `ClientApp` are the real ones, and so is every organisation's daemon with
its policy, ledger, gate and coding. What is missing is what a study does not need: processes, sockets, TLS and the
enrolment's waiting for people. Daemons are driven by a few threads, each the only one that touches its organisations'
files; the training runs in Flower's actors (`simulation_app.py`).

In mode `none` every draw follows from the seed, so that a simulation gives the same bits as the real federation of the
same organisations.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Both read these when they are imported or started; Ray would otherwise report its use to its makers.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, which it warns about.

import tomlkit
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from foedus_client.config import ClientConfig
from foedus_client.config import Home as ClientHome
from foedus_client.daemon import Daemon
from foedus_client.join import prepare
from foedus_client.peers import confirm_members
from foedus_client.policy import add_coordinator
from foedus_client.register import Declaration, register
from foedus_client.state import ClientState
from foedus_coordinator.config import Config
from foedus_coordinator.config import Home as CoordinatorHome
from foedus_coordinator.executor import link_desk, run_of
from foedus_coordinator.rounds import execute
from foedus_coordinator.run import Interrupted
from foedus_coordinator.service import LinkDesk
from foedus_protocols.errors import FoedusError, MissingExtra, RoundFailed, VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import load_signing_key, public_hex
from foedus_protocols.store import CHUNK_BYTES, FileStore

from foedus_local.demo import Result, finished, say, watch
from foedus_local.federation import FEDERATION, NAMESPACE, PURPOSE, Budget, Organisation, decide
from foedus_local.plan import Plan
from foedus_local.processes import run_command
from foedus_local.simulation_app import Engine, VirtualWorker, client_app

_ADDRESS = "127.0.0.1:0"  # Nothing listens: the settings want an address.
_IDLE_SECONDS = 0.2
_JOIN_SECONDS = 30.0


def simulate(plan: Plan, folder: Path, base: Path, *, actors: int) -> Result:
    """Run a plan's federation in this process and Flower's actors.

    Args:
        plan: Who takes part, and the terms.
        folder: An empty folder: ``coordinator/`` and ``orgs/ORG/`` as in a real federation.
        base: The base model's folder.
        actors: Virtual workers at a time, and threads that drive daemons.

    Raises:
        MissingExtra: Ray is not installed.
        RoundFailed: The run ended without a variant.
    """
    run_simulation = _engine_of_flower()
    started = time.monotonic()
    say("the coordinator makes its keys, every organisation its home")
    home = CoordinatorHome.create(folder / "coordinator", _settings())
    homes = [_organisation(home, one, plan, base, folder / "orgs" / one.org) for one in plan.organisations]
    for client in homes:
        confirm_members(client, home.members.roster().members, {}, everybody=True, ask=lambda *_: False)
    charter = folder / "charter.toml"
    write_durably(charter, tomlkit.dumps(plan.charter()).encode())
    run = run_command("coordinator", "run", "start", str(charter), "--base", str(base), "--home", str(home.root))["run"]
    engine, stop = Engine(), threading.Event()
    problems: list[BaseException] = []
    app = _server_app(home, run, engine, len(homes), stop, problems)
    with _daemons(home, homes, engine, actors, stop, problems), _progress(home, run, stop, problems) as last:
        run_simulation(app, client_app(), len(homes), backend_config=_backend(actors))
        stop.set()
    if problems:
        raise problems[0]
    return finished(plan, last(), folder, seconds=time.monotonic() - started)


def _engine_of_flower() -> Callable[..., None]:
    """Flower's `run_simulation`.

    Raises:
        MissingExtra: Without Ray, Flower would end the process.
    """
    lock_ray()
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtra("expected Ray for `foedus simulate`: pip install 'foedus[simulation]'") from error
    from flwr.simulation import run_simulation

    # The function is marked for removal in favour of `flwr run`, which wants a packaged app and a configuration file of
    # its own; our range of flwr has it. Errors still reach the log.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    return run_simulation


def lock_ray() -> None:
    """Make Ray ask every caller for a token that only this process and its children know.

    Ray listens on every interface, whatever address it is given, and by itself serves whoever connects. It reads these
    variables when it is imported, so that this comes first.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _backend(actors: int) -> dict[str, Any]:
    return {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        # A cluster of this process alone, without a dashboard.
        "init_args": {
            "num_cpus": actors,
            "include_dashboard": False,
            "log_to_driver": False,
        },
    }


# The coordinator


def _settings() -> Config:
    return Config(federation=FEDERATION, address="127.0.0.1", link_port=0, enrolment_port=0, listen="127.0.0.1")


def _server_app(
    home: CoordinatorHome,
    run: str,
    engine: Engine,
    count: int,
    stop: threading.Event,
    problems: list[BaseException],
) -> ServerApp:
    """The coordinator's app: `rounds.execute`, after Flower's grid was handed to the virtual workers."""
    app = ServerApp()
    played = run_of(home, home.storage.run(run), stop=stop, say=lambda line: None)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            engine.attach(grid, count)
            execute(played)
        except Interrupted:
            pass
        except Exception as error:  # Flower would print it and end; whoever called `simulate` is told instead.
            problems.append(error)
            stop.set()

    return app


# The organisations


def _organisation(home: CoordinatorHome, one: Organisation, plan: Plan, base: Path, root: Path) -> ClientHome:
    """A home as `join` and `data add` leave it."""
    client = ClientHome(root)
    config = ClientConfig(org=one.org, enrolment=_ADDRESS, ca_fingerprint=home.authority.fingerprint)
    prepare(client, config)
    token = home.members.invite(one.org)
    key = public_hex(load_signing_key(client.signing_key))
    request = home.members.request(one.org, token, csr_pem=client.request.read_bytes(), signing_key=key)
    home.members.approve(request, authority=home.authority, key=home.operator_key)
    write_durably(client.tls.ca, home.authority.pem)
    write_durably(client.tls.certificate, home.members.find(request.id).certificate_pem or b"")
    operator = public_hex(home.operator_key)
    add_coordinator(client.policy, operator)
    coordinates = {"federation": FEDERATION, "operator_key": operator, "link": _ADDRESS}
    client.save(config.model_copy(update=coordinates))
    split = client.keys / f"split-{NAMESPACE.encode().hex()}.key"
    write_durably(split, f"{one.split_key.hex()}\n".encode(), mode=0o600)
    budget = plan.budget()
    register(client, _declaration(one, plan, budget, base))
    decide(client.policy, budget)
    return client


def _declaration(one: Organisation, plan: Plan, budget: Budget, base: Path) -> Declaration:
    columns = [f"{one.file}:" + ",".join(f"{role}={name}" for role, name in one.columns.items())]
    return Declaration(
        files=(one.file,),
        name="demo",
        purposes=(PURPOSE,),
        namespace=NAMESPACE,
        units=(one.unit,),
        columns=tuple(columns if one.columns else ()),
        units_at_most=one.units_at_most,
        epsilon_cap=budget.epsilon_cap,
        delta=budget.delta,
        max_tokens=plan.terms.max_tokens,
        max_records_per_unit=plan.terms.max_records_per_unit,
        base=base,
    )


@contextmanager
def _daemons(
    home: CoordinatorHome,
    homes: Sequence[ClientHome],
    engine: Engine,
    count: int,
    stop: threading.Event,
    problems: list[BaseException],
) -> Iterator[None]:
    """Drive the organisations' daemons in `count` threads while the block runs."""
    desk = link_desk(home)

    def drive(mine: list[int]) -> None:
        try:
            _drive({index: homes[index] for index in mine}, desk, engine, stop)
        except Exception as error:  # A thread's end must reach the caller.
            problems.append(error)
            stop.set()

    shares = [list(range(first, len(homes), count)) for first in range(min(count, len(homes)))]
    threads = [threading.Thread(target=drive, args=(mine,), name=f"daemons-{mine[0]}") for mine in shares]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(_JOIN_SECONDS)


def _drive(homes: dict[int, ClientHome], desk: LinkDesk, engine: Engine, stop: threading.Event) -> None:
    """Let each daemon in turn answer its messages."""
    daemons = []
    for index, home in homes.items():
        us = home.membership()
        state = ClientState(home.state)
        daemon = Daemon(home, us, state=state, worker=VirtualWorker(engine, index, home.work), stop=stop)
        link = DirectLink(desk, us.org)
        daemon.greet(link)
        daemons.append((daemon, link, state))
    try:
        while not stop.is_set():
            since, answered = desk.storage.generation, 0
            for daemon, link, _ in daemons:
                data = link.poll(0.0)
                if data is not None and not stop.is_set():
                    daemon.handle(data, link)
                    answered += 1
            if not answered:
                desk.storage.wait(_IDLE_SECONDS, since=since)
    finally:
        for _, _, state in daemons:
            state.close()


class DirectLink:
    """What a daemon uses of the link, without a link: the coordinator's desk in the same process."""

    def __init__(self, desk: LinkDesk, org: str) -> None:
        self._desk = desk
        self._org = org

    def hello(self, body: dict[str, Any]) -> dict[str, Any]:
        """Introduce ourselves."""
        return self._desk.hello(self._org, body, "")  # There is no certificate here.

    def poll(self, wait_seconds: float) -> bytes | None:
        """The oldest message that was not answered."""
        return self._desk.poll(self._org, wait_seconds)

    def deliver(self, envelope: bytes) -> None:
        """Send an answer."""
        self._desk.deliver(self._org, envelope)

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        """Hand over a file; the receipt comes back."""
        size = path.stat().st_size
        with self._desk.granted(self._org, digest, size, context) as part, path.open("rb") as file:
            file.seek(part.offset)
            while piece := file.read(CHUNK_BYTES):
                part.write(piece)
            part.finish()
        receipt: dict[str, Any] = json.loads(self._desk.received(self._org, digest, size, context))
        return receipt

    def pull(self, digest: str, store: FileStore, *, max_bytes: int) -> Path:
        """Fetch a file: a second name of the coordinator's own, since hundreds of copies would take minutes."""
        if not store.has(digest):
            path = self._desk.path_of(self._org, digest)
            if path.stat().st_size > max_bytes:
                raise VerificationError(f"expected a file of at most {max_bytes} bytes, {digest} is longer")
            store.take_link(path, digest)
        return store.path(digest)

    def reload(self) -> None:
        """No connection holds a certificate."""

    def close(self) -> None:
        """Nothing to hang up."""


# Progress


@contextmanager
def _progress(
    home: CoordinatorHome, run: str, stop: threading.Event, problems: list[BaseException]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Show progress beside the engine, which holds the main thread; gives a function for the run as it stands."""
    found: list[dict[str, Any]] = []

    def check() -> None:
        if problems:
            raise RoundFailed("the simulation was stopped by an error")

    def look() -> None:
        try:
            found.append(watch(home, run, check))
        except FoedusError as error:
            problems.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()

    def last() -> dict[str, Any]:
        thread.join(_JOIN_SECONDS)
        if not found:
            raise RoundFailed("expected the run to end, Flower's engine ended first")
        return found[-1]

    yield last
