"""What `run show` says at each moment, and the commands that change a run's course."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from foedus_coordinator import views
from foedus_coordinator.cli import app
from foedus_coordinator.closing import decide
from foedus_coordinator.presence import AWAY_SECONDS
from foedus_coordinator.rounds import agree, execute, offer
from foedus_coordinator.run import Run
from foedus_protocols.errors import StateError
from foedus_protocols.messages import TrainAnswer
from typer.testing import CliRunner


def detail(federation: Any) -> dict[str, Any]:
    value = views.run_detail(federation.home, federation.home.storage.run(federation.run_id))
    json.dumps(value)
    return value


def command(federation: Any, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, ["run", words[0], federation.run_id, *words[1:], "--home", str(federation.root), "--format", "json"]
    )
    if result.exception is not None:
        raise result.exception
    said: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return said


def signed(federation: Any, pump: Any) -> Run:
    """A run that everybody signed and that has opened its first round."""
    run: Run = federation.run()
    for org in federation.orgs.values():
        org.silent = {"train"}
    with pump(federation):
        agree(run)
    offer(run, 1, run.chain())
    return run


def test_each_organisation_by_what_it_is_waited_for(federation: Any, pump: Any) -> None:
    federation.start_run(masks={"min_survivors": 3})
    found = detail(federation)
    assert (found["doing"], found["waiting_for"]) == ("waiting for signatures", ["alpha", "beta", "gamma"])
    assert set(found["organisations"].values()) == {"never seen"}
    assert found["coordinator_running"] is False
    run = signed(federation, pump)
    alpha, beta, _ = federation.orgs.values()
    alpha.silent = beta.silent = set()
    beta._train = lambda order: TrainAnswer(refused_step=10)
    federation.desk._handed.clear()
    while alpha.step() or beta.step():
        pass
    found = detail(federation)
    assert found["doing"] == "round 1: collecting vectors"
    assert found["organisations"] == {"alpha": "vector is in", "beta": "refused at check 10", "gamma": "training"}
    assert found["waiting_for"] == ["gamma"]
    assert found["waiting_until"] == run.storage.round(run.id, 1).deadline
    federation.home.members.seen("gamma", time.time() - AWAY_SECONDS - 1)
    assert detail(federation)["organisations"]["gamma"].startswith("not seen since 20")
    federation.home.members.revoke("gamma", key=federation.home.operator_key)
    found = detail(federation)
    assert (found["organisations"]["gamma"], found["waiting_for"]) == ("no longer a member", [])


def test_the_stages_of_a_run(federation: Any, pump: Any) -> None:
    federation.start_run()
    run = signed(federation, pump)
    said: list[str] = []

    def state(**values: Any) -> None:
        run.storage.update_round(run.id, 1, **values)
        said.append(detail(federation)["doing"])

    state(attempt=2)
    state(attempt=1, state="frozen")
    state(state="advanced")
    command(federation, "pause")
    state(state="offered")
    state(state="failed", reason="short")
    decide(run, "stopped", "enough")
    said.append(detail(federation)["doing"])
    run.storage.update_run(run.id, state="finished")
    said.append(detail(federation)["doing"])
    assert said == [
        "round 1: collecting vectors (attempt 2)",
        "round 1: adding up",
        "round 1: comparing the next adapter",
        "round 1: collecting vectors, then pausing",
        "paused before round 2; `foedus coordinator run resume` lets it go on",
        "ending: scoring the last adapter and writing the variant",
        "ended: stopped (enough)",
    ]


def test_the_commands_write_down_what_is_wanted(federation: Any, pump: Any) -> None:
    federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0})
    assert command(federation, "pause") == {
        "run": federation.run_id, "wish": "pause", "changed": True, "coordinator_running": False,
    }  # fmt: skip
    assert command(federation, "pause")["changed"] is False
    assert (command(federation, "show")["wish"], command(federation, "resume")["changed"]) == ("pause", True)
    assert command(federation, "stop", "--reason", "the grant ended")["changed"] is True
    assert command(federation, "stop")["changed"] is False
    with pump(federation):
        execute(federation.run())
    ended = command(federation, "show")
    assert (ended["outcome"], ended["reason"], ended["wish"]) == ("stopped", "the grant ended", None)
    for words in ("pause", "resume", "stop"):
        with pytest.raises(StateError, match="has ended"):
            command(federation, words)


@pytest.mark.parametrize("prepare", [lambda federation: None, lambda federation: command(federation, "pause")])
def test_people_read_it_too(federation: Any, prepare: Callable[[Any], Any]) -> None:
    federation.start_run()
    prepare(federation)
    result = CliRunner().invoke(app, ["run", "show", federation.run_id, "--home", str(federation.root)])
    assert result.exit_code == 0, result.exception
    assert "waiting for signatures" in result.stdout
    assert "alpha: charter waiting; never seen" in result.stdout
    assert "The coordinator is not running" in result.stdout
