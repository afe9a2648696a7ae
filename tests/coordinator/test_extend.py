"""`run extend`: new terms from an ended run, and the run that goes on from it, with the organisations' own replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_coordinator.chain import Chain, first_charter
from foedus_coordinator.cli import app
from foedus_coordinator.rounds import execute
from foedus_coordinator.variant import epsilon_after
from foedus_protocols.charter import Charter
from foedus_protocols.errors import ConfigError, StateError, VerificationError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.messages import History
from typer.testing import CliRunner

PRIVATE = {
    "privacy": {"mode": "local", "epsilon": 8.0, "rounds": 2, "l2_clip_norm": 1.0},
    "recipe": {"optimiser": {"name": "adam", "beta1": 0.9}},
    "seed": None,
}


def extend(federation: Any, run: str, rounds: int = 1, *more: str) -> dict[str, Any]:
    """The command; afterwards the federation plays the new run."""
    arguments = ["run", "extend", run, "--rounds", str(rounds), *more, "--home", str(federation.root)]
    result = CliRunner().invoke(app, [*arguments, "--format", "json"])
    if result.exception is not None:
        raise result.exception
    value: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    federation.run_id = value["run"]
    for org in federation.orgs.values():
        org.begin_anew()
    return value


def play(federation: Any, pump: Any) -> Any:
    """Execute the federation's run to its end."""
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert (row.state, row.outcome) == ("finished", "complete"), row.reason
    return row


def charter_of(federation: Any, run: str) -> Charter:
    row = federation.home.storage.run(run)
    return Charter.parse(federation.home.files.path(row.charter_digest).read_bytes())


def before_round_1(federation: Any, charter: Charter) -> Chain:
    base_config = federation.home.storage.run(federation.run_id).base_config
    return Chain(charter, run=federation.run_id, files=federation.home.files, base_config=base_config)


@pytest.fixture
def ended(federation: Any, pump: Any) -> Any:
    """A federation whose private run of two rounds is complete."""
    federation.start_run(**PRIVATE)
    play(federation, pump)
    return federation


def test_an_extension_goes_on_from_adapter_and_state_and_counts_what_is_spent(ended: Any, pump: Any) -> None:
    first_run = ended.run_id
    old, rounds = charter_of(ended, first_run), ended.home.storage.rounds(first_run)
    offered = extend(ended, first_run, 2)
    new = charter_of(ended, offered["run"])
    assert new.extends is not None
    assert (new.extends.run, new.extends.charter, new.extends.rounds_spent) == (first_run, old.digest, 2)
    assert new.extends.adapter == new.adapter.initial_digest == rounds[-1].adapter_digest
    assert (new.participants, new.privacy.rounds, new.recipe) == (old.participants, 2, old.recipe)
    assert ended.home.storage.run(offered["run"]).extends == first_run
    # RDP reads more than PLD, and four rounds more than the two that were promised at 8.
    for one in offered["participants"]:
        assert old.privacy.epsilon < one["epsilon_pld"] < one["epsilon_rdp"] <= offered["epsilon"]
    row = play(ended, pump)

    closed = ended.home.storage.rounds(ended.run_id)
    assert [one.state for one in closed] == ["closed", "closed"]
    assert closed[0].start_digest == rounds[-1].adapter_digest
    # Every organisation came to these adapters by replaying both runs the plain way, moments included.
    for org in ended.orgs.values():
        assert org.adapters[-1] == closed[-1].adapter_digest
    assert before_round_1(ended, new)._state.step == 2
    manifest = json.loads((Path(row.variant) / "manifest.json").read_text())["manifest"]
    assert manifest["privacy"]["epsilon"] == pytest.approx(offered["epsilon"], abs=3e-4)
    assert manifest["extends"]["run"] == first_run
    assert f"goes on from run `{first_run}`" in (Path(row.variant) / "README.md").read_text()


def test_a_chain_of_extensions(ended: Any, pump: Any) -> None:
    first_run = ended.run_id
    second = extend(ended, first_run)
    play(ended, pump)
    third = extend(ended, second["run"])
    charter = charter_of(ended, third["run"])
    assert charter.extends is not None
    assert (charter.extends.run, charter.extends.rounds_spent) == (second["run"], 3)
    assert third["epsilon"] > second["epsilon"]
    assert first_charter(charter, ended.home.files) == charter_of(ended, first_run)
    play(ended, pump)
    assert before_round_1(ended, charter)._state.step == 3
    with pytest.raises(VerificationError, match="began a chain"):
        epsilon_after(charter, 1)


