"""Pauses double up to their limit, are spread, and begin anew."""

from __future__ import annotations

import threading

import pytest
from foedus_protocols import backoff
from foedus_protocols.backoff import Backoff, start_when_there_is_space
from foedus_protocols.files import DiskFull, DiskTrouble


class Middle:
    """The middle of what may be drawn, and a note of it."""

    drawn: tuple[float, float] = (0.0, 0.0)

    def uniform(self, low: float, high: float) -> float:
        self.drawn = (low, high)
        return (low + high) / 2


@pytest.fixture
def middle(monkeypatch: pytest.MonkeyPatch) -> Middle:
    made = Middle()
    monkeypatch.setattr(backoff, "_random", made)
    return made


def test_pauses_double_up_to_the_limit_and_begin_anew(middle: Middle) -> None:
    waits = Backoff(0.5, 5.0)
    assert [waits.pause() for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    waits.reset()
    assert waits.pause() == 0.5
    waits.at_least(5.0)
    assert [waits.pause(60.0) for _ in range(5)] == [5.0, 10.0, 20.0, 40.0, 60.0]
    assert [waits.pause(), waits.pause()] == [60.0, 5.0]
    assert middle.drawn == (0.5, 1.5)


def test_two_parties_do_not_come_back_at_once() -> None:
    waits = [Backoff(1.0, 1.0, spread=0.25).pause() for _ in range(20)]
    assert len(set(waits)) == 20
    assert 0.75 <= min(waits) <= max(waits) <= 1.25


def test_a_full_disk_at_the_start_is_waited_out_and_other_trouble_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "_FIRST_START", 0.001)
    troubles = iter([DiskFull("the disk is full"), DiskFull("the disk is full")])
    said: list[str] = []

    def serve() -> None:
        if (trouble := next(troubles, None)) is not None:
            raise trouble

    stop = threading.Event()
    start_when_there_is_space(serve, stop=stop, say=said.append)
    assert len(said) == 2
    assert all(line.startswith("the disk is full; starting again in ") for line in said)

    def damaged() -> None:
        raise DiskTrouble("the file is damaged")

    with pytest.raises(DiskTrouble, match="damaged"):
        start_when_there_is_space(damaged, stop=stop, say=said.append)
    stop.set()
    start_when_there_is_space(damaged, stop=stop, say=said.append)  # Told to end: it does not begin.
