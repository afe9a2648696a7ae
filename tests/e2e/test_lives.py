"""A run of real processes that is paused, outlives a kill of the coordinator, goes on, and is stopped."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_client.ledger import Ledger
from foedus_coordinator.config import Home
from foedus_local.federation import NAMESPACE, LocalFederation
from foedus_local.processes import run_command
from foedus_protocols.errors import FoedusError
from support.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]


def coordinator(federation: LocalFederation, *words: str) -> dict[str, Any]:
    """One of the coordinator's commands, as a process of its own."""
    return run_command("coordinator", *words, "--home", str(federation.coordinator_home))


def test_a_run_is_paused_killed_resumed_and_stopped(make_federation: Any) -> None:
    federation, plan = make_federation(rounds=12)
    storage = Home(federation.coordinator_home).storage
    run = federation.start_run(plan.charter())

    def states() -> list[str]:
        return [one.state for one in storage.rounds(run)]

    wait_for(lambda: len(states()) == 1, "the first round to open")
    assert coordinator(federation, "run", "pause", run)["changed"] is True
    wait_for(lambda: states() == ["closed"], "the open round to finish")
    shown = coordinator(federation, "run", "show", run)
    assert shown["doing"].startswith("paused before round 2")
    assert coordinator(federation, "health")["healthy"] is True

    federation.coordinator.kill()
    with pytest.raises(FoedusError, match="process: not running") as down:
        coordinator(federation, "health")
    assert down.value.exit_code == 12
    federation.coordinator.start()
    wait_for(lambda: federation.coordinator.log.read_text().count("listening") == 2, "the coordinator to come back")
    assert states() == ["closed"]
    assert coordinator(federation, "run", "resume", run)["coordinator_running"] is True
    wait_for(lambda: states()[:2] == ["closed", "closed"], "the second round to close")

    coordinator(federation, "run", "stop", run, "--reason", "the grant ended")
    wait_for(lambda: storage.run(run).state == "finished", "the run to end")
    shown = coordinator(federation, "run", "show", run)
    assert (shown["outcome"], shown["reason"]) == ("stopped", "the grant ended")
    closed = [one for one in shown["round_list"] if one["state"] == "closed"]
    assert shown["released_after"] == len(closed) >= 2
    assert shown["variant"] is not None
    # Whatever was reserved at an organisation is a round that the coordinator offered, and each of them once.
    for org in federation.organisations:
        entries = Ledger(federation.home(org) / "ledger.db").entries(NAMESPACE)
        reserved = [entry.round for entry in entries if entry.kind == "reserve"]
        assert reserved == sorted(set(reserved))
        assert set(reserved) <= {one["round"] for one in shown["round_list"]}
    storage.close()
