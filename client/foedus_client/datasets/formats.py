"""What a row means: a chat with answers to learn, or plain text.

Recognised by the names of their columns, row by row: OpenAI ``messages``, ShareGPT ``conversations``, Alpaca,
question/answer, prompt/completion and ``text``. Any other shape is mapped by ``--columns``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from foedus_protocols.errors import DataError

Role = Literal["developer", "user", "assistant"]

COLUMN_ROLES = ("question", "context", "answer", "text")
_ROLES: dict[str, Role] = {
    "system": "developer",  # The harmony format gives `system` another meaning and puts instructions here.
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class RowError(DataError):
    """A row is not usable; the message is the reason, without a word of the row."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn.

    Attributes:
        role: Who speaks.
        content: What is said.
        thinking: Reasoning before an assistant's answer, kept for the last turn only.
    """

    role: Role
    content: str
    thinking: str = ""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Turns that end with an answer."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """Text to be joined with the unit's other texts."""

    text: str


def parse_row(values: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Chat | PlainText:
    """Recognise a row.

    Args:
        values: The row's fields.
        columns: Which column plays which of `COLUMN_ROLES`; recognition by name is then off.

    Raises:
        RowError: The row has no known shape, or an empty or ill-typed part.
    """
    if columns:
        return _mapped(values, columns)
    if "messages" in values:
        return _turns(values["messages"], "messages", role="role", content="content")
    if "conversations" in values:
        return _turns(values["conversations"], "conversations", role="from", content="value")
    if "instruction" in values and "output" in values:
        return _asked(values, question="instruction", context="input", answer="output", context_last=True)
    if "question" in values and ("answer" in values or "long_answer" in values):
        answer = "answer" if values.get("answer") is not None else "long_answer"
        return _asked(values, question="question", context="context", answer=answer)
    if "prompt" in values and "completion" in values:
        return _asked(values, question="prompt", context="", answer="completion")
    if "text" in values:
        return PlainText(text=_text(values, "text"))
    raise RowError("no known shape: name its columns with --columns FILE:question=...,answer=... or FILE:text=...")


def _mapped(values: Mapping[str, Any], columns: Mapping[str, str]) -> Chat | PlainText:
    if "text" in columns:
        return PlainText(text=_text(values, columns["text"]))
    context = columns.get("context", "")
    return _asked(values, question=columns["question"], context=context, answer=columns["answer"])


def _asked(values: Mapping[str, Any], *, question: str, context: str, answer: str, context_last: bool = False) -> Chat:
    """A question with an optional context, and its answer."""
    parts = [_text(values, question)]
    if context and values.get(context) not in (None, ""):
        # The context comes first unless the format's instruction refers to what follows it. A record that is too long
        # loses the start of its prompt, so that the question stays.
        parts.insert(len(parts) if context_last else 0, _text(values, context))
    return Chat(
        messages=(
            Message(role="user", content="\n\n".join(parts)),
            Message(role="assistant", content=_text(values, answer)),
        )
    )


def _turns(turns: Any, column: str, *, role: str, content: str) -> Chat:
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{column} is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(f"{column} holds a turn that is not an object")
        speaker = turn.get(role)
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise RowError(f"{column} holds a turn whose {role} is none of {', '.join(_ROLES)}")
        thinking = turn.get("thinking") or ""
        if not isinstance(thinking, str):
            raise RowError(f"{column} holds a turn whose thinking is not text")
        messages.append(Message(role=_ROLES[speaker], content=_content(turn, content), thinking=_valid(thinking)))
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise RowError(f"{column} holds no answer")
    return Chat(messages=tuple(messages))


def _content(turn: Mapping[str, Any], key: str) -> str:
    """A turn's text; OpenAI's list of parts is joined where all of them are text."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key)
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts):
        raise RowError("a turn holds something other than text")
    return "".join(_text({key: text}, key) for text in texts)


def _text(values: Mapping[str, Any], key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise RowError(f"{key} is {'missing' if text is None else 'not text'}")
    if not text.strip():
        raise RowError(f"{key} is empty")
    return _valid(text)


def _valid(text: str) -> str:
    """JSON can spell lone surrogates, which are no characters and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("text holds a lone surrogate") from None
    return text
