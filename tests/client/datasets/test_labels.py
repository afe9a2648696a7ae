"""Labelled rows: which are recognised, which options there are, and what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.datasets.harmony import Harmony
from foedus_client.datasets.labels import Question, answers, read_questions
from foedus_client.datasets.units import key_hash
from foedus_protocols.errors import DataError

KEY = b"k" * 32


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_label_of_a_question_and_the_role_of_a_text_are_recognised(tmp_path: Path) -> None:
    medical = _write(
        tmp_path / "medical.jsonl",
        {"id": "1", "question": "Is it?", "context": "Studies.", "long_answer": "It is.", "label": "yes"},
        {"id": "2", "question": "Was it?", "context": "More.", "long_answer": "Never.", "label": "no"},
        {"id": "3", "question": "Without a label?", "long_answer": "Yes."},
    )
    legal = _write(
        tmp_path / "legal.jsonl",
        {"id": "1", "role": "Facts", "text": "A fence was moved."},
        {"id": "2", "role": "Ratio", "text": "It follows."},
    )
    found = {one.field: one for one in read_questions([medical, legal], units="id", columns={}, split_key=KEY)}
    assert found["label"].options == ("no", "yes")
    assert found["role"].options == ("Facts", "Ratio")
    assert {(one.text, one.label) for one in found["label"].asked} == {
        ("Studies.\n\nIs it?", "yes"),
        ("More.\n\nWas it?", "no"),
    }
    hashes = [one.key_hash for one in found["label"].asked]
    assert hashes == sorted(key_hash(KEY, unit) for unit in ("1", "2"))


def test_a_question_is_found_in_the_columns_that_are_named(tmp_path: Path) -> None:
    asked = _write(
        tmp_path / "asked.jsonl",
        {"Q": "Is it?", "CTX": "Studies.", "A": "It is.", "question": "another", "final": "yes"},
        {"Q": "Was it?", "A": "Never.", "final": "no"},
    )
    told = _write(tmp_path / "told.jsonl", {"body": "A fence.", "question": "?", "final": "no"})
    columns = {"asked": {"question": "Q", "context": "CTX", "answer": "A"}, "told": {"text": "body"}}
    (found,) = read_questions([asked, told], units="record", columns=columns, split_key=KEY, field="final")
    assert {(one.text, one.label) for one in found.asked} == {
        ("Studies.\n\nIs it?", "yes"),
        ("Was it?", "no"),
        ("A fence.", "no"),
    }


@pytest.mark.parametrize(("values", "options"), [((1, 0.0, 10), ("0", "1", "10")), ((True, False), ("false", "true"))])
def test_numbers_and_truth_values_are_labels_as_json_writes_them(
    values: tuple[Any, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [{"question": f"Is it so, {number}?", "label": value} for number, value in enumerate(values)]
    asked = _write(tmp_path / "asked.jsonl", *rows)
    (found,) = read_questions([asked], units="record", columns={}, split_key=KEY)
    assert (found.options, len(found.asked)) == (options, len(values))
    fractions = _write(tmp_path / "fractions.jsonl", *(row | {"label": n + 0.5} for n, row in enumerate(rows)))
    assert read_questions([fractions], units="record", columns={}, split_key=KEY) == []


def test_one_value_or_far_too_many_are_no_label_unless_named(tmp_path: Path) -> None:
    one = _write(tmp_path / "one.jsonl", *({"text": "a", "role": "same", "grade": "x"} for _ in range(3)))
    assert read_questions([one], units="record", columns={}, split_key=KEY) == []
    with pytest.raises(DataError, match="from 2 to 32 different values of grade, got 1"):
        read_questions([one], units="record", columns={}, split_key=KEY, field="grade")
    many = _write(tmp_path / "many.jsonl", *({"text": f"a{n}", "role": f"r{n}"} for n in range(33)))
    assert read_questions([many], units="record", columns={}, split_key=KEY) == []
    with pytest.raises(DataError, match="rows with the label colour"):
        read_questions([many], units="record", columns={}, split_key=KEY, field="colour")


def test_chats_have_no_question_of_their_own(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = _write(tmp_path / "chats.jsonl", *({"messages": turns, "label": name} for name in ("x", "y")))
    assert read_questions([chats], units="record", columns={}, split_key=KEY) == []


def test_options_share_their_prompt_to_the_last_token(tokenizer_path: Path) -> None:
    harmony = Harmony.from_file(tokenizer_path)
    options = ("no", "a much longer option", "yes")
    question = Question(key_hash="", label="no", text="word " * 200 + "Is it?")
    rows = answers(harmony, question, "label", options, 128)
    prompts = [row.tokens[~row.loss_mask] for row in rows]
    assert all(np.array_equal(prompt, prompts[0]) for prompt in prompts)
    assert max(len(row.tokens) for row in rows) == 128
    texts = [harmony._tokenizer.decode(list(row.tokens[row.loss_mask])) for row in rows]
    assert texts == list(options)
    assert harmony._tokenizer.decode(list(prompts[0])).endswith("no, a much longer option, yes?assistantfinal")


def test_an_option_is_never_cut(tokenizer_path: Path) -> None:
    """Two that begin alike would be one, of which the first in the alphabet is always taken."""
    harmony = Harmony.from_file(tokenizer_path)
    options = ("the appeal of the first party", "the appeal of the second party", "no")
    question = Question(key_hash="", label="no", text="word " * 200)
    rows = answers(harmony, question, "role", options, 24)
    assert [harmony._tokenizer.decode(list(row.tokens[row.loss_mask])) for row in rows] == list(options)
    assert max(len(row.tokens) for row in rows) == 24
    with pytest.raises(DataError, match="room for every role, got 16: raise it"):
        answers(harmony, question, "role", options, 16)
