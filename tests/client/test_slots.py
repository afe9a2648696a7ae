"""A vector leaves at its slot: never in between, also after a kill, and in time for its deadline where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from foedus_client import round as rounds
from foedus_client.slots import Held, departure

pytestmark = pytest.mark.unit

FAR = 1e9


@pytest.mark.parametrize(
    ("now", "deadline", "leaves"),
    [
        pytest.param(1.0, FAR, 60.0, id="the next slot"),
        pytest.param(60.0, FAR, 60.0, id="a slot just now"),
        pytest.param(60.001, FAR, 120.0, id="just missed"),
        pytest.param(61.0, 131.0, 120.0, id="the slot is in time"),
        pytest.param(61.0, 111.0, 100.0, id="the last moment before the deadline"),
        pytest.param(99.0, 111.0, 100.0, id="the last moment is still to come"),
        pytest.param(101.0, 111.0, 120.0, id="too late for this attempt"),
        pytest.param(200.0, 111.0, 240.0, id="after the deadline"),
    ],
)
def test_when_words_leave(now: float, deadline: float, leaves: float) -> None:
    assert departure(now, slot=60.0, deadline=deadline, size=1 << 20) == leaves


def test_the_moment_does_not_depend_on_when_they_were_ready() -> None:
    moments = {departure(60.0 + ready, slot=60.0, deadline=500.0, size=10) for ready in (0.1, 1.0, 17.3, 59.9)}
    assert moments == {120.0}


def test_words_are_reserved_then_held_until_the_slot_also_across_a_kill(make_desk: Callable[..., Any]) -> None:
    desk = make_desk(schedule={"vector_slot_seconds": 60.0})
    desk.now = 1001.0
    with pytest.raises(Held) as held:
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert held.value.seconds == 19.0
    assert desk.ledger.reservation(desk.charter.digest, desk.seat.run, 1) is not None
    assert desk.coordinator.pushed == []
    desk.restart()
    desk.now = 1010.0
    with pytest.raises(Held) as held:
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert held.value.seconds == 10.0
    desk.now = 1020.5
    answer, _ = rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert [digest for digest, _ in desk.coordinator.pushed] == [answer.vector_digest]
    assert desk.worker.trained == 1


def test_a_line_that_breaks_after_the_slot_costs_no_second_slot(make_desk: Callable[..., Any]) -> None:
    desk = make_desk(schedule={"vector_slot_seconds": 60.0})
    desk.now = 1020.0 - 1e-3
    with pytest.raises(Held):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    desk.now, desk.coordinator.fail_before_push = 1020.0, True
    with pytest.raises(Exception, match="cut"):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    desk.now, desk.coordinator.fail_before_push = 1033.0, False
    answer, _ = rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert answer.vector_digest is not None


def test_without_slots_a_vector_leaves_when_it_is_ready(desk: Any) -> None:
    answer, _ = rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert answer.vector_digest is not None
