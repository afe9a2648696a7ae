"""`foedus coordinator health`: every kind of trouble is seen from outside, and has its exit code."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from foedus_coordinator import health, pulse
from foedus_coordinator.cli import app
from foedus_coordinator.config import Home
from foedus_coordinator.executor import serve
from typer.testing import CliRunner


def ask(home: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["health", "--home", str(home), "--format", "json"])
    said: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    assert said["exit_code"] == result.exit_code
    assert said["healthy"] == (result.exit_code == 0)
    return result.exit_code, {one["name"]: one for one in said["checks"]}


@contextmanager
def serving(home: Path) -> Iterator[None]:
    """`up` in a thread."""
    stop, lines = threading.Event(), []
    opened = Home(home)
    thread = threading.Thread(target=serve, args=(opened,), kwargs={"stop": stop, "say": lines.append})
    thread.start()
    deadline = time.monotonic() + 30
    while not any("listening" in line for line in lines):
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def test_a_coordinator_that_runs_is_well(federation: Any) -> None:
    with serving(federation.root):
        code, checks = ask(federation.root)
    assert code == 0, checks
    assert list(checks) == ["process", "disk", "database", "certificate", "link port", "enrolment port", "runs"]
    text = CliRunner().invoke(app, ["health", "--home", str(federation.root)])
    assert text.exit_code == 12
    assert "process: not running" in text.stderr
    assert "ok database: in order" in text.stdout


def test_a_coordinator_that_does_not_run(federation: Any) -> None:
    code, checks = ask(federation.root)
    assert (code, checks["process"]["ok"]) == (12, False)
    assert checks["database"]["ok"]


def test_a_port_that_does_not_answer(federation: Any) -> None:
    with serving(federation.root):
        said = pulse.read(federation.root)
        closed = said | {"link": "127.0.0.1:1"}
        (federation.root / pulse.FILE).write_text(json.dumps(closed))
        code, checks = ask(federation.root)
    assert (code, checks["link port"]["ok"], checks["enrolment port"]["ok"]) == (4, False, True)


def test_a_port_of_somebody_else(federation: Any, make_federation: Any) -> None:
    """Another coordinator's certificate on our port is no answer."""
    other = make_federation()
    authority = other.home.authorities.rotate("test")
    other.home.show_under(authority)
    with serving(federation.root), serving(other.root):
        theirs = pulse.read(other.root)
        said = pulse.read(federation.root) | {"enrolment": theirs["enrolment"]}
        (federation.root / pulse.FILE).write_text(json.dumps(said))
        code, checks = ask(federation.root)
    assert (code, checks["enrolment port"]["ok"]) == (4, False)


def test_a_run_in_trouble(federation: Any) -> None:
    with serving(federation.root):
        trouble = {"error": "the disk is full", "tries": 3, "since": 1.0, "again_at": 2.0}
        said = pulse.read(federation.root) | {"troubles": {"small-1": trouble}}
        (federation.root / pulse.FILE).write_text(json.dumps(said))
        code, checks = ask(federation.root)
    assert code == 11
    assert "small-1: the disk is full" in checks["runs"]["detail"]


def test_a_damaged_database(federation: Any) -> None:
    federation.home.storage.close()
    path = federation.root / "coordinator.db"
    data = bytearray(path.read_bytes())
    for offset in range(4096, len(data), 4096):
        data[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(bytes(data))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    code, checks = ask(federation.root)
    assert (code, checks["database"]["ok"]) == (12, False)
    assert "restore" in checks["database"]["detail"]


def test_a_certificate_that_was_not_renewed(federation: Any) -> None:
    home = Home(federation.root)
    home.show_under(home.authority, now=datetime.now(UTC) - timedelta(days=300))
    [found] = [one for one in health.look(home) if one.name == "certificate"]
    assert (found.ok, found.exit_code) == (False, 7)


def test_a_full_disk(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOW_DISK_BYTES", 1 << 60)
    code, checks = ask(federation.root)
    assert (code, checks["disk"]["ok"]) == (12, False)
