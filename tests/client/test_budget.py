"""Check 10 against a real ledger: a charter up to its last round, and two that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from foedus_client.budget import admit_charter, budget_check
from foedus_client.ledger import Ledger
from foedus_protocols import identity
from foedus_protocols.charter import Charter, round_event, verify_charter_signature
from foedus_protocols.charter_checks import Limits, OrgView, UnitNamespace, check_charter
from foedus_protocols.errors import BudgetExhausted, PolicyRefused


@pytest.fixture
def limits(league: Any) -> Limits:
    """A policy whose cap is exactly what the league's charters promise."""
    return Limits(
        coordinators=frozenset({league.operator_key}),
        minimum_members=2,
        peers={org: identity.key_fingerprint(league.public(org)) for org in ("ash", "cedar")},
        namespaces={
            "research": UnitNamespace(name="patients", unit="patient", units_at_most=256, epsilon_cap=8.0, delta=1e-5)
        },
        allow_unprotected=False,
        evaluation=frozenset({"none"}),
        max_tokens=256,
        max_records_per_unit=4,
        max_rounds=100,
        max_rate=0.1,
        max_rank=16,
        min_survivors=2,
    )


@pytest.fixture
def ledger(tmp_path: Path, league: Any) -> Ledger:
    return Ledger(tmp_path / "ledger.db", clock=lambda: float(league.now))


def view(league: Any, limits: Limits, ledger: Ledger, stage: Any) -> OrgView:
    """What birch knows."""
    return OrgView(
        org="birch",
        signing_key=league.public("birch"),
        federation=league.name,
        operator_key=league.operator_key,
        rosters=league.rosters,
        limits=limits,
        base_configs={league.base: league.config},
        budget=budget_check(ledger, limits, stage),
        now=float(league.now),
    )


def check(league: Any, charter: Charter, limits: Limits, ledger: Ledger, stage: Any) -> None:
    agreement = league.agreement(charter) if stage == "round" else None
    offered = (charter.canonical(), charter.digest, league.signature(charter))
    check_charter(*offered, view(league, limits, ledger, stage), stage=stage, agreement=agreement)


def test_a_charter_at_the_cap_is_signed_and_runs_to_its_last_round(league: Any, limits: Limits, ledger: Ledger) -> None:
    charter = league.draft()
    mine = charter.participant("birch")
    ledger.open_namespace("patients", unit="patient")
    with pytest.raises(PolicyRefused, match="allotment") as caught:
        check(league, charter, limits, ledger, "round")
    assert caught.value.step == 10
    check(league, charter, limits, ledger, "sign")
    admitted = admit_charter(ledger, limits, charter, "birch", signing_key=league.keys["birch"])
    verify_charter_signature(league.public("birch"), charter.digest, admitted.signature)
    assert 7.9 < admitted.epsilon <= 8.0
    check(league, charter, limits, ledger, "sign")  # An offer that comes twice is answered twice.
    for number in range(1, charter.privacy.rounds + 1):
        check(league, charter, limits, ledger, "round")
        ledger.reserve("patients", charter.digest, "run", number, round_event(charter, mine), f"{number:064x}")
    with pytest.raises(BudgetExhausted):
        check(league, charter, limits, ledger, "round")


def test_the_second_of_two_charters_that_passed_its_checks_is_not_signed(
    league: Any, limits: Limits, ledger: Ledger
) -> None:
    first, second = league.draft(), league.draft(name="second")
    for charter in (first, second):
        check(league, charter, limits, ledger, "sign")
    admit_charter(ledger, limits, first, "birch", signing_key=league.keys["birch"])
    with pytest.raises(BudgetExhausted):
        admit_charter(ledger, limits, second, "birch", signing_key=league.keys["birch"])
    with pytest.raises(BudgetExhausted):
        check(league, second, limits, ledger, "sign")
    assert ledger.admission(second.digest) is None


def test_a_lower_cap_refuses_at_check_10(league: Any, limits: Limits, ledger: Ledger) -> None:
    tight = {"research": replace(limits.namespaces["research"], epsilon_cap=7.5)}
    with pytest.raises(BudgetExhausted) as caught:
        check(league, league.draft(), replace(limits, namespaces=tight), ledger, "sign")
    assert caught.value.step == 10


def test_the_entry_says_what_was_agreed(league: Any, limits: Limits, ledger: Ledger) -> None:
    charter = league.draft()
    admit_charter(ledger, limits, charter, "birch", signing_key=league.keys["birch"])
    opened, allotted = ledger.entries("patients")
    assert opened.body["unit"] == "patient"
    assert allotted.charter == charter.digest
    assert allotted.body["details"]["l2_clip_norm"] == charter.privacy.l2_clip_norm
    assert allotted.body["delta_slack"] > 0
