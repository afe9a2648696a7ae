"""Evaluation: losses against the library's, accuracy of a model that knows, and the command."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foedus_client.cli_model import app
from foedus_client.datasets.harmony import Harmony, Record
from foedus_client.datasets.labels import read_questions
from foedus_client.datasets.load import Unit
from foedus_client.evaluate import Material, measure, report, show
from foedus_model.build import load_base
from foedus_model.evaluate import row_losses
from foedus_model.presets import TINY
from foedus_protocols.errors import ConfigError, DataError, UsageError
from rich.console import Console
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def model() -> Any:
    return load_base(TINY)


def _record(length: int, seed: int, *, prompt: int = 3) -> Record:
    tokens = np.random.default_rng(seed).integers(0, 4000, length).astype(np.int32)
    return Record(tokens=tokens, loss_mask=np.arange(length) >= prompt)


def test_losses_are_those_of_single_rows_in_the_library(model: Any) -> None:
    rows = [_record(length, seed) for seed, length in enumerate((9, 30, 5, 17))]
    rows.append(Record(tokens=rows[0].tokens, loss_mask=np.zeros(9, np.bool_)))
    found = row_losses(model, rows, batch_tokens=40)
    for number, row in enumerate(rows[:4]):
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        labels = tokens.masked_fill(torch.from_numpy(~row.loss_mask)[None], -100)
        with torch.no_grad():
            mean = float(model(input_ids=tokens, labels=labels).loss)
        assert found.tokens[number] == len(row.tokens) - 3
        assert found.nats[number] == pytest.approx(mean * found.tokens[number], rel=1e-4)
    assert (found.nats[4], found.tokens[4]) == (0.0, 0)


class _Knowing:
    """A model whose hidden state says which token comes next: the one that `says` names."""

    def __init__(self, says: Callable[[list[int], int], int], vocabulary: int) -> None:
        self.device = torch.device("cpu")
        self._says = says
        self._vocabulary = vocabulary
        self.lm_head = SimpleNamespace(weight=torch.eye(vocabulary))

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.zeros(*input_ids.shape, self._vocabulary)
        for row, tokens in enumerate(input_ids.tolist()):
            for place in range(len(tokens)):
                hidden[row, place, self._says(tokens, place)] = 5.0
        return SimpleNamespace(last_hidden_state=hidden)


def _labelled(path: Path, count: int = 12) -> Path:
    """Two records a unit; a text of the word `odd` or `even` and its parity as the label."""
    words = {"odd": "Odd it is", "even": "Even it is"}
    rows = [
        {"unit": f"u{number // 2}", "text": f"{words[name]}, number {number}.", "role": name}
        for number in range(count)
        for name in (("odd", "even")[number % 3 == 0],)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_that_knows_is_right_and_one_that_always_says_the_same_is_the_majority(
    tmp_path: Path,
) -> None:
    harmony = Harmony.from_file(TINY / "tokenizer.json")
    tokenizer = harmony._tokenizer
    (asked,) = read_questions([_labelled(tmp_path / "a.jsonl")], units="unit", columns={}, split_key=b"k" * 32)
    material = Material()
    material.add_questions("", asked, harmony, options=asked.options, max_tokens=128, most=100)

    def saying(choose: Callable[[str], str]) -> _Knowing:
        """Sure of each next token in the rows whose answer is the chosen one."""

        def says(tokens: list[int], place: int) -> int:
            text = tokenizer.decode(tokens)
            return tokens[min(place + 1, len(tokens) - 1)] if f"final{choose(text)}" in text else 0

        return _Knowing(says, tokenizer.get_vocab_size())

    models = {
        "always even": measure(saying(lambda text: "even"), material),
        "knowing": measure(saying(lambda text: "odd" if "Odd it is" in text else "even"), material),
    }
    result = report(models, material)
    assert result["tasks"]["role"] == {"options": ["even", "odd"], "questions": 12, "majority": 8 / 12}
    accuracy = {name: one["accuracy"]["role"] for name, one in result["models"].items()}
    assert accuracy["knowing"]["likelihood"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert accuracy["always even"]["likelihood"]["value"] == pytest.approx(4 / 12)
    assert result["models"]["knowing"]["loss"] is None
    assert result["units"] == 6


def test_every_unit_is_asked_before_any_is_asked_twice() -> None:
    material = Material()
    units = [Unit(key_hash=name, records=[_record(5, seed) for seed in range(3)]) for name in "abc"]
    material.add_units("g", units, 4)
    assert material.owners == [0, 1, 2, 0]
    assert list(material.units) == [("g", "a"), ("g", "b"), ("g", "c")]
    material.add_units("h", units[:1], 9)
    assert material.of_group("h").tolist() == [False, False, False, True]


def test_nothing_to_measure_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="held-out records or labelled rows to measure, got none"):
        measure(model, Material())


# --- The command ---------------------------------------------------------------------------------------------------


def _run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_command_measures_the_shipped_base(tmp_path: Path) -> None:
    data = _labelled(tmp_path / "a.jsonl")
    result = json.loads(_run("--data", data, "--unit", "unit", "--format", "json").stdout.splitlines()[-1])
    base = result["models"]["base"]
    assert base["loss"]["low"] < base["loss"]["value"] < base["loss"]["high"]
    assert 2.0 < base["loss"]["value"] < 9.0
    assert (result["units"], result["tasks"]["role"]["questions"], result["variant"]) == (6, 12, None)
    again = json.loads(_run("--data", data, "--unit", "unit", "--format", "json").stdout.splitlines()[-1])
    assert again == result
    shown = _run("--data", data).stdout
    assert "always the most frequent one would be right in 66.7%" in " ".join(shown.split())


@pytest.mark.parametrize(("private", "said"), [(False, True), (True, False), (None, False)])
def test_a_variant_without_privacy_is_called_that(model: Any, private: bool | None, said: bool) -> None:
    material = Material()
    material.add_units("a", [Unit(key_hash="u", records=[_record(9, 0)])], 1)
    out = io.StringIO()
    show({**report({"base": measure(model, material)}, material), "private": private}, Console(file=out))
    assert ("NOT PRIVATE" in out.getvalue()) is said


def test_command_refuses_records_that_are_longer_than_the_models_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens up to 2048, the base's longest text, got 2049"):
        _run("--data", _labelled(tmp_path / "a.jsonl"), "--max-tokens", "2049")


def test_options_that_have_no_room_are_refused_where_named_and_else_left_out(tmp_path: Path) -> None:
    given = ("--data", _labelled(tmp_path / "a.jsonl"), "--max-tokens", "16", "--format", "json")
    with pytest.raises(DataError, match="room for every role, got 16"):
        _run(*given, "--label", "role")
    said = _run(*given)
    assert "no question of role is asked: expected --max-tokens with room for every role" in " ".join(
        said.stderr.split()
    )
    assert json.loads(said.stdout.splitlines()[-1])["tasks"] == {}


def test_command_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [_labelled(tmp_path / "a.jsonl"), _labelled(tmp_path / "b" / "a.jsonl")]
    with pytest.raises(UsageError, match="files of different names"):
        _run("--data", files[0], "--data", files[1])
