"""A real organisation puts an older copy of its ledger back, and later loses it, in the middle of its federation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from foedus_client.ledger import Ledger
from foedus_client.state import ClientState
from foedus_coordinator.config import Home
from foedus_local.federation import NAMESPACE
from foedus_local.processes import run_command
from foedus_protocols.store import FileStore
from support.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]


def test_an_older_ledger_is_made_good_and_a_lost_one_waits_for_a_person(make_federation: Any) -> None:
    federation, plan = make_federation(rounds=4)
    home = Home(federation.coordinator_home)
    *_, victim = federation.organisations
    folder = federation.home(victim)
    daemon = federation.daemons[victim]

    def ledger_command(*arguments: str) -> Any:
        return run_command("client", "privacy", "ledger", *arguments, "--home", str(folder))

    def lose() -> None:
        for trace in folder.glob("ledger.db*"):
            trace.unlink()

    def vectors(number: int) -> set[str]:
        return {one.org for one in home.storage.vectors(run, number)}

    run = federation.start_run(plan.charter() | {"masks": {"min_survivors": 2}})
    wait_for(lambda: victim in vectors(1), "the victim's first vector")
    copy = folder.parent / "copy.db"
    Ledger(folder / "ledger.db").backup(copy)  # Not by the command: rounds go on while a process starts.
    wait_for(lambda: victim in vectors(2), "the victim's second vector")
    daemon.kill()
    lose()
    copy.rename(folder / "ledger.db")
    daemon.start()
    wait_for(lambda: home.storage.run(run).state == "finished", "the run to finish")

    # Everything that the coordinator ever got is in the ledger, and the round that was open was given up.
    assert home.storage.run(run).outcome == "complete"
    entries = [one for one in Ledger(folder / "ledger.db").entries(NAMESPACE) if one.kind == "reserve"]
    words = {one.round: one.body["words"] for one in entries}
    assert len(entries) == len(words) == 4
    assert all(one.body["event"] is not None for one in entries)
    for number in range(1, 5):
        got = {one.org: one.digest for one in home.storage.vectors(run, number)}
        assert words[number] == got.get(victim)
        assert (victim in home.storage.round(run, number).survivors) == (victim in got)
    assert [number for number, one in words.items() if one is None]
    assert "OLDER COPY" in daemon.log.read_text()

    assert ledger_command("verify")["format"] == 2

    # It is lost: the daemon does not make a new one. A person states the four rounds, and it is connected again.
    daemon.stop()
    lose()
    daemon.start()
    wait_for(lambda: daemon.exit_code is not None, "the daemon to refuse")
    assert daemon.exit_code == 12
    assert not (folder / "ledger.db").exists()
    with ClientState(folder / "client.db") as state:
        (record,) = state.charters()
    charter = json.loads(FileStore(folder / "files").path(record.digest).read_text())
    mine = next(one for one in charter["participants"] if one["id"] == victim)
    event = f"{mine['noise_multiplier']}:{mine['sampling_prob']}:4"
    stated = ledger_command("state", "--namespace", NAMESPACE, "--event", event)
    assert (stated["runs"], stated["unexplained"]) == ([run], [])
    assert stated["epsilon_spent"] > 7.9
    seen = daemon.log.read_text().count("connected to")
    daemon.start()
    wait_for(lambda: daemon.log.read_text().count("connected to") > seen, "the daemon to be connected")
    federation.check()
