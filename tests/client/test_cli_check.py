"""`foedus client check`: what a charter would cost, from one dry step of a real worker that leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foedus_client.ledger import Ledger
from foedus_protocols.cli import main
from support.desk import Desk


def write(path: Path, units: int) -> Path:
    """A file of so many patients with one question each."""
    rows = [
        {"patient": f"p{number}", "question": f"What is item {number}?", "answer": f"It is the number {number}."}
        for number in range(units)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def desk(tmp_path: Path, league: Any) -> Desk:
    privacy = {"epsilon": 8.0, "delta": 1e-5, "rounds": 2, "target_units": 8}
    file = write(tmp_path / "d.jsonl", 24)
    made = Desk(tmp_path / "home", league, file, privacy=privacy, recipe={"max_tokens": 48})
    made.home.split_key("people")  # As registering the data leaves it.
    return made


def check(desk: Desk, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["client", "check", *options, "--home", str(desk.home.root), "--format", "json"])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    assert isinstance(left.value.code, int)
    return left.value.code, json.loads(lines[-1]) if lines else {}, said.err


def kept(home: Path) -> set[str]:
    """Every file that would tell of a step."""
    return {
        str(path.relative_to(home)) for path in home.rglob("*") if not path.name.endswith((".lock", "-wal", "-shm"))
    }


def test_a_dry_step_is_measured_and_leaves_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(desk.home.ledger).open_namespace("people", unit="patient")
    before, entries = kept(desk.home.root), Ledger(desk.home.ledger).entries("people")
    digest, rounds = desk.charter.digest, desk.charter.privacy.rounds
    code, found, _ = check(desk, capsys, digest[:12])
    assert code == 0
    assert (found["checked"], found["refused_step"]) == (True, None)
    made = found["estimate"]
    seconds = made["seconds"]
    assert min(seconds["load"], seconds["checks"], seconds["train"], seconds["code"], seconds["advance"]) > 0
    once = seconds["load"] + seconds["checks"]
    scored = seconds["evaluate"] * (1 + -(-rounds // desk.charter.evaluation.every)) if seconds["evaluate"] else 0.0
    assert made["run_seconds"] == pytest.approx(once + rounds * made["round_seconds"] + scored, abs=0.05)
    assert made["bytes_up"] >= rounds * desk.charter.coding().packed_bytes
    # What admission would record, and no more than the charter's own figure allows.
    assert 0 < found["epsilon_after"] <= found["epsilon_cap"]
    assert kept(desk.home.root) == before
    assert Ledger(desk.home.ledger).entries("people") == entries
    assert desk.stands() == "offered"
    assert desk.state.departures() == []


def test_the_line_s_speed_adds_to_the_seconds_of_a_file(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "charter.json"
    path.write_bytes(desk.charter.canonical())
    code, found, _ = check(desk, capsys, str(path), "--mbit", "0.01")
    assert code == 0
    assert found["checked"] is False
    made = found["estimate"]
    transfer = (made["bytes_up"] + made["bytes_down"]) * 8 / 0.01e6
    assert made["run_seconds"] > transfer > 60


def test_a_charter_that_does_not_fit_is_refused_before_anything_is_loaded(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.change("epsilon_cap = 8.0", "epsilon_cap = 1.0")
    code, found, said = check(desk, capsys, desk.charter.digest)
    assert code == 6
    assert (found["refused_step"], found["estimate"]) == (10, None)
    assert said.strip().splitlines()[-1].startswith("error: check 10: expected epsilon")
    desk.change("max_rounds = 1000", "max_rounds = 1")
    code, found, _ = check(desk, capsys, desk.charter.digest)
    assert (code, found["refused_step"]) == (5, 9)


def test_tuning_on_private_records_is_refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = check(desk, capsys, desk.charter.digest, "--rate", "0.01")
    assert code == 2
    assert "would spend budget" in said


def test_a_rehearsal_reads_the_proxy_alone(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = write(tmp_path / "proxy.jsonl", 40)
    (tmp_path / "d.jsonl").unlink()  # The organisation's own records are not there to be read.
    before = kept(desk.home.root)
    options = ("--dry-run", str(proxy), "--unit", "patient", "--rate", "0.001", "--rate", "0.02", "--clip", "0.2")
    code, found, _ = check(desk, capsys, desk.charter.digest, *options)
    assert code == 0
    assert found["units"] + found["heldout"] == 40
    assert found["suggested_clip"] == pytest.approx(found["median_norm"] / 4)
    assert {(one["rate"], one["l2_clip_norm"]) for one in found["results"]} == {(0.001, 0.2), (0.02, 0.2)}
    losses = [one["loss_after"] for one in found["results"]]
    assert losses == sorted(losses)
    assert len({one["loss_before"] for one in found["results"]}) == 1
    assert kept(desk.home.root) == before
