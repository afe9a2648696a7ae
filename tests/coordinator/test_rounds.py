"""`rounds.py` from the charter to the variant, and again after a kill at every write."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_coordinator import figures
from foedus_coordinator.rounds import execute
from foedus_coordinator.run import Interrupted, Run
from foedus_coordinator.storage import Storage
from foedus_protocols.messages import AdvanceAnswer, Body, CharterAnswer, TrainAnswer, TrainOrder
from sqlalchemy import Connection


class Killed(BaseException):
    """Stands for `kill -9`: nobody catches it."""


def vectors_left(federation: Any) -> list[str]:
    return [path.name for path in federation.home.vectors.root.glob("??/*")]


def check_complete(federation: Any, rounds: int = 2) -> None:
    """Everything that a finished run promises."""
    row = federation.home.storage.run(federation.run_id)
    assert (row.state, row.outcome) == ("finished", "complete"), row.reason
    closed = federation.home.storage.rounds(federation.run_id)
    assert [(one.number, one.state, one.survivors) for one in closed] == [
        (number, "closed", ("alpha", "beta", "gamma")) for number in range(1, rounds + 1)
    ]
    for org in federation.orgs.values():
        assert org.adapters[-1] == closed[-1].adapter_digest
        verdicts = {number: receipt["verdict"] for number, receipt in org.receipts.items()}
        assert verdicts == dict.fromkeys(range(1, rounds + 1), "included")
        assert org.closed
    assert vectors_left(federation) == []
    assert row.variant is not None


def test_a_run_from_charter_to_variant(federation: Any, pump: Any) -> None:
    charter = federation.start_run()
    with pump(federation):
        execute(federation.run())
    check_complete(federation)
    row = federation.home.storage.run(federation.run_id)
    manifest = _manifest(row)
    assert manifest["base"] == charter.base
    assert not manifest["private"]
    assert manifest["evaluation"]["loss_before"] == pytest.approx(0.99)
    assert manifest["evaluation"]["loss_after"] == pytest.approx(0.5)
    assert {phase for phases in _seconds(federation).values() for phase in phases} == {
        "offer", "train", "sum", "advance", "confirm", "close", "evaluate",
    }  # fmt: skip


def test_the_adapter_is_the_optimiser_on_the_mean_vector(federation: Any, pump: Any) -> None:
    """One SGD round with rate 1 from zero: the adapter is minus the weighted mean, but for rounding in the ring."""
    federation.start_run(
        recipe={"optimiser": {"name": "sgd", "rate": 1.0}},
        privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0},
    )
    run = federation.run()
    adapters = []

    def keep(run: Run, chain: Any) -> Any:
        adapters.append(chain.adapter.copy())
        return federation.root / "variants"

    object.__setattr__(run, "write_variant", keep)
    with pump(federation):
        execute(run)
    mean = sum(org.vectors[1] for org in federation.orgs.values()) / len(federation.orgs)
    assert np.linalg.norm(adapters[0] + mean) < 1e-4 * np.linalg.norm(mean)


@contextmanager
def dying(storage: Storage, at: int, *, committed: bool) -> Iterator[list[int]]:
    """Make a database die at its `at`-th write, right before or right after the commit."""
    original = storage.write
    count = [0]

    @contextmanager
    def write() -> Iterator[Connection]:
        count[0] += 1
        dies = count[0] == at + 1
        with original() as connection:
            yield connection
            if dies and not committed:
                raise Killed
        if dies:
            raise Killed

    storage.write = write  # type: ignore[method-assign]
    yield count


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_write_and_started_again(make_federation: Callable[[], Any], pump: Any, stride: int) -> None:
    """Kill the coordinator before or after its write number 0, 1, 2, ...; each time a second one completes the run."""
    kills = 0
    for at in range(0, 1000, stride):
        federation = make_federation()
        federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0})
        first = federation.run()
        committed = (at // stride) % 2 == 1
        with pump(federation), dying(first.storage, at, committed=committed) as count:
            try:
                execute(first)
            except Killed:
                kills += 1
                execute(federation.run())
        check_complete(federation, rounds=1)
        first.storage.close()
        if count[0] <= at:
            break
    # Every step writes at least once; a sweep that found fewer writes did not run.
    assert kills >= 20 / stride


def test_many_deaths_in_one_run(federation: Any, pump: Any) -> None:
    """The same coordinator dies again and again, at irregular places, and the run still completes."""
    federation.start_run()
    generator = np.random.default_rng(3)
    deaths = 0
    with pump(federation):
        while True:
            run = federation.run()
            with dying(run.storage, int(generator.integers(12, 24)), committed=deaths % 2 == 0):
                try:
                    execute(run)
                    break
                except Killed:
                    deaths += 1
                finally:
                    run.storage.close()
    assert deaths >= 2
    check_complete(federation)


def test_a_refused_charter_ends_the_run(federation: Any, pump: Any) -> None:
    federation.start_run()
    federation.orgs["beta"].change = lambda kind, body: CharterAnswer(refused_step=9) if kind == "charter" else body
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert (row.outcome, row.variant) == ("refused", None)
    assert "beta" in row.reason
    assert "9" in row.reason
    assert federation.home.storage.rounds(federation.run_id) == []
    assert all(org.closed for org in federation.orgs.values())


def test_a_signature_of_another_key_ends_the_run(federation: Any, pump: Any) -> None:
    federation.start_run()
    federation.orgs["beta"].change = lambda kind, body: (
        CharterAnswer(signature="0" * 128) if kind == "charter" else body
    )
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert row.outcome == "failed"
    assert "beta" in row.reason


@pytest.mark.parametrize("when", ["before beta answered", "after round 1"])
def test_a_charter_that_expires_ends_the_run_and_says_when(federation: Any, pump: Any, when: str) -> None:
    federation.start_run()
    run = federation.run()

    def due() -> bool:
        if when == "after round 1":
            return [row.state for row in run.storage.rounds(run.id)] == ["closed"]
        signed = [org for org, (signature, _) in run.storage.signatures(run.id).items() if signature is not None]
        return sorted(signed) == ["alpha", "gamma"]

    object.__setattr__(run, "clock", lambda: run.charter.expires + 1.0 if due() else time.time())
    if when == "before beta answered":
        federation.orgs["beta"].silent = {"charter"}
    with pump(federation):
        execute(run)
    row = federation.home.storage.run(federation.run_id)
    assert row.reason == f"the charter expired {when}"
    assert (row.outcome, row.variant is None) == (("failed", True) if "before" in when else ("stopped", False))
    assert vectors_left(federation) == []


def test_another_adapter_fails_the_run_by_name(federation: Any, pump: Any) -> None:
    federation.start_run()
    federation.orgs["gamma"].change = lambda kind, body: (
        AdvanceAnswer(adapter_digest="0" * 64) if kind == "advance" else body
    )
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert (row.outcome, row.variant) == ("failed", None)
    assert "gamma" in row.reason
    assert "alpha" not in row.reason
    assert vectors_left(federation) == []


def test_a_late_vector_gets_a_receipt_that_says_so(federation: Any, pump: Any) -> None:
    """gamma stays silent past the deadline; the round closes with two, and gamma's vector is late and erased."""
    federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0}, schedule={"round_seconds": 0.5})
    gamma = federation.orgs["gamma"]
    gamma.silent = {"train", "close"}
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.rounds(federation.run_id)[0]
    assert (row.state, row.survivors) == ("closed", ("alpha", "beta"))
    assert gamma.push(gamma._words(1), 1)["verdict"] == "late"
    assert vectors_left(federation) == []
    # The bytes may come once more, after they were erased: the receipt is the same, and they are erased again.
    assert gamma.push(gamma._words(1), 1)["verdict"] == "late"
    assert vectors_left(federation) == []


