"""Runs that are paused, resumed, stopped, or lose a participant; and what a coordinator's own absence does to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from foedus_coordinator import closing, presence
from foedus_coordinator.config import Home
from foedus_coordinator.rounds import execute
from foedus_coordinator.run import Run
from foedus_coordinator.storage import open_storage
from foedus_protocols.errors import StateError

THREE_ROUNDS = {"mode": "none", "rounds": 3, "l2_clip_norm": 1.0}


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


@contextmanager
def executing(run: Run) -> Iterator[threading.Thread]:
    """The run's thread; it has to end by itself."""
    thread = threading.Thread(target=execute, args=(run,))
    thread.start()
    try:
        yield thread
        thread.join(30)
        assert not thread.is_alive(), "the run did not end"
    finally:
        run.stop.set()
        thread.join(30)


def elsewhere(federation: Any) -> Any:
    """The database as another process opens it: it wakes nobody here."""
    return open_storage(f"sqlite:///{federation.root / 'coordinator.db'}")


def row(federation: Any) -> Any:
    return federation.home.storage.run(federation.run_id)


def closed(federation: Any) -> int:
    return sum(one.state == "closed" for one in federation.home.storage.rounds(federation.run_id))


def test_a_pause_lets_the_open_round_finish_and_opens_none(federation: Any, pump: Any) -> None:
    federation.start_run(privacy=THREE_ROUNDS)
    other = elsewhere(federation)
    for org in federation.orgs.values():
        org.silent = {"train"}
    with pump(federation), executing(federation.run()):
        until(lambda: len(federation.home.storage.rounds(federation.run_id)) == 1)
        assert other.wish(federation.run_id, "pause") is True
        assert other.wish(federation.run_id, "pause") is False
        for org in federation.orgs.values():
            org.silent = set()
        _ask_again(federation)
        until(lambda: closed(federation) == 1)
        # Several looks of the run's thread at its wish: it opens nothing.
        since = federation.home.storage.generation
        federation.home.storage.wait(0.3, since=since)
        assert len(federation.home.storage.rounds(federation.run_id)) == 1
        assert row(federation).state == "running"
        assert other.wish(federation.run_id, None) is True
        assert other.wish(federation.run_id, None) is False
    other.close()
    assert (row(federation).outcome, closed(federation)) == ("complete", 3)


def test_a_stop_fails_the_open_round_and_publishes_the_last_closed_adapter(federation: Any, pump: Any) -> None:
    federation.start_run(privacy=THREE_ROUNDS)
    other = elsewhere(federation)
    beta = federation.orgs["beta"]
    run = federation.run()
    with pump(federation), executing(run):
        until(lambda: closed(federation) == 1)
        beta.silent = {"train"}
        until(lambda: [one.state for one in federation.home.storage.rounds(federation.run_id)] == ["closed", "offered"])
        assert other.wish(federation.run_id, "stop", "the grant ended") is True
        assert other.wish(federation.run_id, "stop", "again") is False
    other.close()
    ended = row(federation)
    assert (ended.state, ended.outcome, ended.reason) == ("finished", "stopped", "the grant ended")
    first, second = federation.home.storage.rounds(federation.run_id)
    assert (first.state, second.state, second.reason) == ("closed", "failed", "the run was stopped")
    assert (ended.released_after, ended.variant is not None) == (1, True)
    assert not list(federation.home.vectors.root.glob("??/*"))
    assert all(org.closed for org in federation.orgs.values())


def test_a_stop_before_anybody_signed_ends_without_a_variant(federation: Any, pump: Any) -> None:
    federation.start_run()
    federation.orgs["beta"].silent = {"charter"}
    with pump(federation), executing(federation.run()):
        until(lambda: federation.home.storage.signatures(federation.run_id)["alpha"][0] is not None)
        federation.home.storage.wish(federation.run_id, "stop", "wrong terms")
    assert (row(federation).outcome, row(federation).reason, row(federation).variant) == (
        "stopped",
        "wrong terms",
        None,
    )


def test_a_stop_outlives_a_restart(federation: Any, pump: Any) -> None:
    """Asked while the coordinator is down: the next one opens no round, and sums the one that was frozen."""
    federation.start_run(privacy=THREE_ROUNDS)
    first = federation.run()
    with pump(federation):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("foedus_coordinator.rounds.add", _dies)
            with pytest.raises(KeyboardInterrupt):
                execute(first)
        assert [one.state for one in federation.home.storage.rounds(federation.run_id)] == ["frozen"]
        federation.home.storage.wish(federation.run_id, "stop", "no more")
        execute(federation.run())
    assert (row(federation).outcome, row(federation).reason, closed(federation)) == ("stopped", "no more", 1)


def test_wishes_that_come_too_late_are_refused(federation: Any, pump: Any) -> None:
    storage = federation.home.storage
    with pytest.raises(StateError, match="none named 'other'"):
        storage.wish("other", "stop")
    federation.start_run(privacy={**THREE_ROUNDS, "rounds": 1})
    storage.wish(federation.run_id, "stop")
    for wish in ("pause", None):
        with pytest.raises(StateError, match="is ending"):
            storage.wish(federation.run_id, wish)
    storage.update_run(federation.run_id, wish=None)
    with pump(federation):
        execute(federation.run())
    for wish in ("pause", "stop", None):
        with pytest.raises(StateError, match="has ended"):
            storage.wish(federation.run_id, wish)


