"""`foedus client privacy ledger`: what a person sees of the ledger, copies of it, and states in its place."""

from __future__ import annotations

import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from foedus_client import policy
from foedus_client.config import Home
from foedus_client.ledger import Ledger
from foedus_client.policy import DatasetEntry, Namespace
from foedus_client.receipts import open_ledger, remember_heads
from foedus_client.state import ClientState
from foedus_client.unexplained import Unexplained, note, unexplained
from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import digest
from foedus_protocols.cli import main
from foedus_protocols.errors import StateError

ONE = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=1)
ALL = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=4)
CHARTER = "a" * 64


class Desk:
    """A home with two namespaces; one charter of patients is signed and has spent one round of four."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.home = Home(folder)
        self.home.make()
        policy.write_template(self.home.policy)
        for namespace, unit in (("patients", "patient"), ("matters", "matter")):
            entry = DatasetEntry(
                name=namespace,
                purposes=[f"study of {namespace}"],
                namespace=namespace,
                files=[f"/{namespace}.jsonl"],
                units=unit,
            )
            terms = Namespace(unit=unit, units_at_most=64, epsilon_cap=8.0, delta=1e-5)
            policy.add_dataset(self.home.policy, entry, terms)
        with ClientState(self.home.state) as state:
            ledger = open_ledger(self.home.ledger, state)
            ledger.open_namespace("patients", unit="patient")
            details = {"name": "first", "rounds": 4}
            ledger.admit(
                "patients", CHARTER, [ALL], 1e-5, 8.0, expires=2_000_000_000, sign=lambda: "s", details=details
            )
            ledger.reserve("patients", CHARTER, "first-aa", 1, ONE, "f" * 64)
            remember_heads(ledger, state)
            state.note_offer(
                digest=CHARTER, run="first-aa", name="first", purpose="study of patients", operator_signature="b" * 128
            )
            state.mark_signed(CHARTER, "s")

    def run(self, command: str, *arguments: str, code: int = 0) -> Any:
        """A ledger command: its result, or what its refusal says."""
        where = ["--home", str(self.home.root), "--format", "json"]
        with pytest.raises(SystemExit) as left:
            main(["client", "privacy", "ledger", command, *arguments, *where])
        said = self.capsys.readouterr()
        assert left.value.code == code, said.err
        return json.loads(said.out.splitlines()[-1]) if code == 0 else said.err

    def lose(self) -> None:
        """The ledger's file is gone."""
        for trace in self.home.root.glob("ledger.db*"):
            trace.unlink()

    def miss(self, run: str, purpose: str | None) -> None:
        """The daemon could not explain a run."""
        with ClientState(self.home.state) as state:
            note(state, Unexplained(run=run, charter="c" * 64, purpose=purpose, rounds=3, event=ONE, since=1.0))

    def unexplained(self) -> list[str]:
        with ClientState(self.home.state) as state:
            return [one.run for one in unexplained(state)]

    def ledger(self) -> Ledger:
        with ClientState(self.home.state) as state:
            return open_ledger(self.home.ledger, state)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(accounting, "epsilon", lambda events, delta: 1.5)
    monkeypatch.setattr(accounting, "filter_order", lambda events, *, epsilon_cap, delta: 8.0)
    return Desk(tmp_path / "home", capsys)


def test_show_tells_budgets_charters_and_what_is_unexplained(desk: Desk) -> None:
    desk.miss("lost-bb", "study of matters")
    found = desk.run("show")
    (patients,) = found["namespaces"]
    assert (patients["namespace"], patients["unit"]) == ("patients", "patient")
    assert (patients["epsilon_spent"], patients["epsilon_cap"], patients["delta"]) == (1.5, 8.0, 1e-5)
    (charter,) = patients["charters"]
    keys = ("name", "run", "allotted_steps", "spent_steps", "reservations", "committed", "restored", "open")
    assert [charter[key] for key in keys] == ["first", "first-aa", 4, 1, 1, 0, 0, True]
    assert [one["run"] for one in found["unexplained"]] == ["lost-bb"]
    with pytest.raises(SystemExit):
        main(["client", "privacy", "ledger", "show", "--home", str(desk.home.root)])
    text = desk.capsys.readouterr().out
    assert "patients (unit patient): epsilon 1.5 of 8 spent at delta 1e-05" in text
    assert "UNEXPLAINED: lost-bb (purpose study of matters, at least 3 rounds of 2:0.25)" in text