def test_an_extension_starts_in_a_coordinator_that_was_killed(
    ended: Any, pump: Any, make_federation: Callable[[], Any]
) -> None:
    """Nothing is needed but the files: a chain built by a fresh process starts at the same adapter."""
    offered = extend(ended, ended.run_id)
    again = ended.run()
    assert again.chain().digest == charter_of(ended, offered["run"]).adapter.initial_digest
    # A sum that is not the one that was announced is found before anything is offered.
    history = History.decode(ended.home.files.path(again.charter.extends.history).read_bytes())
    path = ended.home.files.path(history.rounds[0].sum_digest)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(StateError, match="restore the coordinator's files"):
        again.chain()


def test_mode_none_repeats_no_draw_and_needs_no_accountant(federation: Any, pump: Any) -> None:
    federation.start_run()
    play(federation, pump)
    offered = extend(federation, federation.run_id)
    assert (offered["private"], offered["epsilon"], offered["participants"]) == (False, None, [])
    charter = charter_of(federation, offered["run"])
    old = charter_of(federation, charter.extends.run)
    assert charter.coding_key(offered["run"], 1) == old.coding_key("", 3)
    play(federation, pump)


def test_only_an_ended_run_that_was_not_extended_yet_is_extended(ended: Any, pump: Any) -> None:
    first_run = ended.run_id
    ended.start_run(**PRIVATE, name="other")
    with pytest.raises(StateError, match=f"run stop {ended.run_id}"):
        extend(ended, ended.run_id)
    ended.home.storage.update_run(ended.run_id, state="finished", outcome="refused", reason="beta refused")
    with pytest.raises(StateError, match="start a run of its own"):
        extend(ended, ended.run_id)
    ended.home.storage.update_run(ended.run_id, outcome="stopped")
    with pytest.raises(StateError, match="with a closed round"):
        extend(ended, ended.run_id)
    offered = extend(ended, first_run)
    with pytest.raises(StateError, match=f"goes on as {offered['run']}"):
        extend(ended, first_run, 2)
    # An extension that was refused leaves the way open for another.
    ended.home.storage.update_run(offered["run"], state="finished", outcome="refused")
    again = extend(ended, first_run, 2)
    assert again["rounds_spent"] == offered["rounds_spent"] == 2


def test_rounds_of_an_extension_that_failed_count_as_spent(ended: Any) -> None:
    first_run = ended.run_id
    offered, storage = extend(ended, first_run), ended.home.storage
    digest = storage.run(first_run).charter_digest
    storage.add_round(offered["run"], 1, deadline=0.0, start_digest=digest, history_digest=digest)
    storage.update_round(offered["run"], 1, state="failed", reason="no vector from gamma")
    storage.update_run(offered["run"], state="finished", outcome="failed")
    again = extend(ended, first_run)
    assert again["rounds_spent"] == 3
    assert again["epsilon"] > offered["epsilon"]


def test_every_participant_must_still_be_there_under_its_key(ended: Any) -> None:
    roster = ended.home.members.roster()
    for changed, text in (
        (roster.remove("beta"), "is not"),
        (roster.remove("beta").add("beta", public_hex(generate_signing_key()), since=1), "another key"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("foedus_coordinator.members.Members.roster", lambda self, changed=changed: changed)
            with pytest.raises(ConfigError, match=f"'beta'.*{text}"):
                extend(ended, ended.run_id)


def test_failed_rounds_count_as_spent(federation: Any, pump: Any) -> None:
    """A round that failed has made organisations spend, also where it left no trace in the history."""
    federation.start_run(**PRIVATE)
    play(federation, pump)
    storage = federation.home.storage
    storage.update_round(federation.run_id, 2, state="failed", reason="no vector from gamma")
    offered = extend(federation, federation.run_id)
    charter = charter_of(federation, offered["run"])
    assert charter.extends.rounds_spent == 2
    assert charter.extends.adapter == storage.round(charter.extends.run, 1).adapter_digest
