"""``foedus client pause|resume|leave|health`` beside a daemon's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from foedus_client import health, life
from foedus_client.cli import app
from foedus_client.ledger import Ledger
from foedus_client.life import Heartbeat, life_of
from foedus_client.lock import HomeLock
from foedus_client.state import ClientState
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.errors import StateError, UsageError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.identity import load_tls_key
from support.daemon_bench import FEDERATION, RUN, US, Bench
from typer.testing import CliRunner

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path: Path, make_worker: Callable[[], Any]) -> Bench:
    """An organisation that signed a charter."""
    made = Bench(tmp_path, make_worker())
    made.sign()
    return made


@pytest.fixture
def running(bench: Bench) -> Iterator[Bench]:
    """The same, while its daemon runs."""
    with HomeLock(bench.home.lock):
        Heartbeat(bench.state).started()
        Heartbeat(bench.state).connected()
        yield bench


def ask(bench: Bench, *arguments: str) -> tuple[int, dict[str, Any]]:
    """A command's exit code and object."""
    done = CliRunner().invoke(app, [*arguments, "--home", str(bench.home.root), "--format", "json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout.strip().splitlines()[-1])


def test_pause_and_resume_say_what_was(bench: Bench) -> None:
    assert ask(bench, "pause", "--reason", "the machine moves")[1] == {"paused": True, "reason": "the machine moves"}
    assert ask(bench, "status")[1]["paused"] == "the machine moves"
    assert ask(bench, "resume")[1] == {"paused": False, "was_paused": True}
    assert ask(bench, "resume")[1] == {"paused": False, "was_paused": False}
    assert ask(bench, "status")[1]["paused"] is None


@pytest.mark.parametrize("by", ["run", "charter"])
def test_leaving_frees_the_budget_once_and_for_good(bench: Bench, by: str) -> None:
    name = RUN if by == "run" else bench.charter.digest[:10]
    with pytest.raises(UsageError, match="--yes"):
        ask(bench, "leave", name)
    assert bench.state.charter(bench.charter.digest).state == "signed"
    code, found = ask(bench, "leave", name, "--yes", "--reason", "we are out")
    assert (code, found["state"], found["run"]) == (0, "left", RUN)
    assert Ledger(bench.home.ledger).admission(bench.charter.digest) is None
    assert Ledger(bench.home.ledger).entries("patients")[-1].body["why"] == "left"
    with pytest.raises(StateError, match="left"):
        ask(bench, "leave", name, "--yes")


def test_only_a_run_that_was_signed_can_be_left(bench: Bench) -> None:
    with pytest.raises(StateError):
        ask(bench, "leave", "beef", "--yes")


def test_a_daemon_at_work_is_healthy(running: Bench) -> None:
    assert ask(running, "health") == (
        0,
        {"healthy": True, "exit_code": 0, "daemon": "running", "problems": []},
    )


def test_a_stopped_daemon_is_code_12(bench: Bench) -> None:
    code, found = ask(bench, "health")
    assert (code, found["daemon"]) == (12, "stopped")
    assert "foedus client up" in found["problems"][0]["text"]


def test_a_silent_coordinator_is_code_4_after_two_minutes(running: Bench) -> None:
    long_ago = time.time() - health.OUT_OF_TOUCH_SECONDS - 60.0
    running.state.remember("life:last_contact", str(long_ago))
    Heartbeat(running.state).trouble("expected an answer, got UNAVAILABLE")
    code, found = ask(running, "health")
    assert code == 4
    assert "UNAVAILABLE" in found["problems"][0]["text"]
    running.state.remember("life:doing", "round 1 of x: sending 9 bytes")  # A long transfer is no silence.
    assert ask(running, "health")[0] == 0


@pytest.mark.parametrize(("age_days", "code"), [(1, 0), (11, 4), (15, 4)])
def test_a_certificate_that_was_not_renewed_is_code_4(running: Bench, age_days: int, code: int) -> None:
    authority = CertificateAuthority.create(FEDERATION)
    request = make_request(load_tls_key(running.home.tls.key), US)
    made = datetime.now(UTC) - timedelta(days=age_days)
    pem = authority.issue_certificate(request, org=US, federation=FEDERATION, days=14, now=made)
    running.home.tls.certificate.write_bytes(pem)
    assert ask(running, "health")[0] == code


def test_a_damaged_memory_is_code_12_and_a_changed_policy_code_3(running: Bench) -> None:
    running.home.policy.write_text("auto_sign = perhaps")
    assert ask(running, "health")[0] == 3
    running.state.close()
    for name in ("client.db", "client.db-wal", "client.db-shm"):
        (running.home.root / name).write_bytes(b"not a database, not at all" * 1000)
    running.home.policy.write_text("")
    found = health.problems_of(running.home)
    assert found[0].code == 12
    assert "damaged" in found[0].text


def test_a_spent_budget_is_code_6(running: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "epsilon_spent", lambda *_: 7.99)
    code, found = ask(running, "health")
    assert code == 6
    assert "patients" in found["problems"][0]["text"]


def test_the_gravest_problem_gives_the_code(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "epsilon_spent", lambda *_: 7.99)
    code, found = ask(bench, "health")
    assert code == 12
    assert [one["code"] for one in found["problems"]] == [12, 6]


# What the daemon says of itself.


def test_the_heartbeat_is_read_back(tmp_path: Path) -> None:
    state = ClientState(tmp_path / "client.db")
    heart = Heartbeat(state)
    heart.started()
    assert life_of(state).connected_at is None
    heart.connected()
    heart.doing("round 3 of north-1: training")
    heart.trouble("the disk was full")
    found = life_of(state)
    assert found.connected_at == found.last_contact
    assert (found.doing, found.last_error) == ("round 3 of north-1: training", "the disk was full")
    heart.disconnected()
    assert life_of(state).connected_at is None
    heart.started()
    assert life_of(state).last_error is None


def test_a_disk_that_takes_no_status_line_is_not_reported_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ClientState(tmp_path / "client.db")

    def full(_: object) -> None:
        raise DiskTrouble("the disk is full")

    monkeypatch.setattr(state, "note", full)
    Heartbeat(state).doing("anything")
    assert life_of(state).doing is None


def test_status_shows_what_is_done_now(running: Bench) -> None:
    Heartbeat(running.state).doing("round 1 of north-1: training")
    found = ask(running, "status")[1]
    assert found["life"]["doing"] == "round 1 of north-1: training"
    text = CliRunner().invoke(app, ["status", "--home", str(running.home.root)]).stdout
    assert "round 1 of north-1: training" in text
    life.pause(running.state, "now")
    assert "(paused)" in CliRunner().invoke(app, ["status", "--home", str(running.home.root)]).stdout


def test_a_daemon_logs_json_and_says_how_it_dials(bench: Bench) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HTTPS_PROXY": "http://user:s3cret@127.0.0.1:9",
    }
    command = [sys.executable, "-m", "foedus_protocols.cli", "client", "up", "--log-format", "json"]
    with subprocess.Popen(
        [*command, "--home", str(bench.home.root)], stderr=subprocess.PIPE, text=True, env=environment
    ) as daemon:
        assert daemon.stderr is not None
        first, second = json.loads(daemon.stderr.readline()), daemon.stderr.readline()
        daemon.terminate()
        rest = daemon.stderr.read()
    assert daemon.returncode == 0
    assert first["message"] == "dialling 127.0.0.1:2 through the proxy 127.0.0.1:9 (from HTTPS_PROXY)"
    assert json.loads(second)["level"] == "warning"  # Nobody is there.
    assert "s3cret" not in str(first) + second + rest
