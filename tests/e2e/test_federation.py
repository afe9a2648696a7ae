"""Whole federations of real processes over real TLS: one runs through, one is killed, some are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foedus_client.ledger import Ledger
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_local.federation import NAMESPACE, LocalFederation
from foedus_local.processes import run_command
from foedus_protocols.accounting import Event
from foedus_protocols.errors import FoedusError
from support.ledgers import head
from support.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]


def finished(federation: LocalFederation, run: str) -> dict[str, Any]:
    """Wait for a run's end and return it."""
    home = Home(federation.coordinator_home)
    wait_for(lambda: home.storage.run(run).state == "finished", f"run {run} to finish")
    return views.run_detail(home, home.storage.run(run))


def reserved_rounds(federation: LocalFederation, org: str) -> list[tuple[int, str]]:
    """(round, digest of the words) of each reservation in an organisation's ledger."""
    entries = Ledger(federation.home(org) / "ledger.db").entries(NAMESPACE)
    return [(entry.round or 0, entry.body["words"]) for entry in entries if entry.kind == "reserve"]


def test_a_killed_daemon_and_a_killed_coordinator_lose_nothing_and_spend_nothing_twice(make_federation: Any) -> None:
    federation, plan = make_federation(expected_units=48)
    home = Home(federation.coordinator_home)
    first, second, victim = federation.organisations
    run = federation.start_run(plan.charter())

    # The victim dies in training: its checks are over, its vector is not there.
    log = federation.daemons[victim].log
    wait_for(lambda: "privacy checks passed" in log.read_text(), "the victim to start training")
    federation.daemons[victim].kill()
    assert reserved_rounds(federation, victim) == []

    # The coordinator dies while collecting: two vectors are acknowledged, the third is missing.
    def acknowledged() -> dict[str, str]:
        return {one.org: one.digest for one in home.storage.vectors(run, 1) if one.verdict == "included"}

    wait_for(lambda: set(acknowledged()) == {first, second}, "two vectors to be acknowledged")
    assert home.storage.round(run, 1).state == "offered"
    federation.coordinator.kill()
    before = acknowledged()

    federation.coordinator.start()
    federation.daemons[victim].start()
    detail = finished(federation, run)

    assert detail["outcome"] == "complete"
    assert [one["survivors"] for one in detail["round_list"]] == [sorted(federation.organisations)] * 2
    for org in federation.organisations:
        rounds = reserved_rounds(federation, org)
        assert [number for number, _ in rounds] == [1, 2], org
        if org in before:
            assert rounds[0][1] == before[org]
    participant = next(one for one in plan.charter()["participants"] if one["id"] == victim)
    sampling_prob = min(1.0, 48 / participant["units_at_most"])
    spent = Ledger(federation.home(victim) / "ledger.db").spent(NAMESPACE)
    assert [(event.steps, event.sampling_prob) for event in spent] == [(2, sampling_prob)]
    assert isinstance(spent[0], Event)


def test_a_run_completes_and_leaves_a_variant_a_spent_budget_and_clean_logs(make_federation: Any) -> None:
    federation, plan = make_federation(log_format="json")
    run = federation.start_run(plan.charter())
    detail = finished(federation, run)
    assert (detail["outcome"], detail["rounds_closed"]) == ("complete", 2)
    assert detail["epsilon"] == pytest.approx(8.0, abs=0.01)
    assert detail["epsilon"] <= 8.0
    assert [point["after"] for point in detail["losses"]] == [0, 1, 2]
    variant = Path(detail["variant"])
    manifest = json.loads((variant / "manifest.json").read_text())["manifest"]
    assert manifest["private"] is True
    assert "noised vector" in (variant / "README.md").read_text()

    # The cap is reached: the same terms again are refused before anything is signed, and nothing changes.
    heads = {org: head(Ledger(federation.home(org) / "ledger.db"), NAMESPACE) for org in federation.organisations}
    again = finished(federation, federation.start_run(plan.charter() | {"name": "again"}))
    assert again["outcome"] == "refused"
    assert "check 10" in again["reason"]
    assert heads == {org: head(Ledger(federation.home(org) / "ledger.db"), NAMESPACE) for org in heads}

    federation.stop()
    secrets = [text for one in plan.organisations for text in _identifiers(one.file)] + _key_material(federation)
    assert len(secrets) > 1000
    logs = [*federation.logs.iterdir(), *federation.folder.rglob("worker.log")]
    assert len(logs) == 1 + 2 * len(federation.organisations)
    for log in logs:
        written = log.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in written], log.name
    for log in federation.logs.iterdir():
        records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        assert records, log.name
        assert any("round 2" in str(record) for record in records), log.name


def test_a_charter_beyond_the_policy_is_refused_by_number_and_leaves_no_trace(make_federation: Any) -> None:
    federation, plan = make_federation(epsilon_cap=2.0)
    detail = finished(federation, federation.start_run(plan.charter()))
    assert detail["outcome"] == "refused"
    assert "check 10" in detail["reason"]
    assert detail["round_list"] == []
    for org in federation.organisations:
        kinds = [entry.kind for entry in Ledger(federation.home(org) / "ledger.db").entries(NAMESPACE)]
        assert "allot" not in kinds

    # A used token opens nothing: the documented exit code, and no second member.
    with pytest.raises(FoedusError, match="token") as refused:
        _join_with_used_token(federation)
    assert refused.value.exit_code == 12


def _join_with_used_token(federation: LocalFederation) -> None:
    home = str(federation.coordinator_home)
    invited = run_command("coordinator", "invite", "latecomer", "--home", home)
    for name in ("one", "two"):
        run_command(
            "client", "join", "--coordinator", invited["coordinator"], "--org", "latecomer",
            "--ca-fingerprint", invited["ca_fingerprint"], "--token-stdin", "--no-wait",
            "--home", str(federation.folder / name), stdin=invited["token"] + "\n",
        )  # fmt: skip


def _identifiers(file: Path) -> list[str]:
    """Unit keys and canary numbers: what must never stand in a log."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted({row["patient"] for row in rows} | {row["answer"] for row in rows})


def _key_material(federation: LocalFederation) -> list[str]:
    """Every line of every private key and split key of the federation."""
    files = [path for path in federation.folder.rglob("keys/*") if path.suffix in (".key", ".pem")]
    lines = [line for path in files for line in path.read_text().splitlines() if "PRIVATE KEY" in path.read_text()]
    splits = [path.read_text().strip() for path in files if path.name.startswith("split-")]
    assert len(splits) == len(federation.organisations)
    return [line for line in lines if line and "-----" not in line] + splits
