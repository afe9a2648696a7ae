"""A run is gone on with once: of two extensions only one is signed, until the first can spend nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.branches import extensions, require_only_extension
from foedus_client.budget import admit_charter, budget_check
from foedus_client.ledger import Ledger
from foedus_client.replay import catch_up, earlier
from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter
from foedus_protocols.charter_checks import Limits, UnitNamespace
from foedus_protocols.charter_extension import require_follows
from foedus_protocols.errors import StateError, VerificationError

ONE = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=1)
OLD, FIRST, SECOND = "a" * 64, "b" * 64, "c" * 64
LATER = 2_000_000_000


class Home:
    """A ledger whose clock the test turns; the accountant has tests of its own."""

    def __init__(self, path: Path) -> None:
        self.now = 1_000.0
        self.ledger = Ledger(path, clock=lambda: self.now)
        for namespace in ("patients", "visitors"):
            self.ledger.open_namespace(namespace, unit="patient")

    def admit(self, charter: str, extends: str | None, *, expires: int = LATER, namespace: str = "patients") -> None:
        self.ledger.admit(
            namespace, charter, [ONE], 1e-5, 20.0, expires=expires, sign=lambda: "signature", extends=extends
        )

    def fits(self, charter: str, extends: str) -> None:
        self.ledger.require_fits("patients", charter, [ONE], 1e-5, 20.0, extends=extends)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("epsilon", "epsilon_rdp"):
        monkeypatch.setattr(accounting, name, lambda *_, **__: 1.0)
    monkeypatch.setattr(accounting, "filter_order", lambda *_, **__: 8.0)
    made = Home(tmp_path / "ledger.db")
    made.admit(OLD, None)
    made.ledger.release_allotment(OLD, why="complete")
    made.admit(FIRST, OLD)
    return made


@pytest.mark.parametrize("namespace", ["patients", "visitors"])
def test_a_second_extension_is_not_signed_beside_the_first(home: Home, namespace: str) -> None:
    """Also where the policy has moved the purpose to another namespace since."""
    with pytest.raises(StateError, match=r"charter aaaaaaaaaaaa goes on under charter bbbbbbbbbbbb.*is in force"):
        home.admit(SECOND, OLD, namespace=namespace)
    with pytest.raises(StateError, match="nobody has gone on with"):
        home.fits(SECOND, OLD)
    assert home.ledger.admission(SECOND) is None
    home.admit(FIRST, OLD)  # The first one, offered again, is no second one.
    home.admit(SECOND, "d" * 64)  # Nor is an extension of another run.


@pytest.mark.parametrize("why", ["failed", "refused", "left"])
def test_an_extension_that_can_spend_nothing_more_leaves_the_way_open(home: Home, why: str) -> None:
    home.ledger.release_allotment(FIRST, why=why)
    home.fits(SECOND, OLD)
    home.admit(SECOND, OLD)
    assert home.ledger.admission(SECOND) is not None


def test_an_extension_that_expired_unheard_of_leaves_the_way_open_for_good(home: Home) -> None:
    home.ledger.release_allotment(FIRST, why="failed")
    home.admit(SECOND, OLD, expires=2_000)
    home.now = 2_001.0
    home.admit("d" * 64, OLD)
    home.now = 1_500.0  # A clock that is set back brings nobody back.
    with pytest.raises(StateError, match="dddddddddddd, which was signed here and is in force"):
        home.admit("e" * 64, OLD)


def test_a_branch_that_hangs_on_an_extension_that_failed_stands_in_the_way(home: Home) -> None:
    """Else its rounds would leave, and the promise of the one beside it would not count them."""
    third = "d" * 64
    home.ledger.release_allotment(FIRST, why="complete")
    home.admit(third, FIRST)
    assert extensions(home.ledger.accounts().values(), OLD).keys() == {FIRST, third}
    forged = {**home.ledger.accounts()}
    forged["patients"].allotments[FIRST].why = "failed"  # As a coordinator would say of a run that it went on with.
    with pytest.raises(StateError, match="goes on under charter dddddddddddd, which was signed here and is in force"):
        require_only_extension(forged.values(), SECOND, OLD, now=home.now)


@pytest.mark.parametrize("why", ["failed", "refused"])
def test_a_run_without_a_result_is_not_extended(home: Home, why: str) -> None:
    home.ledger.release_allotment(FIRST, why=why)
    with pytest.raises(StateError, match="expected a run that came to its end to go on from, that of charter bbbbbbb"):
        home.admit(SECOND, FIRST)
    assert home.ledger.admission(SECOND) is None


@pytest.mark.parametrize("namespace", ["patients", "visitors"])
def test_an_extension_that_expired_stays_over_in_every_namespace(home: Home, namespace: str) -> None:
    home.ledger.release_allotment(FIRST, why="failed")
    home.admit(SECOND, OLD, expires=2_000, namespace=namespace)
    home.now = 2_001.0
    home.admit("d" * 64, OLD)
    home.now = 1_500.0
    with pytest.raises(StateError):
        home.ledger.reserve(namespace, SECOND, "run-2", 1, ONE, "e" * 64)


@pytest.mark.parametrize("why", ["complete", "stopped"])
def test_an_extension_that_came_to_its_end_is_the_one_to_extend(home: Home, why: str) -> None:
    home.ledger.release_allotment(FIRST, why=why)
    with pytest.raises(StateError, match=r"bbbbbbbbbbbb.*came to its end: extend the run of that one"):
        home.admit(SECOND, OLD)
    home.admit(SECOND, FIRST)


def test_the_check_and_the_signature_ask_the_ledger_about_what_a_charter_extends(league: Any, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.db", clock=lambda: float(league.now))
    old = league.draft()
    first, second = (_extension(old, "r-1", history="9" * 64, spent=spent) for spent in (4, 5))
    limits = _limits(cap=20.0)
    check = budget_check(ledger, limits, "sign")
    admit_charter(ledger, limits, first, "birch", signing_key=league.keys["birch"])
    check(first, first.participant("birch"))
    with pytest.raises(StateError, match=f"goes on under charter {first.digest[:12]}"):
        check(second, second.participant("birch"))
    with pytest.raises(StateError, match=f"goes on under charter {first.digest[:12]}"):
        admit_charter(ledger, limits, second, "birch", signing_key=league.keys["birch"])


def test_rounds_of_an_extension_that_failed_count_as_spent(make_desk: Callable[..., Any], tmp_path: Path) -> None:
    """What the failed one opened is in no adapter, and its vectors were seen all the same."""
    desk = make_desk(private=False)
    old, coordinator = desk.charter, desk.coordinator
    desk.state.mark_signed(old.digest, "a" * 128)
    vectors = {org: np.random.default_rng(1).normal(0, 0.05, 300).astype(np.float32) for org in ("birke", "celtis")}
    coordinator.close_round(1, vectors, tmp_path)
    history = coordinator.history_digest
    catch_up(history, desk.seat, desk.ports)
    coordinator.store.put_bytes(old.canonical())
    offer = lambda spent: _extension(old, "north-1", history=history, spent=spent, adapter=coordinator.adapter_digest)  # noqa: E731
    failed = offer(1)
    desk.ledger.admit("patients", failed.digest, [], 1e-5, 100.0, expires=LATER, sign=lambda: "s", extends=old.digest)
    desk.state.note_offer(
        digest=failed.digest, run="north-2", name="trial", purpose="research", operator_signature="b" * 128
    )
    seen = lambda charter: earlier(charter, "ahorn", desk.ports, desk.ledger)  # noqa: E731
    require_follows(failed, seen(failed))
    for number in (1, 2):
        desk.state.save_words(failed.digest, number, digest=str(number) * 64, size=1)
    assert seen(failed).rounds == 1  # Its own are no earlier ones.
    desk.ledger.release_allotment(failed.digest, why="failed")
    forgetful = offer(2)
    with pytest.raises(VerificationError, match="at least 3 rounds spent before, as we saw them opened, got 2"):
        require_follows(forgetful, seen(forgetful))
    honest = offer(3)
    require_follows(honest, seen(honest))


def _extension(old: Charter, run: str, *, history: str, spent: int, adapter: str = "8" * 64) -> Charter:
    value = old.model_dump(mode="json", exclude_none=True)
    value["adapter"] |= {"initial_digest": adapter}
    value["privacy"] |= {"rounds": 2} | ({"epsilon": 20.0} if old.private else {})
    value["extends"] = {
        "run": run, "charter": old.digest, "history": history, "adapter": adapter, "rounds_spent": spent,
    }  # fmt: skip
    return Charter.parse(canonical_bytes(value))


def _limits(cap: float) -> Limits:
    namespace = UnitNamespace(name="patients", unit="patient", units_at_most=256, epsilon_cap=8.0, delta=1e-5)
    return Limits(
        coordinators=frozenset(),
        minimum_members=2,
        peers={},
        namespaces={"research": replace(namespace, epsilon_cap=cap)},
        allow_unprotected=False,
        evaluation=frozenset({"none"}),
        max_tokens=256,
        max_records_per_unit=4,
        max_rounds=100,
        max_rate=0.1,
        max_rank=16,
        min_survivors=2,
    )
