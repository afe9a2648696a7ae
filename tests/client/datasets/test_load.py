"""From files to units: joining, splitting, counting, refusing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets import Dataset, Unit, load_dataset
from foedus_client.datasets import load as load_module
from foedus_protocols.errors import DataError, UsageError
from tokenizers import Tokenizer

Writer = Callable[[str, Iterable[Any]], Path]
Loader = Callable[..., Dataset]


@pytest.fixture
def load(tokenizer_path: Path) -> Loader:
    def call(*files: Path, **changes: Any) -> Dataset:
        settings: dict[str, Any] = {
            "units": "unit",
            "columns": {},
            "tokenizer_path": tokenizer_path,
            "max_tokens": 32,
            "max_records_per_unit": 2,
            "split_key": b"k" * 32,
        }
        return load_dataset(list(files), **(settings | changes))

    return call


def _question(unit: Any, number: int) -> dict[str, Any]:
    return {"unit": unit, "question": f"Number {number}?", "answer": f"It is {number}."}


def _units(dataset: Dataset) -> list[Unit]:
    return [*dataset.train, *dataset.heldout]


def _shape(dataset: Dataset) -> list[tuple[str, list[list[int]]]]:
    return sorted((unit.key_hash, [record.tokens.tolist() for record in unit.records]) for unit in _units(dataset))


def test_a_unit_gathers_its_records_from_all_files(jsonl: Writer, load: Loader) -> None:
    first = jsonl("first", [_question("a", 1), _question("b", 2), _question("a", 3)])
    second = jsonl("second", [_question("b", 4), _question("c", 5)])
    assert sorted(len(unit.records) for unit in _units(load(first, second))) == [1, 2, 2]


def test_texts_are_joined_in_file_order_and_never_across_units(
    jsonl: Writer, load: Loader, tokenizer: Tokenizer
) -> None:
    rows = [{"unit": "ab"[index % 2], "text": f"Sentence {index} of {'ab'[index % 2]}."} for index in range(40)]
    dataset = load(jsonl("cases", rows))
    for unit in _units(dataset):
        learned = [int(token) for record in unit.records for token in record.tokens[record.loss_mask]]
        text = tokenizer.decode(learned)
        name = "a" if " of a." in text else "b"
        assert text == "\n".join(row["text"] for row in rows if row["unit"] == name)
        assert len(unit.records) > 2


def test_a_new_unit_moves_no_other(jsonl: Writer, load: Loader) -> None:
    rows = [_question(f"unit {index}", index) for index in range(60)]
    before, after = load(jsonl("before", rows)), load(jsonl("after", [_question("new", 99), *rows]))
    assert len(before.heldout) not in (0, 60)
    for part in ("train", "heldout"):
        old, new = ({unit.key_hash for unit in getattr(dataset, part)} for dataset in (before, after))
        assert old <= new
    assert len(set(map(str, _shape(after))) - set(map(str, _shape(before)))) == 1


def test_the_order_of_rows_decides_nothing(jsonl: Writer, load: Loader) -> None:
    rows = [_question(f"unit {index}", index) for index in range(20)]
    one, other = load(jsonl("one", rows)), load(jsonl("other", reversed(rows)))
    assert [unit.key_hash for unit in one.train] == [unit.key_hash for unit in other.train]


def test_record_units_split_texts_by_row(jsonl: Writer, load: Loader) -> None:
    path = jsonl("cases", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    assert load(path, units="record").report.units == 2


def test_the_report_counts(jsonl: Writer, load: Loader) -> None:
    rows = [_question("a", 1), {"unit": "a"}, _question("a", 2), _question(None, 3), _question("a", 4)]
    rows.append({"unit": "b", "question": "Why?", "answer": "because " * 100})
    report = load(jsonl("x", rows)).report
    assert report.rows == {"x.jsonl": 6}
    assert [(row.line, row.reason.split(":")[0]) for row in report.rejected] == [
        (2, "no known shape"),
        (4, "the unit field unit is missing"),
    ]
    [cut] = report.truncated
    assert (cut.file, cut.line, cut.kept) == ("x.jsonl", 6, 32)
    assert cut.length > 100
    assert (report.records, report.units, report.largest_unit) == (4, 2, 3)
    assert (report.units_over_cap, report.records_over_cap) == (1, 1)


def test_tokens_are_counted_over_both_halves(jsonl: Writer, load: Loader) -> None:
    dataset = load(jsonl("x", [_question(index, index) for index in range(30)]))
    records = [record for unit in _units(dataset) for record in unit.records]
    assert dataset.report.tokens == sum(len(record.tokens) for record in records)
    assert dataset.report.answer_tokens == sum(int(record.loss_mask.sum()) for record in records)
    assert 0 < dataset.report.answer_tokens < dataset.report.tokens


def test_columns_and_units_by_file(jsonl: Writer, load: Loader) -> None:
    one = jsonl("one", [{"q": "Q", "a": "A", "person": 1}])
    two = jsonl("two", [_question("x", 1)])
    dataset = load(one, two, units={"*": "unit", "one": "person"}, columns={"one": {"question": "q", "answer": "a"}})
    assert dataset.report.units == 2


def test_a_file_without_a_usable_row_is_an_error_that_quotes_nothing(jsonl: Writer, load: Loader) -> None:
    path = jsonl("bad", [{"note": "secret"}, {"note": "secret"}])
    with pytest.raises(DataError, match=r"none of its 2 rows is usable \(line 1: no known shape") as caught:
        load(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="it is empty"):
        load(jsonl("empty", []))


def test_a_file_of_mostly_unusable_rows_is_given_up(
    jsonl: Writer, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "_MOST_REJECTED", 20)
    wrong = [{"unit": "a", "nothing": n} for n in range(30)]
    with pytest.raises(DataError, match=r"more rows are unusable than usable.*line 23"):
        load(jsonl("wrong", [_question("a", 1), *wrong]))
    flawed = [_question("a", n) for n in range(10)]
    assert len(load(jsonl("flawed", [*flawed, *wrong])).report.rejected) == 30


def test_settings_are_checked(jsonl: Writer, load: Loader) -> None:
    path = jsonl("x", [_question("a", 1)])
    with pytest.raises(UsageError, match="got 8 and 2"):
        load(path, max_tokens=8)
    with pytest.raises(UsageError, match="at least one data file"):
        load()
    with pytest.raises(UsageError, match="got y"):
        load(path, units={"y": "unit", "*": "unit"})


def test_nothing_is_written(jsonl: Writer, load: Loader, tmp_path: Path) -> None:
    path = jsonl("x", [_question("a", 1)])
    before = path.read_bytes()
    load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    assert json.loads(before)