def test_a_short_round_is_offered_again_under_wait(federation: Any, pump: Any) -> None:
    """With all three needed, gamma answers only the second attempt; the first attempt's vectors stay valid."""
    federation.start_run(
        masks={"min_survivors": 3},
        privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0},
        schedule={"round_seconds": 1.5, "on_short_round": "wait"},
    )
    gamma = federation.orgs["gamma"]
    gamma.silent = {"train"}
    trained: list[str] = []
    for org in federation.orgs.values():
        org.change = _counting(org.org, trained)
    with pump(federation):
        worker = threading.Thread(target=execute, args=(federation.run(),))
        worker.start()
        _until(lambda: _attempt(federation) >= 2)
        gamma.silent = set()
        worker.join()
    check_complete(federation, rounds=1)
    assert sorted(trained) == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize("rule", ["skip", "end"])
def test_short_rounds_fail_and_name_the_missing(federation: Any, pump: Any, rule: str) -> None:
    federation.start_run(masks={"min_survivors": 3}, schedule={"round_seconds": 0.3, "on_short_round": rule})
    federation.orgs["gamma"].silent = {"train", "close"}
    with pump(federation):
        execute(federation.run())
    rounds = federation.home.storage.rounds(federation.run_id)
    assert [row.state for row in rounds] == ["failed"] * (2 if rule == "skip" else 1)
    assert all("gamma" in (row.reason or "") for row in rounds)
    row = federation.home.storage.run(federation.run_id)
    assert row.outcome == ("failed" if rule == "skip" else "stopped")
    assert row.variant is None
    assert vectors_left(federation) == []


