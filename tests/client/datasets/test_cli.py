"""`foedus data check` as a person and as a program meet it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets import cli
from foedus_protocols.errors import DataError, UsageError
from typer.testing import CliRunner

Writer = Callable[[str, Iterable[Any]], Path]


def _run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["check", *map(str, arguments)])


@pytest.fixture
def path(jsonl: Writer) -> Path:
    rows = [{"topic": f"t{index // 5}", "question": "Why?", "answer": "because " * 90} for index in range(10)]
    return jsonl("clinic", [*rows, {"topic": "t9"}])


def test_json_is_one_object_on_the_last_line(path: Path) -> None:
    result = json.loads(_run(path, "--unit", "topic", "--format", "json").stdout.splitlines()[-1])
    assert (result["records"], result["units"], result["rows"]) == (10, 2, {"clinic.jsonl": 11})
    assert result["rejected"][0]["line"] == 11
    assert (result["units_over_cap"], result["records_over_cap"]) == (2, 2)
    assert result["max_tokens"] == 256


def test_text_names_lines_and_reasons(path: Path) -> None:
    output = _run(path, "--unit", "clinic=topic", "--max-tokens", "64").stdout
    assert "rejected clinic.jsonl, line 11: no known shape" in output
    assert "truncated clinic.jsonl, line 1: " in output
    assert "tokens to 64" in output


def test_a_missing_unit_is_an_error_where_nobody_can_be_asked(path: Path) -> None:
    result = _run(path)
    assert isinstance(result.exception, UsageError)
    assert "--unit record protects single records" in str(result.exception)


def test_a_person_is_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(cli.typer, "prompt", lambda text, err: "topic")
    assert cli.ask_units([path]) == ["clinic=topic"]


def test_a_file_of_bad_rows_is_an_error(jsonl: Writer) -> None:
    result = _run(jsonl("bad", [{"x": 1}]), "--unit", "record")
    assert isinstance(result.exception, DataError)
    assert result.exception.exit_code == 8
