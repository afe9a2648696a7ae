"""The demo around its federation: the folder, the JSON object, the table, the picture, and what says NOT PRIVATE."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_local import demo, report
from foedus_local.cli import app
from foedus_local.demo import MARKER, Result, demo_folder, run_demo
from foedus_local.plan import Plan, plan_invented
from foedus_protocols.errors import FoedusError, RoundFailed, StateError, UsageError
from rich.console import Console
from typer.testing import CliRunner

PROMISED_KEYS = [
    "domain", "orgs", "rounds", "loss_before", "loss_after", "epsilon", "delta", "unit", "bytes_up", "bytes_down",
    "seconds", "variant",
]  # fmt: skip


class Stage:
    """Stands in for the federation: notes what it was asked, and ends its run at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, detail: dict[str, Any]) -> None:
        self.detail = detail
        self.budgets: list[Any] = []
        self.stopped = 0
        self.trouble: Exception | None = None
        self.coordinator_home = Path("coordinator")
        monkeypatch.setattr(demo, "LocalFederation", lambda *arguments: self)
        monkeypatch.setattr(demo, "watch", lambda home, run, check: self.detail)

    def create(self, budget: Any, say: Callable[[str], None]) -> None:
        self.budgets.append(budget)
        if self.trouble is not None:
            raise self.trouble

    def start_run(self, charter: dict[str, Any]) -> str:
        return "demo-1"

    def check(self) -> None:
        """Nothing has ended by itself."""

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def plan(tmp_path: Path, make_terms: Any) -> Plan:
    return plan_invented(tmp_path / "data", "medical", make_terms())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_detail: Any) -> Stage:
    """A federation whose run left a variant."""
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "README.md").write_text("# a card\n")
    return Stage(monkeypatch, make_detail(variant=str(tmp_path / "written")))


# --- The run ---------------------------------------------------------------------------------------------------------


def test_the_result_is_the_promised_object_and_a_copy_of_the_variant(stage: Stage, plan: Plan, tmp_path: Path) -> None:
    result = run_demo(plan, tmp_path / "demo", tmp_path)
    assert list(result.summary()) == PROMISED_KEYS
    said = json.loads(json.dumps(result.summary()))
    assert (said["domain"], said["orgs"], said["rounds"], said["unit"]) == ("medical", 3, 2, "patient")
    assert (said["loss_before"], said["loss_after"], said["epsilon"], said["delta"]) == (6.0, 5.4, 7.998, 1e-5)
    assert said["variant"] == str(tmp_path / "demo" / "variant")
    assert (tmp_path / "demo" / "variant" / "README.md").exists()
    assert stage.stopped == 1


@pytest.mark.parametrize("private", [True, False])
def test_policies_grant_what_the_terms_ask_and_no_more(
    private: bool, stage: Stage, tmp_path: Path, make_terms: Any
) -> None:
    plan = plan_invented(tmp_path / "data", "medical", make_terms(private=private, epsilon=4.0))
    run_demo(plan, tmp_path / "demo", tmp_path)
    (budget,) = stage.budgets
    assert (budget.epsilon_cap, budget.delta, budget.allow_unprotected) == (4.0, 1e-5, not private)


def test_a_run_without_a_variant_is_an_error_that_says_why(stage: Stage, plan: Plan, tmp_path: Path) -> None:
    stage.detail |= {"variant": None, "outcome": "refused", "reason": "a refused at check 10"}
    with pytest.raises(RoundFailed, match=r"refused \(a refused at check 10\); see .*logs"):
        run_demo(plan, tmp_path / "demo", tmp_path)
    assert stage.stopped == 1


def test_processes_are_stopped_whatever_happens(stage: Stage, plan: Plan, tmp_path: Path) -> None:
    stage.trouble = FoedusError("birch ended with exit code 1")
    with pytest.raises(FoedusError, match="birch"):
        run_demo(plan, tmp_path / "demo", tmp_path)
    assert stage.stopped == 1


# --- The folder ------------------------------------------------------------------------------------------------------


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    for number in range(2):
        with demo_folder(tmp_path / "demo") as place:
            assert [path.name for path in place.iterdir()] == [MARKER]
            (place / f"left-{number}").touch()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StateError, match="--folder"), demo_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_running_demo_is_left_alone(tmp_path: Path) -> None:
    with demo_folder(tmp_path / "demo") as place:
        (place / "work").touch()
        with pytest.raises(StateError, match=f"process {os.getpid()}"), demo_folder(place):
            pass
        assert (place / "work").exists()


# --- What is shown ---------------------------------------------------------------------------------------------------


class EmptyHome:
    """A coordinator's home in which every file is empty."""

    def __init__(self, path: Path) -> None:
        self.files = self

    def read(self, digest: str) -> bytes:
        return b""


def shown(result: Result) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.show(result, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_table_has_loss_epsilon_bytes_and_seconds_by_phase(plan: Plan, make_detail: Any, tmp_path: Path) -> None:
    text = shown(Result(plan=plan, detail=make_detail(), seconds=61.2, variant=tmp_path))
    for expected in (
        "6.0000", "5.4000", "10.0% lower", "7.998 of 8 at delta 1e-05, for one patient", "123,456", "654,321",
        "seconds a round: train", "2.00 (median)", "rounds.png", "noised vector", "evaluation = plain",
    ):  # fmt: skip
        assert expected in text
    assert "NOT PRIVATE" not in text


def test_without_privacy_the_table_says_so(tmp_path: Path, make_terms: Any, make_detail: Any) -> None:
    plan = plan_invented(tmp_path / "data", "medical", make_terms(private=False))
    text = shown(Result(plan=plan, detail=make_detail(epsilon=None), seconds=1.0, variant=tmp_path))
    assert "NOT PRIVATE" in text
    assert "no noise was added" in text


@pytest.mark.parametrize("private", [True, False])
def test_the_picture_is_a_png(
    private: bool, tmp_path: Path, make_terms: Any, make_detail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "Home", EmptyHome)
    monkeypatch.setattr(demo.Charter, "parse", lambda data: None)
    monkeypatch.setattr(report, "epsilon_after", lambda charter, rounds: 4.0 * rounds)
    plan = plan_invented(tmp_path / "data", "medical", make_terms(private=private))
    report.draw(Result(plan=plan, detail=make_detail(), seconds=1.0, variant=tmp_path), tmp_path, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``foedus demo`` in an empty folder, on the stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw", lambda result, home, path: path.write_bytes(b"\x89PNG"))
    return lambda *options: CliRunner().invoke(app, [*options])


def test_json_is_one_object_on_the_last_line(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("--rounds", "2", "--format", "json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout.splitlines()[-1])) == PROMISED_KEYS
    assert "auto_sign = true" in done.stderr
    assert (tmp_path / "foedus-demo" / "variant" / "rounds.png").exists()


def test_no_privacy_is_said_before_anything_leaves_and_in_the_folders_name(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    done = command("--no-privacy", "--format", "json")
    assert done.exit_code == 0, done.output
    assert "NOT PRIVATE: clipped gradient sums leave without noise" in done.stderr
    assert (tmp_path / "foedus-demo-NOT-PRIVATE" / "variant").is_dir()


def test_domain_and_data_exclude_each_other(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("--domain", "legal", "--data", str(tmp_path))
    assert isinstance(done.exception, UsageError)
