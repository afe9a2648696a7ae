"""Unit keys, the keyed threshold, and the options that name units and columns."""

from __future__ import annotations

import hashlib
import hmac
import math
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.formats import RowError
from foedus_client.datasets.units import (
    check_names,
    is_held_out,
    key_hash,
    parse_columns,
    parse_units,
    unit_field,
    unit_key,
)
from foedus_protocols.errors import UsageError


@pytest.mark.parametrize(
    ("options", "units"),
    [
        (["topic"], "topic"),
        (["record"], "record"),
        (["topic", "pubmedqa_train=id"], {"*": "topic", "pubmedqa_train": "id"}),
        (["a.jsonl.gz=x", "b=record"], {"a": "x", "b": "record"}),
    ],
)
def test_unit_options(options: list[str], units: Any) -> None:
    assert parse_units(options) == units


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "privacy unit is missing"),
        (["a", "b"], "twice"),
        (["a=x", "a.csv=y"], "twice"),
        (["a="], "expected --unit"),
    ],
)
def test_unit_options_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_units(options)


def test_column_options() -> None:
    assert parse_columns(["a.csv:question=q,context=c,answer=r", "b:text=t"]) == {
        "a": {"question": "q", "context": "c", "answer": "r"},
        "b": {"text": "t"},
    }


@pytest.mark.parametrize(
    "option", ["a", "a:question=q", "a:question=q,answer=", ":text=t", "a:text=t,answer=b", "a:x=y"]
)
def test_column_options_refused(option: str) -> None:
    with pytest.raises(UsageError, match="expected --columns"):
        parse_columns([option])


def test_field_of_a_file() -> None:
    units = {"*": "topic", "b": "id"}
    assert [unit_field(units, Path(f"{name}.jsonl")) for name in "ab"] == ["topic", "id"]
    with pytest.raises(UsageError, match=r"a\.jsonl is missing: add --unit a=FIELD"):
        unit_field({"b": "id"}, Path("a.jsonl"))


def test_a_name_that_fits_no_file_is_refused() -> None:
    check_names([Path("a.jsonl")], {"a": "x", "*": "y"}, {"a": {"text": "t"}})
    with pytest.raises(UsageError, match="got b"):
        check_names([Path("a.jsonl")], {"b": "x", "*": "y"}, {})
    with pytest.raises(UsageError, match="got c"):
        check_names([Path("a.jsonl")], "x", {"c": {"text": "t"}})


@pytest.mark.parametrize(("one", "other"), [(5, "5"), (" 5 ", "5"), ("Zoe\u0308", "Zo\u00eb")])
def test_two_spellings_are_one_unit(one: Any, other: Any) -> None:
    assert unit_key({"id": one}, "id") == unit_key({"id": other}, "id")


@pytest.mark.parametrize("value", [None, "", "  ", 1.5, True, ["a"]])
def test_no_unit_no_row(value: Any) -> None:
    with pytest.raises(RowError, match="the unit field id is"):
        unit_key({"id": value}, "id")


def test_a_record_is_its_content() -> None:
    one = unit_key({"text": "a", "n": 1.5}, "record")
    assert one == unit_key({"n": 1.5, "text": "a"}, "record")
    assert one != unit_key({"text": "a", "n": 2.5}, "record")


def test_the_threshold_is_a_fifth_of_the_range() -> None:
    border = -(-(1 << 256) // 5)  # the smallest digest that is not below 2^256 / 5
    assert is_held_out(f"{border - 1:064x}")
    assert not is_held_out(f"{border:064x}")


def test_the_digest_is_an_hmac_of_the_unit_alone() -> None:
    assert key_hash(b"k" * 32, "Zo\u00eb") == hmac.new(b"k" * 32, "Zo\u00eb".encode(), hashlib.sha256).hexdigest()


def test_a_fifth_is_held_out_and_another_key_holds_out_others() -> None:
    names = [f"unit {index}" for index in range(5000)]
    one, other = ({name for name in names if is_held_out(key_hash(key * 32, name))} for key in (b"a", b"b"))
    # Fixed keys, so this cannot flicker; a right threshold leaves 5 standard deviations for 1 key in 2 million.
    allowed = 5 * math.sqrt(5000 * 0.2 * 0.8)
    assert abs(len(one) - 1000) < allowed
    assert abs(len(one & other) - 200) < 5 * math.sqrt(5000 * 0.04 * 0.96)
