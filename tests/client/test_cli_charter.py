"""A person approves a charter: what stands against it is said at once, by its exit code, and nothing changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from foedus_client import policy
from foedus_client.config import ClientConfig, Home
from foedus_client.ledger import Ledger
from foedus_client.membership import update_rosters
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace
from foedus_client.state import ClientState
from foedus_model.presets import TINY
from foedus_protocols.charter import Charter, charter_events
from foedus_protocols.cli import main
from foedus_protocols.identity import key_fingerprint, save_key
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.roster import SignedRoster
from foedus_protocols.store import FileStore

US = "ash"


class Desk:
    """The home of an organisation whose daemon has been offered a charter of epsilon 8, and the person there."""

    def __init__(self, folder: Path, league: Any) -> None:
        league.now, league.base, league.config = int(time.time()), read_manifest(TINY).digest, read_config(TINY)
        self.home = Home(folder)
        self.home.make()
        save_key(self.home.signing_key, league.keys[US])
        self.home.save(
            ClientConfig(
                org=US, enrolment="127.0.0.1:1", ca_fingerprint="0" * 64, federation=league.name,
                operator_key=league.operator_key, link="127.0.0.1:2",
            )
        )  # fmt: skip
        policy.write_template(self.home.policy)
        policy.add_coordinator(self.home.policy, league.operator_key)
        policy.add_base(self.home.policy, BaseEntry(digest=league.base, path=str(TINY)))
        for org in ("birch", "cedar"):
            policy.confirm_peer(self.home.policy, org, key_fingerprint(league.public(org)))
        entry = DatasetEntry(name="d", purposes=["research"], namespace="people", files=["/d.jsonl"], units="patient")
        terms = Namespace(unit="patient", units_at_most=64, epsilon_cap=8.0, delta=1e-5)
        policy.add_dataset(self.home.policy, entry, terms)
        self.charter: Charter = league.draft()
        files = FileStore(self.home.files)
        for content in (self.charter, *league.rosters):
            files.put_bytes(content.canonical())
        self.state = ClientState(self.home.state)
        newest = SignedRoster.make(league.operator, league.rosters[-1])
        update_rosters(
            newest.roster.digest, newest.signature, us=self.home.membership(), state=self.state,
            pull=lambda digest, _most: files.path(digest),
        )  # fmt: skip
        self.state.note_offer(
            digest=self.charter.digest, run="r-1", name="first", purpose="research",
            operator_signature=league.signature(self.charter),
        )  # fmt: skip

    def change(self, before: str, after: str) -> None:
        """Change the policy, as a person would."""
        head, found, tail = self.home.policy.read_text().rpartition(before)  # The last: comments come first.
        assert found
        self.home.policy.write_text(head + after + tail)

    def approve(self) -> int:
        with pytest.raises(SystemExit) as left:
            main(["client", "charter", "approve", self.charter.digest[:12], "--home", str(self.home.root)])
        assert isinstance(left.value.code, int)
        return left.value.code

    def stands(self) -> str:
        return str(self.state.charter(self.charter.digest).state)


@pytest.fixture
def desk(tmp_path: Path, league: Any) -> Desk:
    return Desk(tmp_path / "home", league)


def test_a_charter_within_the_policy_is_approved(desk: Desk) -> None:
    assert desk.approve() == 0
    assert desk.stands() == "approved"


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        pytest.param("max_tokens = 1024", "max_tokens = 64", 5, "error: check 9:", id="longer records than allowed"),
        pytest.param("max_rounds = 1000", "max_rounds = 3", 5, "error: check 9:", id="more rounds than allowed"),
        pytest.param("minimum_members = 2", "minimum_members = 3", 5, "error: check 6:", id="too few members"),
        pytest.param("epsilon_cap = 8.0", "epsilon_cap = 7.5", 6, "error: check 10:", id="a cap that is too low"),
    ],
)
@pytest.mark.parametrize("stands", ["offered", "refused"])
def test_a_charter_that_asks_for_more_is_refused_by_its_exit_code(
    stands: str, before: str, after: str, code: int, said: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the daemon has refused it by itself, or the policy was changed while it waited."""
    desk.change(before, after)
    if stands == "refused":
        desk.state.mark_refused(desk.charter.digest, step=9, reason="check 9: too much")
    assert desk.approve() == code
    assert said in capsys.readouterr().err
    assert desk.stands() == stands
    assert Ledger(desk.home.ledger).admission(desk.charter.digest) is None


def test_a_budget_that_was_given_to_another_charter_is_gone(
    desk: Desk, league: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = league.draft(name="second")
    mine = other.participant(US)
    ledger = Ledger(desk.home.ledger)
    ledger.open_namespace("people", unit="patient")
    ledger.admit(
        "people", other.digest, charter_events(other, mine), 1e-5, 8.5, expires=other.expires, sign=lambda: "s"
    )
    assert desk.approve() == 6
    assert "raise epsilon_cap" in capsys.readouterr().err
    assert desk.stands() == "offered"
