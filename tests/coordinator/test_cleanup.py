"""What ended runs and broken transfers leave behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from foedus_coordinator import figures
from foedus_coordinator.cleanup import sweep
from foedus_coordinator.rounds import execute
from foedus_protocols.canonical import digest

ONE_ROUND = {"mode": "none", "rounds": 1, "l2_clip_norm": 1.0}
ANCIENT = 1_000_000.0


def age(path: Path, at: float = ANCIENT) -> None:
    os.utime(path, (at, at))


def swept(federation: Any) -> None:
    sweep(federation.home.storage, files=federation.home.files, pushed=federation.home.vectors)


def names(store: Any) -> set[str]:
    return {path.name for path in store.root.glob("??/*")}


def leave_part(store: Any, data: bytes = b"x" * 100) -> Path:
    """A transfer that broke off."""
    with store.open_part(digest(data), len(data)) as part:
        part.write(data[:50])
    found: Path = store.root / "parts" / f"{digest(data)}.part"
    assert found.exists()
    return found


def test_an_ended_run_leaves_its_charter_and_its_sums(federation: Any, pump: Any) -> None:
    charter = federation.start_run()
    with pump(federation):
        execute(federation.run())
    swept(federation)
    sums = {row.sum_digest for row in federation.home.storage.rounds(federation.run_id)}
    rosters = {
        path.name for path in federation.home.files.root.glob("??/*") if b'"members"' in path.read_bytes()[:4000]
    }
    assert names(federation.home.files) - rosters == {charter.digest, *sums}
    assert names(federation.home.vectors) == set()
    with federation.home.storage.read() as connection:
        for kept in (charter.digest, *sums):
            assert figures.run_of_file(connection, kept, "alpha") == federation.run_id


def test_a_run_that_goes_on_loses_nothing(federation: Any, pump: Any) -> None:
    """Killed while collecting: histories, agreement, acknowledged vectors and open transfers are all still there."""
    federation.start_run(masks={"min_survivors": 3}, privacy=ONE_ROUND)
    gamma = federation.orgs["gamma"]
    gamma.silent = {"train"}
    run = federation.run()
    interrupt_after(run, lambda: len(run.storage.vectors(run.id, 1)) == 2)
    with pump(federation):
        execute_interrupted(run)
    part = leave_part(federation.home.vectors)
    for path in federation.home.vectors.root.glob("??/*"):
        age(path)  # A clock that was set back makes what is new look old.
    before = names(federation.home.files), names(federation.home.vectors)
    assert len(before[1]) == 2
    swept(federation)
    assert (names(federation.home.files), names(federation.home.vectors)) == before
    assert part.exists()
    gamma.silent = set()
    with pump(federation):
        execute(federation.run())
    assert federation.home.storage.run(federation.run_id).outcome == "complete"


def test_what_broken_transfers_left_goes_with_the_last_run_that_could_need_it(federation: Any, pump: Any) -> None:
    federation.start_run(privacy=ONE_ROUND)
    stranger = federation.home.vectors.root / "ab" / ("ab" + "0" * 62)
    stranger.parent.mkdir()
    stranger.write_bytes(b"came in whole and was never acknowledged")
    age(stranger)
    old, new = leave_part(federation.home.vectors), leave_part(federation.home.vectors, b"y" * 100)
    age(old)
    swept(federation)
    assert (stranger.exists(), old.exists(), new.exists()) == (False, False, True)
    with pump(federation):
        execute(federation.run())
    half_a_sum = federation.home.files.root / f"sum-{federation.run_id}-1.part"
    half_a_sum.write_bytes(b"half")
    age(new, time.time() - 1)
    swept(federation)
    assert (new.exists(), half_a_sum.exists()) == (False, False)


def test_a_vector_that_came_after_the_end_of_its_run_goes(federation: Any, pump: Any) -> None:
    """Its sender has the receipt `late`; a kill came between the receipt and the erasing."""
    federation.start_run(privacy=ONE_ROUND, schedule={"round_seconds": 0.5})
    gamma = federation.orgs["gamma"]
    gamma.silent = {"train", "close"}
    with pump(federation):
        execute(federation.run())
    words = gamma._words(1)
    federation.home.vectors.put_bytes(words)
    federation.home.storage.accept_vector(
        run=federation.run_id, number=1, org="gamma", digest=digest(words), size=len(words), receipt=str.encode
    )
    assert names(federation.home.vectors) == {digest(words)}
    swept(federation)
    assert names(federation.home.vectors) == set()


def interrupt_after(run: Any, condition: Any) -> None:
    """Shut the coordinator down as soon as this is so."""

    def look() -> None:
        if condition():
            run.stop.set()

    object.__setattr__(run, "alive", look)


def execute_interrupted(run: Any) -> None:
    from foedus_coordinator.run import Interrupted

    try:
        execute(run)
    except Interrupted:
        return
    raise AssertionError("the run was not interrupted")
