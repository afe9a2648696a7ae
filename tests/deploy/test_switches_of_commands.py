"""A switch that cannot be: one line, the same in every command that reads it, and nothing is begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from foedus_client import cli_model
from foedus_client.loading import Switches
from foedus_local import demo
from foedus_local.cli import app as local
from foedus_protocols.errors import ConfigError
from typer.testing import CliRunner

COMMANDS: dict[str, tuple[typer.Typer, list[str]]] = {
    "generate": (cli_model.app, ["generate", "--prompt", "hello"]),
    "evaluate": (cli_model.app, ["evaluate", "--data", "held.jsonl"]),
    "demo": (local, ["--compare"]),
}
OF_TRAINING = {"CHECKPOINTING": "yes", "UNITS_A_FORWARD": "65"}
OF_ALL = {
    "DEVICE": "gpu",
    "DTYPE": "float16",
    "THREADS": "many",
    "ATTENTION": "flash",
    "EXPERTS": "quick",
    "STREAMING": "on",
}


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run a command in a folder with held-out text, where no federation may start."""
    rows = [{"question": f"What is {n}?", "answer": f"{n}."} for n in range(4)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_demo", None)

    def run(name: str) -> Result:
        app, arguments = COMMANDS[name]
        return CliRunner().invoke(app, arguments)

    return run


@pytest.mark.parametrize(("switch", "value"), [*OF_ALL.items(), *OF_TRAINING.items()])
def test_every_command_refuses_it_in_the_same_line(
    switch: str, value: str, invoke: Callable[[str], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FOEDUS_{switch}", value)
    with pytest.raises(ConfigError) as of_a_worker:
        Switches.read()
    assert f"FOEDUS_{switch}" in str(of_a_worker.value)
    for name in COMMANDS if switch in OF_ALL else ["demo"]:
        error: Any = invoke(name).exception
        assert (type(error), str(error), error.exit_code) == (ConfigError, str(of_a_worker.value), 3), name
    assert {path.name for path in tmp_path.iterdir()} == {"held.jsonl"}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--layers", "1,9"], "from 0 to 3 for this base, got"), (["--max-tokens", "2049"], "up to 2048")],
)
def test_what_a_base_has_not_is_refused_before_a_demo_is_emptied(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_demo", None)
    (tmp_path / "demo.json").write_text(json.dumps({"process": None}))
    (tmp_path / "kept").write_text("the earlier result")
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(local, [*options, "--folder", str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "kept").exists()
