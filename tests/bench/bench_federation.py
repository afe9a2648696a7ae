"""A federation to measure: the real coordinator and real daemons as processes, over real TLS, on a base of any size.

It is `foedus_local`'s federation, made by the same documented commands, with two differences: commands run inside this
process (starting Python for each of two hundred commands would take longer than what is measured), and the
long-running ones go through `bench_process.py`, which puts stop-watches and the bench's worker in.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foedus_client.datasets.cli import shipped_base
from foedus_coordinator.config import Home
from foedus_local.federation import PURPOSE, Budget, LocalFederation, Organisation
from foedus_protocols.cli import root
from foedus_protocols.manifest import write_manifest

_HEADS, _KEY_VALUE_HEADS, _HIDDEN, _LAYERS = 60, 5, 55, 25  # times head_dim; 125 x head_dim outputs a layer
_PER_RANK = _LAYERS * (_HEADS + 2 * _KEY_VALUE_HEADS + _HIDDEN)
_UNITS_AT_MOST = 1024
_EPSILON_CAP = 8.0
_WAIT_SECONDS = 600.0
ENTRY = Path(__file__).with_name("bench_process.py")

_in_process = threading.Lock()


def shape(parameters: int) -> tuple[int, int]:
    """(rank, head_dim) of an adapter of exactly so many parameters.

    Raises:
        ValueError: No small rank gives it.
    """
    for rank in (16, 64):
        head_dim, rest = divmod(parameters, _PER_RANK * rank)
        if rest == 0 and head_dim <= 128:
            return rank, head_dim
    raise ValueError(f"expected a multiple of {16 * _PER_RANK} parameters up to {8192 * _PER_RANK}, got {parameters}")


def wide(head_dim: int) -> dict[str, int]:
    """The part of a model's configuration that decides the adapter's size."""
    return {
        "head_dim": head_dim,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "hidden_size": _HIDDEN * head_dim,
        "num_hidden_layers": _LAYERS,
    }


def make_base(folder: Path, head_dim: int) -> Path:
    """A base model's folder: the configuration of a wide model over the tokenizer and the weights of `tiny`."""
    shutil.copytree(shipped_base(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= wide(head_dim)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    write_manifest(folder, provenance={"name": "bench"})
    return folder


def run_here(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    """A `foedus` command inside this process, one at a time; returns its object."""
    output = io.StringIO()
    with (
        _in_process,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(io.StringIO()),
        _standard_input(stdin),
    ):
        root.main(args=[*arguments, "--format", "json"], standalone_mode=False)
    result: dict[str, Any] = json.loads(output.getvalue().strip().splitlines()[-1])
    return result


@contextlib.contextmanager
def _standard_input(text: str | None) -> Any:
    before = sys.stdin
    sys.stdin = io.StringIO(text or "")
    try:
        yield
    finally:
        sys.stdin = before


class MeasuredFederation(LocalFederation):
    """A federation of `members` organisations that move vectors of `parameters` numbers."""

    def __init__(
        self, folder: Path, *, members: int, parameters: int, durable: bool = True, train_seconds: float = 0.0
    ) -> None:
        folder.mkdir(parents=True)
        self.parameters = parameters
        self.rank, head_dim = shape(parameters)
        base = make_base(folder / "base", head_dim)
        data = folder / "data.jsonl"
        rows = [{"record": str(number), "text": f"a record with the number {number}"} for number in range(32)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        organisations = [
            Organisation(
                org=f"org-{number:02d}", file=data, unit="record", units_at_most=_UNITS_AT_MOST, split_key=bytes(32)
            )
            for number in range(1, members + 1)
        ]
        super().__init__(folder, organisations, base)
        self.events = folder / "events"
        self.events.mkdir()
        settings = ["--train-seconds", str(train_seconds), *([] if durable else ["--no-fsync"])]
        for process in (self.coordinator, *self.daemons.values()):
            events = ["--events", str(self.events / f"{process.name}.jsonl")]
            process.prefix = (sys.executable, str(ENTRY), *events, *settings)

    def _coordinator(self, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return run_here("coordinator", *arguments, "--home", str(self.coordinator_home), stdin=stdin)

    def _client(self, org: str, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return run_here("client", *arguments, "--home", str(self.home(org)), stdin=stdin)

    def up(self) -> None:
        """Enrol everybody and start every process."""
        self.create(Budget(epsilon_cap=_EPSILON_CAP, delta=1e-5, allow_unprotected=False), lambda _: None)
        self.await_(lambda: len(self.greeted(0.0)) == len(self.organisations), "every daemon to connect")

    def dial_through(self, port: int) -> None:
        """Let every daemon dial another port of this machine, from its next start."""
        for org, process in self.daemons.items():
            process.stop()
            path = self.home(org) / "client.toml"
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text(
                "".join(
                    f'link = "127.0.0.1:{port}"\n' if line.startswith("link = ") else f"{line}\n" for line in lines
                ),
                encoding="utf-8",
            )
        since = time.time()
        for process in self.daemons.values():
            process.start()
        self.await_(lambda: len(self.greeted(since)) == len(self.organisations), "every daemon to connect again")

    @property
    def link_port(self) -> int:
        """The coordinator's link port."""
        return Home(self.coordinator_home).config.link_port

    def warm_up(self) -> None:
        """One round of a smaller adapter: from here on every process has loaded what it needs for a run."""
        self.await_end(self.begin(1, rank=1, epsilon=1.0))

    def begin(self, rounds: int, *, rank: int | None = None, epsilon: float = 4.0) -> str:
        """Offer a private run of so many rounds; returns its id."""
        return self.start_run(
            {
                "name": f"bench-{rounds}",
                "purpose": PURPOSE,
                "domain": "bench",
                "participants": [
                    {"id": one.org, "unit": one.unit, "units_at_most": one.units_at_most}
                    for one in self.organisations.values()
                ],
                "adapter": {"rank": rank or self.rank},
                "privacy": {"mode": "local", "rounds": rounds, "epsilon": epsilon, "delta": 1e-5},
                "schedule": {"round_seconds": _WAIT_SECONDS},
            }
        )

    # Looking at it

    def storage(self) -> Any:
        """The coordinator's database, as another process sees it."""
        return Home(self.coordinator_home).storage

    def noted(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        """The events of a kind that processes (or one of them) have noted, by their beginning."""
        found = []
        for path in sorted(self.events.glob(f"{name or '*'}.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # A kill may have torn the last line.
                    event = json.loads(line)
                    found += [event | {"process": path.stem}] if event["kind"] == kind else []
        return sorted(found, key=lambda event: event["begun"])

    def greeted(self, since: float) -> set[str]:
        """The organisations whose daemon said hello after a moment (Unix seconds)."""
        return {event["process"] for event in self.noted("greet") if event["begun"] >= since}

    def await_(self, condition: Callable[[], bool], what: str, seconds: float = _WAIT_SECONDS) -> float:
        """Wait for a condition; returns the seconds that it took.

        Raises:
            RuntimeError: It did not come, or a process ended by itself.
        """
        begun = time.monotonic()
        while not condition():
            self.check()
            if time.monotonic() - begun > seconds:
                raise RuntimeError(f"expected {what} within {seconds:.0f} s; see {self.logs}")
            time.sleep(0.05)
        return time.monotonic() - begun

    def await_end(self, run: str, seconds: float = _WAIT_SECONDS) -> None:
        """Wait until a run is complete.

        Raises:
            RuntimeError: It ended in another way, or not at all.
        """
        storage = self.storage()
        try:
            self.await_(lambda: storage.run(run).state == "finished", f"run {run} to end", seconds)
            row = storage.run(run)
        finally:
            storage.close()
        if row.outcome != "complete":
            raise RuntimeError(f"expected run {run} to be complete, it is {row.outcome}: {row.reason}")
