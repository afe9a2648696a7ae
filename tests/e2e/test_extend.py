"""A real federation that goes on with an ended run: same adapter, same moments, and a budget that counts everything."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from foedus_client.ledger import Ledger
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_local.federation import NAMESPACE, LocalFederation
from foedus_local.processes import run_command
from support.ledgers import head

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

_DEADLINE_SECONDS = 420.0
_CAP = 14.0


def finished(federation: LocalFederation, run: str) -> dict[str, Any]:
    """Wait for a run's end and return it."""
    home = Home(federation.coordinator_home)
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while home.storage.run(run).state != "finished":
        federation.check()
        if time.monotonic() > deadline:
            pytest.fail(f"{run} did not finish within {_DEADLINE_SECONDS:.0f} s")
        time.sleep(0.05)
    return views.run_detail(home, home.storage.run(run))


def extend(federation: LocalFederation, run: str, rounds: int) -> dict[str, Any]:
    home = str(federation.coordinator_home)
    return run_command("coordinator", "run", "extend", run, "--rounds", str(rounds), "--home", home)


def steps_spent(federation: LocalFederation, org: str) -> int:
    return sum(event.steps for event in Ledger(federation.home(org) / "ledger.db").spent(NAMESPACE))


def test_a_run_of_two_rounds_is_extended_by_one_and_the_budget_counts_three(make_federation: Any) -> None:
    federation, plan = make_federation(epsilon_cap=_CAP)
    run = federation.start_run(plan.charter())
    before = finished(federation, run)
    assert (before["outcome"], before["rounds_closed"]) == ("complete", 2)

    offered = extend(federation, run, 1)
    assert (offered["extends"], offered["rounds_spent"], offered["rounds"]) == (run, 2, 1)
    after = finished(federation, offered["run"])
    assert (after["outcome"], after["rounds_closed"]) == ("complete", 1), after["reason"]
    assert after["round_list"][0]["survivors"] == sorted(federation.organisations)

    # The first scores of the extension are those of the adapter that the ended run left, on the same held-out units.
    assert [point["after"] for point in after["losses"]] == [0, 1]
    assert after["losses"][0]["tokens"] == before["losses"][-1]["tokens"]
    assert after["losses"][0]["loss"] == pytest.approx(before["losses"][-1]["loss"], rel=1e-6)

    # Three rounds are spent at every organisation, and the variant says what they cost together.
    assert {steps_spent(federation, org) for org in federation.organisations} == {3}
    manifest = json.loads((Path(after["variant"]) / "manifest.json").read_text())["manifest"]
    assert 8.0 < manifest["privacy"]["epsilon"] <= offered["epsilon"] < _CAP
    assert manifest["extends"]["run"] == run

    # Beyond the cap every ledger refuses, by number, and nothing is signed or spent.
    heads = {org: head(Ledger(federation.home(org) / "ledger.db"), NAMESPACE) for org in federation.organisations}
    beyond = finished(federation, extend(federation, offered["run"], 40)["run"])
    assert beyond["outcome"] == "refused"
    assert "check 10" in beyond["reason"]
    assert beyond["round_list"] == []
    assert heads == {org: head(Ledger(federation.home(org) / "ledger.db"), NAMESPACE) for org in heads}
    for org in federation.organisations:
        assert not list((federation.home(org) / "work").glob("position-*"))
