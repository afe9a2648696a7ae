"""The promises about a slow line, measured: ``make slow-link``.

Over 20 Mbit/s with 200 ms of delay and 1 % loss:

1. a 4 MB push takes at most 1.5 times what a plain socket takes for the same bytes (medians, in turn, over the same
   line), with the 200 ms as a round trip and as the time of one way;
2. a push goes on at its byte offset after an outage that is longer than the keepalive;
3. three organisations, each behind a line of its own, complete a run although one of them is cut off in a round.

Progress goes to standard error, one JSON object to standard output last; the exit code is 1 where a promise is broken.
Without network namespaces the lines are a proxy's (`lines.py`), the third part runs over proxies too, and the object
says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from foedus_client.config import Home as ClientHome
from foedus_client.datasets.cli import shipped_base
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_local.federation import Budget, LocalFederation
from foedus_local.plan import Plan, Terms, plan_invented
from foedus_local.processes import run_command
from foedus_protocols.channel import split_address
from net import lines
from support import netns
from support.proxy import ShapingProxy
from support.wire import Line

_LIMIT = 1.5
_OUTAGE_SECONDS = 30.0  # Keepalive notices a dead line after 15 s.
_RUN_SECONDS = 600.0
_TERMS = Terms(
    private=True, epsilon=8.0, delta=1e-5, rounds=2, seed=3, max_tokens=96, max_records_per_unit=2, expected_units=16,
    max_heldout_records=4, rate=0.01, l2_clip_norm=0.2, evaluate_every=1, round_seconds=240.0,
)  # fmt: skip


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def far_end(folder: Path, line: Line) -> Any:
    """The best line that this machine allows."""
    return lines.packets(folder, line) if netns.why_not() is None else lines.proxied(folder, line)


def compare(folder: Path, line: Line, times: int) -> dict[str, Any]:
    """Push, pull and a plain socket in turn, 4 MiB each."""
    with far_end(folder, line) as far:
        done = subprocess.run(
            far.command("compare", far.link, far.bare, "--times", str(times)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    measured: dict[str, Any] = json.loads(done.stdout)
    measured["push_ratio"] = measured["push_seconds"] / measured["bare_seconds"]
    measured["pull_ratio"] = measured["pull_seconds"] / measured["bare_seconds"]
    return measured


def resume(folder: Path, line: Line) -> dict[str, Any]:
    """A push with an outage in its middle."""
    with far_end(folder, line) as far:
        pushing = subprocess.Popen(
            far.command("push", far.link, "--bytes", str(8 << 20)), stdout=subprocess.PIPE, text=True
        )
        while not any(path.stat().st_size >= 2 << 20 for path in (far.files / "parts").glob("*.part")):
            if pushing.poll() is not None:
                raise RuntimeError("expected a push of 8 MiB to last until its line is cut, it was over before")
            time.sleep(0.01)
        far.outage(_OUTAGE_SECONDS)
        said, _ = pushing.communicate(timeout=_RUN_SECONDS)
    result = json.loads(said.splitlines()[-1])
    return {"offsets": result["offsets"], "complete": result["receipt"] == result["digest"]}


class SlowFederation(LocalFederation):
    """Real processes, the coordinator in the hub's namespace and each organisation in its own."""

    address = netns.Network.address

    def __init__(self, folder: Path, plan: Plan, network: netns.Network) -> None:
        super().__init__(folder, plan.organisations, shipped_base())
        self._network = network
        self.coordinator.prefix = network.at(netns.HUB)
        for org, daemon in self.daemons.items():
            daemon.prefix = network.at(org)

    def _coordinator(self, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return self._run(netns.HUB, "coordinator", *arguments, home=self.coordinator_home, stdin=stdin)

    def _client(self, org: str, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
        return self._run(org, "client", *arguments, home=self.home(org), stdin=stdin)

    def _run(self, place: str, *arguments: str, home: Path, stdin: str | None) -> dict[str, Any]:
        return run_command(*arguments, "--home", str(home), stdin=stdin, prefix=self._network.at(place))


class ProxiedFederation(LocalFederation):
    """Real processes on the loopback, each daemon behind a proxy of its own."""

    def __init__(self, folder: Path, plan: Plan, line: Line, stack: ExitStack) -> None:
        super().__init__(folder, plan.organisations, shipped_base())
        self._line = line
        self._stack = stack
        self.proxies: dict[str, ShapingProxy] = {}

    def create(self, budget: Budget, say: Any) -> None:
        """As the base does, then put a proxy between each daemon and the link."""
        super().create(budget, say)
        for org, daemon in self.daemons.items():
            daemon.stop()
            config = ClientHome(self.home(org)).load()
            host, port = split_address(config.link or "")
            proxy = ShapingProxy(
                (host, port),
                rate_bytes=self._line.rate_bits / 8,
                delay_seconds=self._line.delay_seconds,
                loss=self._line.loss,
            )
            self.proxies[org] = self._stack.enter_context(proxy)
            ClientHome(self.home(org)).save(config.model_copy(update={"link": f"127.0.0.1:{proxy.port}"}))
            daemon.start()


def federate(folder: Path, line: Line) -> dict[str, Any]:
    """A run of two rounds; one organisation's line is cut as soon as the first round has begun."""
    plan = plan_invented(folder / "data", "medical", _TERMS)
    victim = plan.organisations[-1].org
    with ExitStack() as stack:
        federation: LocalFederation
        if netns.why_not() is None:
            network = stack.enter_context(netns.Network({one.org: line for one in plan.organisations}))
            federation = SlowFederation(folder / "federation", plan, network)
        else:
            federation = ProxiedFederation(folder / "federation", plan, line, stack)
        stack.callback(federation.stop)
        federation.create(Budget(epsilon_cap=8.0, delta=1e-5, allow_unprotected=False), say)
        run = federation.start_run(plan.charter())
        storage = Home(federation.coordinator_home).storage
        _wait(federation, lambda: "privacy checks passed" in federation.daemons[victim].log.read_text())
        if isinstance(federation, ProxiedFederation):
            federation.proxies[victim].cut(_OUTAGE_SECONDS)
        else:
            network.cut(victim)
        say(f"{victim} is cut off for {_OUTAGE_SECONDS:.0f} s")
        time.sleep(_OUTAGE_SECONDS)
        if not isinstance(federation, ProxiedFederation):
            network.mend(victim)
        _wait(federation, lambda: storage.run(run).state == "finished")
        detail = views.run_detail(Home(federation.coordinator_home), storage.run(run))
    survivors = [one["survivors"] for one in detail["round_list"]]
    return {"outcome": detail["outcome"], "rounds": len(survivors), "survivors": survivors, "cut_off": victim}


def _wait(federation: LocalFederation, condition: Any) -> None:
    deadline = time.monotonic() + _RUN_SECONDS
    while not condition():
        federation.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"expected progress within {_RUN_SECONDS:.0f} s, see {federation.logs}")
        time.sleep(0.05)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description="The promises about a slow line, measured.")
    parser.add_argument("--times", type=int, default=7, help="Transfers of each kind.")
    parser.add_argument("--keep", type=Path, default=None, help="Keep homes and logs in this new folder.")
    given = parser.parse_args()
    reason = netns.why_not()
    say("lines of packets in network namespaces" if reason is None else f"lines of a proxy: {reason}")
    with tempfile.TemporaryDirectory(prefix="foedus-slow-") as scratch:
        folder = given.keep or Path(scratch)
        round_trip = compare(folder / "round-trip", Line(delay_seconds=0.1), given.times)
        say(f"200 ms a round trip: push {round_trip['push_ratio']:.2f}, pull {round_trip['pull_ratio']:.2f} of bare")
        one_way = compare(folder / "one-way", Line(delay_seconds=0.2), given.times)
        say(f"200 ms one way: push {one_way['push_ratio']:.2f}, pull {one_way['pull_ratio']:.2f} of bare")
        resumed = resume(folder / "resume", Line(delay_seconds=0.1))
        say(f"a push with an outage of {_OUTAGE_SECONDS:.0f} s began at {resumed['offsets']}")
        run = federate(folder / "run", Line(delay_seconds=0.1))
    kept = (
        max(round_trip["push_ratio"], one_way["push_ratio"]) <= _LIMIT
        and resumed["complete"]
        and resumed["offsets"][-1] >= 2 << 20
        and run["outcome"] == "complete"
    )
    result = {
        "line": "packets" if reason is None else "proxy",
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip(),
        "round_trip": round_trip,
        "one_way": one_way,
        "resume": resumed,
        "run": run,
        "kept": kept,
    }
    print(json.dumps(result))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
