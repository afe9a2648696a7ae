"""A run's thread: it outlives errors that pass, and gives up by name on those that do not."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest
from foedus_coordinator import runner
from foedus_coordinator.executor import run_of
from foedus_coordinator.pulse import Pulse, read
from foedus_coordinator.rounds import execute
from foedus_coordinator.run import Interrupted
from foedus_coordinator.runner import SAME_ERROR_TRIES, Trouble, keep_going
from foedus_protocols.errors import RoundFailed
from foedus_protocols.files import DiskTrouble
from sqlalchemy.exc import OperationalError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(runner, "_LONGEST_PAUSE", 0.002)


class Player:
    """Plays a run, and raises some errors before that."""

    def __init__(self, federation: Any, errors: list[Exception]) -> None:
        self.federation, self.errors, self.stop = federation, errors, threading.Event()
        self.calls = 0
        self.lines: list[str] = []
        self.reports: list[Trouble | None] = []

    def __call__(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        home = self.federation.home
        row = home.storage.run(self.federation.run_id)
        execute(run_of(home, row, stop=self.stop, say=self.lines.append, alive=lambda: self.reports.append(None)))

    def keep_going(self, play: Callable[[], None] | None = None) -> Any:
        home = self.federation.home
        keep_going(
            self.federation.run_id,
            play or self,
            storage=home.storage,
            stop=self.stop,
            say=self.lines.append,
            report=self.reports.append,
        )
        return home.storage.run(self.federation.run_id)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OperationalError("INSERT", {}, Exception("database or disk is full")),
        DiskTrouble("the disk is full"),
        MemoryError(),
    ],
)
def test_trouble_that_passes_is_sat_out(federation: Any, pump: Any, error: Exception) -> None:
    federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0})
    player = Player(federation, [error] * (3 * SAME_ERROR_TRIES))
    with pump(federation):
        row = player.keep_going()
    assert (row.outcome, player.calls) == ("complete", 3 * SAME_ERROR_TRIES + 1)
    troubles = [one for one in player.reports if one is not None]
    assert [one.tries for one in troubles] == list(range(1, 3 * SAME_ERROR_TRIES + 1))
    assert player.reports[len(troubles)] is None  # Over as soon as the run got as far as to wait for somebody.


def test_an_error_that_never_passes_fails_the_run_by_name_and_everybody_is_told(federation: Any, pump: Any) -> None:
    federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0})
    player = Player(federation, [RoundFailed("the sums give another adapter")] * SAME_ERROR_TRIES)
    with pump(federation):
        row = player.keep_going()
    assert (row.state, row.outcome) == ("finished", "failed")
    assert f"gave up after {SAME_ERROR_TRIES} tries: the sums give another adapter" in row.reason
    assert player.calls == SAME_ERROR_TRIES + 1
    assert all(org.closed for org in federation.orgs.values())


def test_errors_that_differ_are_not_one_that_stays(federation: Any, pump: Any) -> None:
    federation.start_run(privacy={"mode": "none", "rounds": 1, "l2_clip_norm": 1.0})
    player = Player(federation, [RoundFailed(f"time {number}") for number in range(2 * SAME_ERROR_TRIES)])
    with pump(federation):
        assert player.keep_going().outcome == "complete"


def test_a_run_that_cannot_even_be_closed_is_finished_all_the_same(federation: Any) -> None:
    federation.start_run()
    charter = federation.home.storage.run(federation.run_id).charter_digest
    federation.home.files.delete(charter)
    row = Player(federation, []).keep_going()
    assert (row.state, row.outcome) == ("finished", "failed")
    assert charter in row.reason


def test_an_unexpected_error_is_told_without_its_text(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    federation.start_run()
    player = Player(federation, [])

    def play() -> None:
        raise ValueError("patient Nightingale")

    row = player.keep_going(play)
    assert row.outcome == "failed"
    assert "an unexpected ValueError" in row.reason
    assert "Nightingale" not in "".join([*player.lines, row.reason, caplog.text])
    assert "test_runner.py" in caplog.text


def test_a_shutdown_leaves_the_run_as_it_is(federation: Any) -> None:
    federation.start_run()
    assert Player(federation, [Interrupted("stop")]).keep_going().state == "agreeing"
    player = Player(federation, [])

    def play() -> None:
        player.calls += 1
        player.stop.set()
        raise OSError(errno.EIO, "Input/output error")

    assert player.keep_going(play).state == "agreeing"
    assert player.calls == 1


def test_the_pulse_tells_other_processes(tmp_path: Any) -> None:
    assert read(tmp_path) == {}
    pulse = Pulse(tmp_path, link="h:1", enrolment="h:2")
    trouble = Trouble(error="the disk is full", tries=3, since=1.0, again_at=2.0)
    pulse.report("r", trouble)
    said = read(tmp_path)
    assert (said["link"], said["troubles"]["r"]["error"], said["troubles"]["r"]["tries"]) == (
        "h:1",
        "the disk is full",
        3,
    )
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o600
    pulse.report("r", None)
    assert read(tmp_path)["troubles"] == {}
    (tmp_path / "status.json").write_bytes(b"torn {")
    assert read(tmp_path) == {}
