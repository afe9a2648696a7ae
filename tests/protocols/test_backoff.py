"""Pauses double up to their limit, are spread, and begin anew."""

from __future__ import annotations

import pytest
from foedus_protocols import backoff
from foedus_protocols.backoff import Backoff


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
