"""Chats against checked-in vectors, what is learned of them, and how they are shortened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.formats import Chat, Message, RowError, parse_row
from foedus_client.datasets.harmony import Harmony, Record
from foedus_protocols.errors import DataError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "harmony.json").read_text())


def _text(tokenizer: Tokenizer, record: Record, *, learned: bool = False) -> str:
    tokens = record.tokens[record.loss_mask] if learned else record.tokens
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_vectors(harmony: Harmony, tokenizer: Tokenizer, vector: dict[str, Any]) -> None:
    chat = parse_row(vector["row"])
    assert isinstance(chat, Chat)
    record, length = harmony.chat(chat, max_tokens=256)
    assert _text(tokenizer, record) == vector["text"]
    assert _text(tokenizer, record, learned=True) == vector["learned"]
    assert record.tokens.tolist() == vector["tokens"]
    assert "".join(str(int(learned)) for learned in record.loss_mask) == vector["loss"]
    assert length == len(record.tokens)


def test_a_record_cannot_write_control_tokens(harmony: Harmony, tokenizer: Tokenizer) -> None:
    names = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"]
    chat = Chat(messages=(Message(role="user", content=" ".join(names)), Message(role="assistant", content=names[0])))
    record, _ = harmony.chat(chat, max_tokens=512)
    special = {tokenizer.token_to_id(name) for name in names}
    assert sum(int(token) in special for token in record.tokens) == 7  # 2 starts, 2 messages, channel, end, return
    [window] = harmony.windows(names[1], max_tokens=512)
    assert not special & set(window.tokens[1:].tolist())


def _chat(question: str, answer: str) -> Chat:
    return Chat(messages=(Message(role="user", content=question), Message(role="assistant", content=answer)))


def test_a_long_answer_loses_its_end_and_its_terminator(harmony: Harmony, tokenizer: Tokenizer) -> None:
    record, length = harmony.chat(_chat("Why?", "because of this " * 200), max_tokens=64)
    assert len(record.tokens) == 64 < length
    assert "Why?" in _text(tokenizer, record)
    assert "<|return|>" not in _text(tokenizer, record)
    assert _text(tokenizer, record, learned=True).startswith("because of this because")


def test_a_long_context_loses_its_start_and_leaves_half_to_the_answer(harmony: Harmony, tokenizer: Tokenizer) -> None:
    context = "first words " + "and more " * 300
    record, _ = harmony.chat(_chat(f"{context}\n\nWhy?", "because " * 300), max_tokens=128)
    text = _text(tokenizer, record)
    assert "first words" not in text
    assert "Why?<|end|>" in text
    assert len(record.tokens) == 128
    assert record.loss_mask.sum() >= 54


def test_a_short_answer_is_kept_whole(harmony: Harmony, tokenizer: Tokenizer) -> None:
    record, _ = harmony.chat(_chat("and more " * 300, "Yes."), max_tokens=64)
    assert len(record.tokens) == 64
    assert _text(tokenizer, record, learned=True) == "Yes.<|return|>"


def test_older_turns_are_shortened_first(harmony: Harmony, tokenizer: Tokenizer) -> None:
    turns = [
        ("user", "old question " * 30),
        ("assistant", "old answer"),
        ("user", "new question"),
        ("assistant", "new answer"),
    ]
    chat = Chat(messages=tuple(Message(role=role, content=content) for role, content in turns))  # type: ignore[arg-type]
    record, _ = harmony.chat(chat, max_tokens=80)
    text = _text(tokenizer, record)
    assert len(record.tokens) == 80
    assert "old answer<|end|>" in text
    assert text.endswith("new question<|end|><|start|>assistant<|channel|>final<|message|>new answer<|return|>")


def test_turns_that_fill_a_record_are_rejected(harmony: Harmony) -> None:
    messages = (Message(role="user", content="a"), Message(role="assistant", content="b")) * 20
    with pytest.raises(RowError, match="its turns alone fill 64 tokens"):
        harmony.chat(Chat(messages=messages), max_tokens=64)


@given(question=st.text(min_size=1, max_size=300), answer=st.text(min_size=1, max_size=300), room=st.integers(24, 80))
def test_never_too_long_and_always_something_to_learn(question: str, answer: str, room: int) -> None:
    record, length = HARMONY.chat(_chat(question, answer), max_tokens=room)
    assert len(record.tokens) == min(length, room)
    assert record.loss_mask.any()
    assert not record.loss_mask[0]


def test_windows_learn_every_token_once(harmony: Harmony, tokenizer: Tokenizer) -> None:
    text = "The appeal is dismissed with costs. " * 60
    records = harmony.windows(text, max_tokens=32)
    learned = [int(token) for record in records for token in record.tokens[record.loss_mask]]
    assert tokenizer.decode(learned) == text
    end = tokenizer.token_to_id("<|endoftext|>")
    assert {int(record.tokens[0]) for record in records} == {end}
    assert max(len(record.tokens) for record in records) == 32


def test_a_tokenizer_without_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(DataError, match=r"lacks <\|start\|>"):
        Harmony.from_file(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"expected a tokenizer\.json"):
        Harmony.from_file(path)
    with pytest.raises(DataError, match="found none"):
        Harmony.from_file(tmp_path / "nowhere.json")


HARMONY = Harmony.from_file(Path(__file__).parents[3] / "model" / "foedus_model" / "tiny" / "tokenizer.json")