def test_looking_makes_no_ledger(desk: Desk) -> None:
    desk.lose()
    for command in ("show", "verify"):
        assert "no such file" in desk.run(command, code=12)
    assert "no such file" in desk.run("export", str(desk.home.root / "out.jsonl"), code=12)
    assert "no such file" in desk.run("backup", str(desk.home.root / "out.db"), code=12)
    assert not list(desk.home.root.glob("ledger.db*"))
    assert not list(desk.home.root.glob("out*"))


def test_verify_accepts_a_ledger_and_its_backup_and_names_a_changed_entry(desk: Desk, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    heads = desk.run("backup", str(copy))["heads"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    for found in (desk.run("verify"), desk.run("verify", str(copy))):
        assert found["namespaces"] == {"patients": {"entries": 3, "head": heads["patients"]}}
        assert found["format"] == 2
    connection = sqlite3.connect(copy)
    connection.execute("DROP TRIGGER entries_are_not_changed")
    connection.execute("UPDATE entries SET charter = NULL WHERE sequence = 2")
    connection.commit()
    connection.close()
    assert f"changed entry 2 of namespace 'patients' in {copy}" in desk.run("verify", str(copy), code=7)
    assert "there is one" in desk.run("backup", str(copy), code=12)


def test_export_writes_a_private_file_of_canonical_lines_once(desk: Desk, tmp_path: Path) -> None:
    target = tmp_path / "ledger.jsonl"
    found = desk.run("export", str(target))
    lines = target.read_bytes().splitlines()
    assert (found["entries"], found["digest"]) == (3, digest(target.read_bytes()))
    assert [json.loads(line)["kind"] for line in lines] == ["open", "allot", "reserve"]
    assert json.loads(lines[2])["previous"] == digest(lines[1])
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert "there is one" in desk.run("export", str(target), code=12)


def test_a_statement_covers_the_unexplained_runs_of_its_namespace(desk: Desk) -> None:
    desk.miss("lost-bb", "study of matters")
    desk.miss("lost-cc", "study of patients")
    desk.miss("lost-dd", None)
    found = desk.run("state", "--namespace", "matters", "--event", "2:0.25:3", "--event", "2:0.25:4")
    assert (found["runs"], found["unexplained"]) == (["lost-bb"], ["lost-cc", "lost-dd"])
    assert desk.ledger().spent("matters") == (Event(noise_multiplier=2.0, sampling_prob=0.25, steps=7),)
    found = desk.run("state", "--namespace", "patients", "--nothing", "--run", "lost-cc", "--run", "lost-dd")
    assert (found["runs"], desk.unexplained()) == (["lost-cc", "lost-dd"], [])
    stated = desk.run("show")["namespaces"]
    assert [one["stated"][0]["runs"] for one in stated] == [["lost-bb"], ["lost-cc", "lost-dd"]]


def test_a_lost_ledger_is_made_anew_by_a_statement_and_by_nothing_else(desk: Desk) -> None:
    desk.lose()
    with pytest.raises(StateError, match="it is gone"):
        desk.ledger()
    assert desk.unexplained() == ["first-aa"]
    found = desk.run("state", "--namespace", "patients", "--event", "2:0.25:1")
    assert (found["runs"], found["unexplained"]) == (["first-aa"], [])
    assert desk.ledger().spent("patients") == (ONE,)
    desk.lose()  # And the new one is remembered, too.
    with pytest.raises(StateError, match="it is gone"):
        desk.ledger()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--namespace", "patients"], 2, "expected --event"),
        (["--namespace", "patients", "--nothing", "--event", "2:0.5:1"], 2, "expected --event"),
        (["--namespace", "patients", "--event", "2:0.5"], 2, "NOISE:PROB:STEPS"),
        (["--namespace", "patients", "--event", "2:1.5:1"], 3, "sampling probability"),
        (["--namespace", "patients", "--nothing", "--unit", "record"], 2, "policy's unit 'patient'"),
        (["--namespace", "visits", "--nothing"], 12, "register its data"),
    ],
)
def test_a_statement_that_cannot_be_meant_writes_nothing(
    desk: Desk, arguments: list[str], code: int, said: str
) -> None:
    before = desk.ledger().export()
    assert said in desk.run("state", *arguments, code=code)
    assert desk.ledger().export() == before
