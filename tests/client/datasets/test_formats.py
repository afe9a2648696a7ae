"""Which shapes of rows are recognised, and why others are not."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_client.datasets.formats import Chat, Message, PlainText, RowError, parse_row


def _asked(question: str, answer: str) -> Chat:
    return Chat(messages=(Message(role="user", content=question), Message(role="assistant", content=answer)))


@pytest.mark.parametrize(
    ("row", "parsed"),
    [
        ({"question": "Q", "answer": "A", "topic": "t"}, _asked("Q", "A")),
        ({"question": "Q", "context": "C", "long_answer": "A"}, _asked("C\n\nQ", "A")),
        ({"question": "Q", "context": "", "answer": "A"}, _asked("Q", "A")),
        ({"instruction": "Q", "input": "C", "output": "A"}, _asked("Q\n\nC", "A")),
        ({"instruction": "Q", "output": "A"}, _asked("Q", "A")),
        ({"prompt": "Q", "completion": "A"}, _asked("Q", "A")),
        ({"text": "T"}, PlainText(text="T")),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, _asked("Q", "A")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": "A"},
                ]
            },
            _asked("Q", "A"),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "thanks"},
                ]
            },
            _asked("Q", "A"),
        ),
    ],
)
def test_recognised(row: dict[str, Any], parsed: Chat | PlainText) -> None:
    assert parse_row(row) == parsed


def test_system_messages_become_the_developers() -> None:
    chat = parse_row({"messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}]})
    assert isinstance(chat, Chat)
    assert [message.role for message in chat.messages] == ["developer", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"note": "x"}, "no known shape"),
        ({"question": "Q", "answer": " \n"}, "answer is empty"),
        ({"question": "Q", "answer": None}, "long_answer is missing"),
        ({"question": 3, "answer": "A"}, "question is not text"),
        ({"text": ["T"]}, "text is not text"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": ["hello"]}, "not an object"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "holds no answer"),
        ({"messages": [{"role": "tool", "content": "Q"}]}, "none of system"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "other than text"),
    ],
)
def test_rejected_with_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row)


def test_named_columns_win_over_recognition() -> None:
    row = {"text": "T", "frage": "Q", "kontext": "C", "antwort": "A"}
    assert parse_row(row, {"question": "frage", "context": "kontext", "answer": "antwort"}) == _asked("C\n\nQ", "A")
    assert parse_row(row, {"text": "kontext"}) == PlainText(text="C")
    with pytest.raises(RowError, match="nowhere is missing"):
        parse_row(row, {"question": "frage", "answer": "nowhere"})
