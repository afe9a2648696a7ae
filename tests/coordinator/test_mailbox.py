"""The mailbox: queued once, handed out until answered, one answer counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foedus_coordinator.mailbox import Mailbox, Question
from foedus_coordinator.storage import open_storage
from foedus_protocols.canonical import digest
from foedus_protocols.errors import StateError


@pytest.fixture
def mailbox(tmp_path: Path) -> Any:
    storage = open_storage(f"sqlite:///{tmp_path / 'test.db'}")
    yield Mailbox(storage)
    storage.close()


def question(org: str = "x", *, attempt: int = 1, kind: str = "train", number: int = 1) -> Question:
    return Question(run="r", round=number, attempt=attempt, type=kind, org=org)


def queue(mailbox: Mailbox, one: Question) -> str:
    def seal(sequence: int) -> tuple[str, bytes]:
        data = f"{one} {sequence}".encode()
        return digest(data), data

    return mailbox.queue({one: seal})[0]


def test_a_message_is_queued_once(mailbox: Mailbox) -> None:
    first = queue(mailbox, question())
    assert queue(mailbox, question()) == first
    assert queue(mailbox, question(attempt=2)) != first


def test_messages_go_out_in_order_until_they_are_answered(mailbox: Mailbox) -> None:
    first, second = queue(mailbox, question(number=1)), queue(mailbox, question(number=2))
    queue(mailbox, question("y"))
    assert mailbox.next_open("x") == mailbox.next_open("x")
    assert mailbox.next_open("x")[0] == first  # type: ignore[index]
    assert mailbox.next_open("x", skip=[first])[0] == second  # type: ignore[index]
    assert mailbox.answer(first, answer=b"yes", answer_digest="d1")
    assert mailbox.next_open("x")[0] == second  # type: ignore[index]
    assert mailbox.answers([first, second]) == {first: b"yes"}


def test_one_answer_counts(mailbox: Mailbox) -> None:
    message = queue(mailbox, question())
    assert mailbox.answer(message, answer=b"yes", answer_digest="d1") is True
    assert mailbox.answer(message, answer=b"yes", answer_digest="d1") is False
    with pytest.raises(StateError, match="another one"):
        mailbox.answer(message, answer=b"no", answer_digest="d2")
    assert mailbox.answers([message]) == {message: b"yes"}


def test_an_answer_to_a_withdrawn_message_is_ignored(mailbox: Mailbox) -> None:
    message = queue(mailbox, question())
    mailbox.withdraw("r", only="train")
    assert mailbox.next_open("x") is None
    assert mailbox.answer(message, answer=b"late", answer_digest="d1") is False
    assert mailbox.answers([message]) == {}


def test_withdrawing_is_as_narrow_as_asked(mailbox: Mailbox) -> None:
    train, close = queue(mailbox, question(number=2)), queue(mailbox, question(kind="close", number=0))
    other = queue(mailbox, question("y", number=2))
    mailbox.withdraw("r", only="train", orgs=["y"])
    assert mailbox.next_open("y") is None
    mailbox.withdraw("r", before_round=2)
    assert mailbox.next_open("x")[0] == train  # type: ignore[index]
    assert mailbox.answer(close, answer=b"", answer_digest="d") is False
    assert mailbox.answer(other, answer=b"", answer_digest="d") is False


def test_the_latest_attempt_is_what_is_waited_for(mailbox: Mailbox) -> None:
    old, new = queue(mailbox, question(attempt=1)), queue(mailbox, question(attempt=2))
    only = queue(mailbox, question("y"))
    assert old != new
    assert mailbox.latest("r", 1, "train") == {"x": new, "y": only}


def test_nobody_answers_for_another(mailbox: Mailbox) -> None:
    message = queue(mailbox, question())
    assert mailbox.question(message, "x") == question()
    with pytest.raises(StateError, match="that y was sent"):
        mailbox.question(message, "y")