def test_a_run_without_one_of_its_members_ends_by_name(federation: Any, pump: Any) -> None:
    federation.start_run(privacy=THREE_ROUNDS)
    home = Home(federation.root)
    with pump(federation), executing(federation.run()):
        until(lambda: closed(federation) == 1)
        federation.orgs["gamma"].silent = {"train"}
        until(lambda: len(federation.home.storage.rounds(federation.run_id)) == 2)
        federation.orgs["gamma"].step = lambda: False
        home.members.revoke("gamma", key=home.operator_key)
    home.storage.close()
    assert row(federation).outcome == "stopped"
    assert "no longer a member" in row(federation).reason
    assert "gamma" in row(federation).reason
    assert row(federation).released_after == 1


def test_nobody_waits_for_an_organisation_that_went_away(federation: Any, pump: Any, monkeypatch: Any) -> None:
    """gamma sends its vector and is never heard of again: neither the comparison nor the run's end waits for it."""
    monkeypatch.setattr(presence, "AWAY_SECONDS", 3.0)
    monkeypatch.setattr(closing, "_TELL_SECONDS", 60.0)
    federation.start_run(privacy={**THREE_ROUNDS, "rounds": 1}, schedule={"round_seconds": 3600.0})
    gamma = federation.orgs["gamma"]

    def leave(kind: str, body: Any) -> Any:
        if kind == "train":
            gamma.step = lambda: False
        return body

    gamma.change = leave
    with pump(federation), executing(federation.run()):
        pass
    assert (row(federation).outcome, closed(federation)) == ("complete", 1)
    assert not gamma.closed


def test_a_deadline_that_passed_while_the_coordinator_slept_is_given_again(federation: Any, pump: Any) -> None:
    """Under `end` a short round ends the run; not so where the coordinator itself was stopped past the deadline."""
    federation.start_run(
        masks={"min_survivors": 3},
        privacy={**THREE_ROUNDS, "rounds": 1},
        schedule={"round_seconds": 60.0, "on_short_round": "end"},
    )
    gamma = federation.orgs["gamma"]
    gamma.silent = {"train"}
    run = federation.run()
    offset = [0.0]
    clock = lambda: time.time() + offset[0]  # noqa: E731
    object.__setattr__(run, "clock", clock)
    object.__setattr__(run.presence, "_clock", clock)
    with pump(federation), executing(run):
        until(lambda: len(federation.home.storage.vectors(federation.run_id, 1)) == 2)
        offset[0] = 3600.0  # What a wall clock shows after SIGSTOP and SIGCONT, or after the machine slept.
        until(lambda: federation.home.storage.rounds(federation.run_id)[0].attempt == 2)
        gamma.silent = set()
    assert (row(federation).outcome, closed(federation)) == ("complete", 1)


def test_a_clock_that_is_set_back_prolongs_no_round(federation: Any, pump: Any) -> None:
    federation.start_run(
        privacy={**THREE_ROUNDS, "rounds": 1}, schedule={"round_seconds": 1.0, "on_short_round": "wait"}
    )
    federation.orgs["gamma"].silent = {"train", "close"}
    run = federation.run()
    offset = [0.0]
    object.__setattr__(run, "clock", lambda: time.time() + offset[0])
    with pump(federation), executing(run):
        until(lambda: len(federation.home.storage.vectors(federation.run_id, 1)) == 2)
        offset[0] = -3000.0
    assert (row(federation).outcome, closed(federation)) == ("complete", 1)


def test_best_releases_the_adapter_with_the_lowest_loss(federation: Any, pump: Any) -> None:
    """Losses 0.99, 0.40, 0.97, 0.5: the adapter after round 1, replayed bit for bit; every round stays spent."""
    federation.start_run(privacy=THREE_ROUNDS, release={"adapter": "best"})
    for org in federation.orgs.values():
        org.change = _scoring({2: 40.0})
    released: list[Any] = []
    run = federation.run()
    write = run.write_variant

    def keep(run: Run, chain: Any) -> Any:
        released.append(chain)
        return write(run, chain)

    object.__setattr__(run, "write_variant", keep)
    with pump(federation):
        execute(run)
    first = federation.home.storage.rounds(federation.run_id)[0]
    assert (row(federation).released_after, closed(federation)) == (1, 3)
    assert [chain.digest for chain in released] == [first.adapter_digest]


def _ask_again(federation: Any) -> None:
    """A hello ends the pause after which a message is handed out once more."""
    for org in federation.orgs:
        federation.desk._handed.pop(org, None)


def _dies(*_: Any) -> None:
    raise KeyboardInterrupt


def _scoring(losses: dict[int, float]) -> Callable[[str, Any], Any]:
    """Report another loss with the vectors of some rounds."""
    rounds = [0]

    def change(kind: str, body: Any) -> Any:
        if kind != "train":
            return body
        rounds[0] += 1
        if rounds[0] not in losses:
            return body
        return body.model_copy(update={"scores": body.scores.model_copy(update={"loss_sum": losses[rounds[0]]})})

    return change
