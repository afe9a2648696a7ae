"""Rows that carry a label: a question whose answer is one of a few words.

PubMedQA's ``label`` (yes, no, maybe) and the ``role`` of a legal sentence are recognised; ``--label FIELD`` names any
other. The question lists the options, so that every option is asked for alike, and the options are those of all rows
that are read: a model is measured on what it might say, and not told how often each is right.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from foedus_protocols.errors import DataError

from foedus_client.datasets.formats import Chat, Message, RowError
from foedus_client.datasets.harmony import Harmony, Record
from foedus_client.datasets.readers import Rejected, read_rows, stem
from foedus_client.datasets.units import Columns, Units, key_hash, unit_field, unit_key

FIELDS = ("label", "role")
_MOST_OPTIONS = 32
_LONGEST_OPTION = 80


@dataclass(frozen=True, kw_only=True)
class Question:
    """One labelled row.

    Attributes:
        key_hash: Its unit's keyed digest.
        label: The right option.
        text: What is asked, before the options.
    """

    key_hash: str
    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The labelled rows of some files.

    Attributes:
        field: The label's field.
        options: The different labels, sorted.
        asked: The rows, in the order of their units' digests.
    """

    field: str
    options: tuple[str, ...]
    asked: tuple[Question, ...]


def read_questions(
    files: Sequence[Path], *, units: Units, columns: Columns, split_key: bytes, field: str | None = None
) -> list[Questions]:
    """The labelled rows, by the label's field.

    Args:
        files: As `load_dataset` takes them.
        units: Which field is the privacy unit.
        columns: As `load_dataset` takes them: a question's column, its context's, or a text's, by file.
        split_key: The unit namespace's key.
        field: The label's field; `FIELDS` are looked for where it is None.

    Returns:
        Nothing where no row has a label.

    Raises:
        DataError: No row has the field that was named, or its values are too many to be options.
    """
    found: dict[str, list[Question]] = {}
    for path in files:
        unit = unit_field(units, path)
        for row in read_rows(path):
            if isinstance(row, Rejected):
                continue
            named = field or next((one for one in FIELDS if _label(row.values.get(one)) is not None), None)
            text = _question(row.values, columns.get(stem(path), {}))
            label = None if named is None else _label(row.values.get(named))
            if named is None or label is None or text is None:
                continue
            try:
                key = key_hash(split_key, unit_key(row.values, unit))
            except RowError:
                continue
            found.setdefault(named, []).append(Question(key_hash=key, label=label, text=text))
    if field is not None and not found:
        raise DataError(f"expected rows with the label {field} and a question or text, got none: correct --label")
    return [made for name, asked in found.items() if (made := _questions(name, asked, named=field is not None))]


def answers(harmony: Harmony, question: Question, field: str, options: Sequence[str], max_tokens: int) -> list[Record]:
    """One row an option: the same prompt, another answer, in the order of `options`.

    A prompt that is too long loses its start, as in training. An option is never cut: two that begin alike would be
    one, and an answer without its end is likelier than one with it.

    Raises:
        DataError: `max_tokens` has no room for the longest option.
    """
    ask = Message(role="user", content=f"{question.text}\n\nWhich {field} is right: {', '.join(options)}?")

    def encoded(answer: str, most: int) -> Record:
        turns = (ask, Message(role="assistant", content=answer))
        return harmony.chat(Chat(messages=turns), max_tokens=most)[0]

    whole = [encoded(option, sys.maxsize) for option in options]
    endings = [record.tokens[record.loss_mask] for record in whole]  # With the token that ends an answer.
    try:
        unanswered = encoded("", max_tokens - max(map(len, endings)) + 1)
    except RowError as error:
        raise DataError(f"expected --max-tokens with room for every {field}, got {max_tokens}: raise it") from error
    prompt = unanswered.tokens[:-1]
    rows = []
    for ending in endings:
        tokens = np.concatenate([prompt, ending])
        rows.append(Record(tokens=tokens, loss_mask=np.arange(len(tokens)) >= len(prompt)))
    return rows


def _label(value: Any) -> str | None:
    """A field's value as an option: a short text, or a whole number or truth value as JSON writes it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.strip() if isinstance(value, str) else json.dumps(value) if isinstance(value, int) else ""
    return text if 0 < len(text) <= _LONGEST_OPTION else None


def _question(values: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """A question after its context, or a text."""
    asks = "question" in (columns or values)
    names = [columns.get(name, "" if columns else name) for name in (("context", "question") if asks else ("text",))]
    parts = [values.get(name) for name in names]
    texts = [part for part in parts if isinstance(part, str) and part.strip()]
    return "\n\n".join(texts) if texts else None


def _questions(field: str, asked: Sequence[Question], *, named: bool) -> Questions | None:
    """None where a field that nobody named has one value, or so many that it is no label."""
    options = tuple(sorted({question.label for question in asked}))
    if 2 <= len(options) <= _MOST_OPTIONS:
        return Questions(field=field, options=options, asked=tuple(sorted(asked, key=lambda one: one.key_hash)))
    if named:
        raise DataError(f"expected from 2 to {_MOST_OPTIONS} different values of {field}, got {len(options)}: no label")
    return None
