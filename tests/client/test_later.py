"""What is put aside comes back when it is due, and how often it failed is known."""

from __future__ import annotations

import pytest
from foedus_client.later import Later

pytestmark = pytest.mark.unit


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_message_is_handed_out_once_when_it_is_due() -> None:
    clock = Clock()
    later = Later(clock)
    later.put_aside(b"second", 20.0)
    later.put_aside(b"first", 10.0)
    assert (later.due(), later.soonest()) == (None, 10.0)
    assert later.waits(b"first")
    assert not later.waits(b"another")
    clock.now += 30.0
    assert not later.waits(b"first")
    assert [later.due(), later.due(), later.due()] == [b"first", b"second", None]
    assert later.soonest() is None


def test_each_failure_waits_twice_as_long_up_to_minutes() -> None:
    clock = Clock()
    later = Later(clock)
    waits = []
    for number in range(1, 13):
        assert later.failed(b"poison") == number
        waits.append(later.soonest())
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == 300.0
    later.done(b"poison")
    assert later.failed(b"poison") == 1


def test_what_was_let_go_is_not_handed_out_and_still_waits() -> None:
    clock = Clock()
    later = Later(clock)
    later.put_aside(b"slot", 10.0)
    later.let_go()
    assert later.soonest() is None
    assert later.waits(b"slot")  # It came again: its bytes are at hand from now on.
    clock.now += 10.0
    assert later.due() == b"slot"


def test_memory_is_bounded() -> None:
    later = Later(Clock())
    for number in range(3000):
        later.failed(str(number).encode())
    assert len(later._waiting) <= 1000
    assert later.failed(b"2999") == 2
