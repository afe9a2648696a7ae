"""No member holds more of the link than its share."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from foedus_protocols.channel import Busy
from foedus_protocols.turns import Turns


def test_calls_are_counted_for_each_member_and_while_they_last() -> None:
    turns = Turns(2, calls_at_once=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(turns.call("clinic"))
        with pytest.raises(Busy, match="at most 2 calls of clinic at once"), turns.call("clinic"):
            pass
        with turns.call("bank"):
            pass
    with turns.call("clinic"):
        pass


def test_a_call_that_fails_is_counted_down() -> None:
    turns = Turns(2, calls_at_once=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="mine"), turns.call("clinic"):
            raise ValueError("mine")


def test_a_members_second_transfer_waits_although_a_slot_is_free() -> None:
    turns = Turns(2)
    assert turns.take_slot("clinic", 0.0)
    assert not turns.take_slot("clinic", 0.01)
    assert turns.take_slot("bank", 0.0)
    assert not turns.take_slot("court", 0.01)
    turns.give_slot_back("bank")
    assert turns.take_slot("court", 0.0)


def test_a_slot_that_comes_free_wakes_who_waits() -> None:
    turns = Turns(1)
    assert turns.take_slot("clinic", 0.0)
    got = threading.Event()
    waiter = threading.Thread(target=lambda: turns.take_slot("bank", 30.0) and got.set())
    waiter.start()
    turns.give_slot_back("clinic")
    assert got.wait(10)
    waiter.join()
