"""What is measured, one function each: rounds, memory, bytes on the wire, and coming back after a kill."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_federation import MeasuredFederation
from foedus_coordinator.tables import nodes
from sqlalchemy import select

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from proxy import ShapingProxy

_MIB = 1 << 20


@contextlib.contextmanager
def federation(**settings: Any) -> Iterator[MeasuredFederation]:
    """A federation that is up, in a folder that goes away with it."""
    with tempfile.TemporaryDirectory(prefix="foedus-bench-", ignore_cleanup_errors=True) as folder:
        made = MeasuredFederation(Path(folder) / "federation", **settings)
        try:
            made.up()
            yield made
        finally:
            made.stop()


# Rounds, and the memory that they take


def measure_rounds(*, members: int, parameters: int, rounds: int, durable: bool = True) -> dict[str, Any]:
    """A run of one round more than `rounds`, of which the first warms up: seconds of each, and memory over idle.

    Idle is a process that has played a round of a small adapter and waits: its libraries are loaded.
    """
    with federation(members=members, parameters=parameters, durable=durable) as made:
        made.warm_up()
        idle = {name: resident(pid) for name, pid in pids(made).items()}
        run = made.begin(rounds + 1)
        made.await_end(run)
        growth = {name: (peak(pid) - idle[name]) / _MIB for name, pid in pids(made).items()}
        measured = [_round(made, event) for event in made.noted("round")[2:]]
    daemons = [value for name, value in growth.items() if name != "coordinator"]
    return {
        "members": members,
        "parameters": parameters,
        "rounds": measured,
        **{name: statistics.median(one[name] for one in measured) for name in measured[0]},
        "coordinator_mib": growth["coordinator"],
        "daemon_mib": max(daemons),
        "limit_mib": 64 + 6 * 4 * parameters / _MIB + 2 * members,
    }


def _round(made: MeasuredFederation, event: dict[str, Any]) -> dict[str, float]:
    """One round's seconds from its offer to the erasing of its vectors; of these, what coding and the worker took.

    Coding of several organisations shares this machine's cores, so its share of the round is their processor seconds
    over the cores that they have; the coordinator's comes after it, alone.
    """

    def processor_seconds(kind: str, side: str) -> float:
        return math.fsum(
            one["cpu"]
            for one in made.noted(kind)
            if event["begun"] <= one["begun"] <= event["ended"] and (one["process"] == "coordinator") == (side != "org")
        )

    cores = min(len(os.sched_getaffinity(0)), len(made.organisations))
    total = event["ended"] - event["begun"]
    at_orgs = (processor_seconds("encode", "org") + processor_seconds("decode", "org")) / cores
    coding = at_orgs + processor_seconds("decode", "coordinator")
    return {"seconds": total, "coding_seconds": coding, "overhead_seconds": total - coding}


def pids(made: MeasuredFederation) -> dict[str, int]:
    """Process ids by name."""
    return {one.name: one.pid or 0 for one in (made.coordinator, *made.daemons.values())}


def resident(pid: int) -> int:
    """Bytes that a process has in memory now; its peak is counted anew from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status(pid, "VmRSS")


def peak(pid: int) -> int:
    """The most that it had since `resident` was called."""
    return _status(pid, "VmHWM")


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# Bytes


def measure_bytes(*, members: int, parameters: int, rounds: int) -> dict[str, Any]:
    """Every byte between daemons and coordinator during one run, TLS and HTTP/2 included, by kind."""
    with (
        federation(members=members, parameters=parameters) as made,
        ShapingProxy(("127.0.0.1", made.link_port)) as proxy,
    ):
        made.dial_through(proxy.port)
        before = proxy.bytes_up, proxy.bytes_down
        run = made.begin(rounds)
        made.await_end(run)
        up, down = proxy.bytes_up - before[0], proxy.bytes_down - before[1]
        vectors, sums = _payload(made, run, rounds)
        for process in made.daemons.values():
            process.stop()
    total = up + down
    return {
        "members": members,
        "parameters": parameters,
        "rounds": rounds,
        "vector_bytes": vectors // (members * rounds),
        "wire_up": up,
        "wire_down": down,
        "vectors": vectors,
        "sums": sums,
        "metadata": total - vectors - sums,
        "metadata_share": (total - vectors - sums) / total,
    }


def _payload(made: MeasuredFederation, run: str, rounds: int) -> tuple[int, int]:
    """Bytes of the vectors that came in, and of the sums, each as often as it went out."""
    storage = made.storage()
    try:
        sizes = [vector.size for number in range(1, rounds + 1) for vector in storage.vectors(run, number)]
    finally:
        storage.close()
    # A sum is packed like a vector, so that it has a vector's size; every organisation pulls each once.
    return sum(sizes), sizes[0] * rounds * len(made.organisations)


# Kills


def measure_resume(*, members: int, parameters: int, kills: int) -> dict[str, Any]:
    """`kill -9` in the middle of a round's training and an immediate restart: seconds until things go on."""
    coordinator, daemon = [], []
    with federation(members=members, parameters=parameters, train_seconds=1.0) as made:
        run = made.begin(2 * kills)
        victim = next(iter(made.daemons))
        for number in range(1, 2 * kills + 1):
            _await_offer(made, run, number)
            if number % 2:
                coordinator.append(_kill_coordinator(made, run, number))
            else:
                daemon.append(_kill_daemon(made, run, number, victim))
        made.await_end(run)
    return {
        "members": members,
        "parameters": parameters,
        "kills": kills,
        "coordinator": {name: statistics.median(one[name] for one in coordinator) for name in coordinator[0]},
        "daemon": {name: statistics.median(one[name] for one in daemon) for name in daemon[0]},
    }


def _await_offer(made: MeasuredFederation, run: str, number: int) -> None:
    """Wait until a round is open and every worker is at it."""
    storage = made.storage()
    try:
        made.await_(
            lambda: [row.state for row in storage.rounds(run)][number - 1 : number] == ["offered"], f"round {number}"
        )
    finally:
        storage.close()


def _kill_coordinator(made: MeasuredFederation, run: str, number: int) -> dict[str, float]:
    begun = time.time()
    made.coordinator.kill()
    made.coordinator.start()
    storage = made.storage()

    def heard() -> set[str]:
        """Who polled, said hello or pushed its vector since."""
        with storage.read() as connection:
            seen = set(connection.execute(select(nodes.c.org).where(nodes.c.last_seen >= begun)).scalars())
        return seen | {vector.org for vector in storage.vectors(run, number)}

    try:
        made.await_(lambda: len(heard()) == len(made.organisations), "every organisation to be heard of")
    finally:
        storage.close()
    back = time.time() - begun
    _await_state(made, run, number, "closed")
    return {"reconnected_seconds": back, "round_closed_seconds": time.time() - begun}


def _kill_daemon(made: MeasuredFederation, run: str, number: int, victim: str) -> dict[str, float]:
    begun = time.time()
    made.daemons[victim].kill()
    made.daemons[victim].start()
    made.await_(lambda: victim in made.greeted(begun), f"{victim} to be back")
    back = time.time() - begun
    _await_state(made, run, number, "closed")
    return {"reconnected_seconds": back, "round_closed_seconds": time.time() - begun}


def _await_state(made: MeasuredFederation, run: str, number: int, state: str) -> None:
    storage = made.storage()
    try:
        made.await_(lambda: storage.round(run, number).state == state, f"round {number} to be {state}")
    finally:
        storage.close()