def test_a_refusal_in_training_that_leaves_too_few_ends_the_run(federation: Any, pump: Any) -> None:
    federation.start_run(masks={"min_survivors": 3})
    federation.orgs["alpha"].change = lambda kind, body: TrainAnswer(refused_step=10) if kind == "train" else body
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert row.outcome == "refused"
    assert "alpha at check 10" in row.reason


def test_a_deadline_that_passed_while_the_coordinator_was_down_is_given_again(federation: Any, pump: Any) -> None:
    federation.start_run(
        masks={"min_survivors": 3},
        privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0},
        schedule={"round_seconds": 1.5, "on_short_round": "end"},
    )
    for org in federation.orgs.values():
        org.silent = {"train"}
    stop = threading.Event()
    first = federation.run(stop=stop)
    with pump(federation):
        worker = threading.Thread(target=_interrupted, args=(first,))
        worker.start()
        _until(lambda: _attempt(federation) >= 1)
        stop.set()
        worker.join()
        deadline = federation.home.storage.rounds(federation.run_id)[0].deadline
        _until(lambda: time.time() > deadline)
        for org in federation.orgs.values():
            org.silent = set()
        execute(federation.run())
    check_complete(federation, rounds=1)


def test_scores_are_asked_for_by_closed_rounds(federation: Any, pump: Any) -> None:
    """A member lets them out after every second closed round; a failed round in between must not shift that."""
    federation.start_run(
        masks={"min_survivors": 3},
        privacy={"mode": "none", "rounds": 3, "l2_clip_norm": 1.0},
        schedule={"round_seconds": 60.0, "on_short_round": "skip"},
        evaluation={"term": "plain", "every": 2},
    )
    gamma, run = federation.orgs["gamma"], federation.run()
    passed = [0.0]
    # Only the first round's deadline passes: one that is short in real time would fail the others on a busy machine.
    object.__setattr__(run, "clock", lambda: time.time() + passed[0])
    train = gamma._train
    asked: list[tuple[int, bool]] = []

    def training(order: TrainOrder) -> TrainAnswer:
        asked.append((order.round, order.evaluate))
        if order.round > 1:
            return train(order)
        passed[0] = 61.0
        return TrainAnswer()

    gamma._train = training
    with pump(federation):
        execute(run)
    assert asked == [(1, True), (2, True), (3, False)]


def test_an_organisation_that_scores_nothing_is_left_out_of_the_curve(federation: Any, pump: Any) -> None:
    federation.start_run()
    federation.orgs["beta"].change = lambda kind, body: (
        body.model_copy(update={"scores": None}) if kind in ("train", "evaluate") else body
    )
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    evaluation = _manifest(row)["evaluation"]
    assert [point["tokens"] for point in evaluation["losses"]] == [200, 200, 200]


def _manifest(row: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((Path(row.variant) / "manifest.json").read_text())["manifest"]
    return manifest


def _seconds(federation: Any) -> dict[int, dict[str, float]]:
    with federation.home.storage.read() as connection:
        return figures.seconds_of(connection, federation.run_id)


def _attempt(federation: Any) -> int:
    rounds = federation.home.storage.rounds(federation.run_id)
    return rounds[0].attempt if rounds else 0


def _counting(org: str, trained: list[str]) -> Callable[[str, Body], Body]:
    def change(kind: str, body: Body) -> Body:
        if kind == "train":
            trained.append(org)
        return body

    return change


def _interrupted(run: Run) -> None:
    with pytest.raises(Interrupted):
        execute(run)


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
