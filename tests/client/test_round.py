"""One round at an organisation, against a coordinator and a worker made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client import round as rounds
from foedus_client.replay import AdapterDiffers, catch_up
from foedus_client.work import TrainReply
from foedus_protocols.errors import (
    BudgetExhausted,
    ConnectError,
    PolicyRefused,
    PrivacyCheckFailed,
    RoundFailed,
    VerificationError,
)
from foedus_protocols.messages import AdvanceOrder, CloseNotice, EvaluateOrder

pytestmark = pytest.mark.unit


def _others(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {org: rng.normal(0, 0.05, 300).astype(np.float32) for org in ("birke", "celtis")}


def _advance(desk: Any, number: int) -> AdvanceOrder:
    return AdvanceOrder(
        charter_digest=desk.charter.digest, round=number, history_digest=desk.coordinator.history_digest
    )


def test_a_round_reserves_pushes_and_commits(desk: Any) -> None:
    answer, permit = rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    (pushed,) = desk.coordinator.pushed
    assert answer.vector_digest == permit.words == pushed[0]
    assert answer.vector_bytes == len(pushed[1])
    assert answer.scores is None
    assert desk.checks == [(desk.coordinator.agreement, True)]
    kinds = [entry.kind for entry in desk.ledger.entries("patients")]
    assert kinds == ["open", "allot", "reserve", "commit"]
    assert desk.state.round(desk.charter.digest, 1).receipt["verdict"] == "included"
    (departure,) = desk.state.departures()
    assert (departure.kind, departure.digest, departure.round) == ("vector", pushed[0], 1)
    assert not (desk.home / "work" / "vector.f32").exists()


def test_a_crash_after_reserve_and_before_push_sends_the_same_bytes(desk: Any) -> None:
    desk.coordinator.fail_before_push = True
    with pytest.raises(ConnectError):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    reserved = desk.ledger.reservation(desk.charter.digest, "north-1", 1)
    assert reserved is not None
    desk.restart()
    desk.coordinator.fail_before_push = False
    answer, _ = rounds.take_part(desk.coordinator.order(1, attempt=2), desk.seat, desk.ports)
    assert answer.vector_digest == desk.coordinator.pushed[0][0] == reserved.body["words"]
    assert desk.worker.trained == 1
    assert sum(event.steps for event in desk.ledger.spent("patients")) == 1


def test_a_crash_after_push_sends_the_same_bytes_and_spends_once(desk: Any) -> None:
    desk.coordinator.fail_after_push = True
    with pytest.raises(ConnectError):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    desk.restart()
    desk.coordinator.fail_after_push = False
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    first, second = desk.coordinator.pushed
    assert first == second
    # The allotment need not cover the round a second time: in the last round nothing would be left of it.
    assert [spends for _, spends in desk.checks] == [True, False]
    assert desk.worker.trained == 1
    assert sum(event.steps for event in desk.ledger.spent("patients")) == 1


def test_a_crash_between_words_and_reserve_keeps_the_words(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "reserve", killed)
        with pytest.raises(KeyboardInterrupt):
            rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert desk.ledger.spent("patients") == ()
    words = desk.state.round(desk.charter.digest, 1).words
    desk.restart()
    answer, _ = rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert answer.vector_digest == words
    assert desk.worker.trained == 1


def test_lost_words_of_a_spent_round_are_not_made_again(desk: Any) -> None:
    desk.coordinator.fail_before_push = True
    with pytest.raises(ConnectError):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    desk.store.delete(desk.state.round(desk.charter.digest, 1).words)
    desk.coordinator.fail_before_push = False
    with pytest.raises(BudgetExhausted) as refusal:
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert refusal.value.step == 10
    assert desk.coordinator.pushed == []


def test_missed_rounds_are_replayed_from_the_sums(desk: Any, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        desk.coordinator.close_round(number, _others(number), tmp_path)
    rounds.take_part(desk.coordinator.order(4), desk.seat, desk.ports)
    assert desk.worker.adapters == [desk.coordinator.adapter.tobytes()]
    assert desk.coordinator.adapter.any()
    assert len(desk.state.history(desk.charter.digest)) == 3


def test_a_kept_position_saves_the_replay_and_is_not_trusted(desk: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        desk.coordinator.close_round(number, _others(number), tmp_path)
    catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    kept = next((desk.home / "work").glob("position-*"))
    desk.restart()
    for entry in desk.coordinator.history:
        desk.store.delete(entry.sum_digest)
    desk.pulls.clear()
    desk.coordinator.close_round(3, _others(3), tmp_path)
    catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    assert desk.pulls == [desk.coordinator.history_digest, desk.coordinator.history[-1].sum_digest]
    # Nothing new was replayed, so nothing is written again.
    before = kept.stat().st_mtime_ns
    catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    assert kept.stat().st_mtime_ns == before
    # Garbage in its place costs a replay and nothing else.
    kept.write_bytes(kept.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    desk.coordinator.close_round(4, _others(4), tmp_path)
    position = catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    assert position.digest == desk.coordinator.adapter_digest
    # So does what a power cut left of it: the whole file is written again.
    whole = kept.read_bytes()
    for torn in (whole[:-28], b"{}\n", b""):
        kept.write_bytes(torn)
        position = catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
        assert position.digest == desk.coordinator.adapter_digest
        assert kept.read_bytes() == whole


def test_our_own_vector_is_in_the_sum_that_we_replay(desk: Any, tmp_path: Path) -> None:
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    words = desk.coordinator.pushed[0][1]
    desk.coordinator.close_round(1, _others(1), tmp_path, words=words)
    answer, permit = rounds.advance(_advance(desk, 1), desk.seat, desk.ports)
    assert answer.adapter_digest == permit.adapter == desk.coordinator.adapter_digest
    assert not desk.store.has(desk.coordinator.pushed[0][0])


def test_a_wrong_adapter_digest_in_an_order_stops(desk: Any) -> None:
    with pytest.raises(PolicyRefused) as refusal:
        rounds.take_part(desk.coordinator.order(1, adapter_digest="9" * 64), desk.seat, desk.ports)
    assert refusal.value.step == 8
    assert desk.worker.trained == 0
    assert desk.ledger.spent("patients") == ()
    assert desk.coordinator.pushed == []


def test_a_wrong_adapter_digest_in_the_history_stops_and_advance_says_ours(desk: Any, tmp_path: Path) -> None:
    desk.coordinator.close_round(1, _others(1), tmp_path)
    right = desk.coordinator.adapter_digest
    entry = desk.coordinator.history[0]
    desk.coordinator.history[0] = entry.model_copy(update={"adapter_digest": "9" * 64})
    with pytest.raises(AdapterDiffers):
        rounds.take_part(desk.coordinator.order(2, adapter_digest="9" * 64), desk.seat, desk.ports)
    answer, _ = rounds.advance(_advance(desk, 1), desk.seat, desk.ports)
    assert answer.adapter_digest == right
    assert desk.worker.trained == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"survivors": ["birke"]}, id="too few"),
        pytest.param({"survivors": ["birke", "dorn"]}, id="a stranger"),
        pytest.param({"survivors": ["birke", "birke"]}, id="one twice"),
        pytest.param({"survivors": ["ahorn", "birke", "celtis"]}, id="our name without our vector"),
        pytest.param({"round": 9}, id="a round that the charter has not"),
    ],
)
def test_a_history_that_cannot_be_is_refused(desk: Any, tmp_path: Path, change: dict[str, object]) -> None:
    desk.coordinator.close_round(1, _others(1), tmp_path)
    desk.coordinator.history[0] = desk.coordinator.history[0].model_copy(update=change)
    with pytest.raises(VerificationError):
        catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)


@pytest.mark.parametrize("verdict", ["included", "late"])
def test_a_history_that_breaks_a_receipts_word_is_refused(desk: Any, tmp_path: Path, verdict: str) -> None:
    desk.coordinator.verdict = verdict
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    words = desk.coordinator.pushed[0][1] if verdict == "late" else None
    desk.coordinator.close_round(1, _others(1), tmp_path, words=words)
    with pytest.raises(VerificationError, match="receipt"):
        catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)


def test_an_advance_order_erases_the_words_of_closed_rounds_alone(desk: Any) -> None:
    desk.coordinator.fail_before_push = True
    with pytest.raises(ConnectError):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    rounds.advance(_advance(desk, 1), desk.seat, desk.ports)
    assert desk.store.has(desk.state.round(desk.charter.digest, 1).words)


def test_a_rewritten_history_is_refused(desk: Any, tmp_path: Path) -> None:
    desk.coordinator.close_round(1, _others(1), tmp_path)
    catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    desk.coordinator.history.clear()
    with pytest.raises(VerificationError, match="continues"):
        catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)


def test_nothing_is_trained_after_the_deadline(desk: Any) -> None:
    answer, _ = rounds.take_part(desk.coordinator.order(1, deadline=999.0), desk.seat, desk.ports)
    assert answer.vector_digest is None
    assert desk.worker.trained == 0
    assert desk.ledger.spent("patients") == ()


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_round_out_of_turn_is_refused(desk: Any, tmp_path: Path, number: int) -> None:
    desk.coordinator.close_round(1, _others(1), tmp_path)
    with pytest.raises(PolicyRefused) as refusal:
        rounds.take_part(desk.coordinator.order(number), desk.seat, desk.ports)
    assert refusal.value.step == 9


def test_a_failed_privacy_check_releases_nothing(desk: Any) -> None:
    desk.worker.error = PrivacyCheckFailed("half the noise")
    with pytest.raises(PrivacyCheckFailed):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert desk.worker.trained == 0
    assert desk.coordinator.pushed == []
    assert not desk.state.charter(desk.charter.digest).checked


def test_a_worker_that_writes_no_vector_fails_the_round(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.worker, "train", lambda setup, task, tick: TrainReply(figures={}))
    with pytest.raises(RoundFailed, match="got 0"):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert desk.ledger.spent("patients") == ()


def test_the_checks_run_once_a_private_run(desk: Any, tmp_path: Path) -> None:
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    desk.coordinator.close_round(1, _others(1), tmp_path, words=desk.coordinator.pushed[0][1])
    rounds.take_part(desk.coordinator.order(2), desk.seat, desk.ports)
    assert desk.worker.checked == 1


def test_mode_none_reserves_without_spending(make_desk: Callable[..., Any]) -> None:
    desk = make_desk(private=False)
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert desk.worker.checked == 1  # That every matrix trains: it matters without privacy, too.
    assert desk.ledger.spent("patients") == ()
    assert [entry.kind for entry in desk.ledger.entries("patients")][-2:] == ["reserve", "commit"]


def test_scores_leave_once_and_only_under_a_plain_term(desk: Any, make_desk: Callable[..., Any]) -> None:
    order = desk.coordinator.order(1, evaluate=True)
    first, permit = rounds.take_part(order, desk.seat, desk.ports)
    assert first.scores == desk.worker.scores
    assert permit.scores
    again, _ = rounds.take_part(order, desk.seat, desk.ports)
    assert again == first
    assert desk.worker.evaluated == 1


def test_scores_without_a_term_are_refused(make_desk: Callable[..., Any]) -> None:
    desk = make_desk(evaluation="none")
    with pytest.raises(PolicyRefused) as refusal:
        rounds.take_part(desk.coordinator.order(1, evaluate=True), desk.seat, desk.ports)
    assert refusal.value.step == 9
    assert desk.worker.evaluated == 0
    order = EvaluateOrder(**desk.coordinator.order(1).model_dump(exclude={"attempt", "evaluate"}))
    with pytest.raises(PolicyRefused):
        rounds.evaluate(order, desk.seat, desk.ports)


def _evaluate(desk: Any) -> EvaluateOrder:
    return EvaluateOrder(**desk.coordinator.order(1).model_dump(exclude={"attempt", "evaluate"}))


def test_scores_leave_no_more_often_than_the_charter_says(make_desk: Callable[..., Any], tmp_path: Path) -> None:
    desk = make_desk(every=2)
    desk.coordinator.close_round(1, _others(1), tmp_path)
    with pytest.raises(PolicyRefused) as refusal:
        rounds.take_part(desk.coordinator.order(2, evaluate=True), desk.seat, desk.ports)
    assert refusal.value.step == 9
    assert (desk.worker.evaluated, desk.coordinator.pushed) == (0, [])
    desk.coordinator.close_round(2, _others(2), tmp_path)
    answer, _ = rounds.take_part(desk.coordinator.order(3, evaluate=True), desk.seat, desk.ports)
    assert answer.scores == desk.worker.scores


def test_the_last_scores_are_asked_for_once_a_run(make_desk: Callable[..., Any], tmp_path: Path) -> None:
    desk = make_desk(every=3)
    desk.coordinator.close_round(1, _others(1), tmp_path)
    for _ in range(2):
        answer, _ = rounds.evaluate(_evaluate(desk), desk.seat, desk.ports)
        assert answer.scores == desk.worker.scores
        desk.restart()
    with pytest.raises(PolicyRefused, match="no training"):
        rounds.take_part(desk.coordinator.order(2), desk.seat, desk.ports)
    desk.coordinator.close_round(2, _others(2), tmp_path)
    with pytest.raises(PolicyRefused) as refusal:
        rounds.evaluate(_evaluate(desk), desk.seat, desk.ports)
    assert refusal.value.step == 9
    assert (desk.worker.evaluated, desk.worker.trained) == (1, 0)


def test_an_organisation_that_holds_out_nothing_answers_without_scores(desk: Any) -> None:
    desk.worker.scores = None
    order = EvaluateOrder(**desk.coordinator.order(1).model_dump(exclude={"attempt", "evaluate"}))
    for _ in range(2):
        answer, _ = rounds.evaluate(order, desk.seat, desk.ports)
        assert answer.scores is None
    assert [spends for _, spends in desk.checks] == [False, False]
    assert desk.worker.evaluated == 1


def test_a_receipt_for_other_bytes_is_refused(desk: Any) -> None:
    push = desk.coordinator.push
    desk.coordinator.push = lambda path, digest, context: push(path, digest, context | {"round": 2})
    with pytest.raises(VerificationError, match="receipt"):
        rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    assert [entry.kind for entry in desk.ledger.entries("patients")][-1] == "reserve"


def test_close_frees_the_budget_and_erases_the_words(desk: Any) -> None:
    rounds.take_part(desk.coordinator.order(1), desk.seat, desk.ports)
    notice = CloseNotice(charter_digest=desk.charter.digest, outcome="failed", reason="too few")
    rounds.close(notice, desk.seat, desk.ports)
    assert desk.ledger.admission(desk.charter.digest) is None
    assert not desk.store.has(desk.coordinator.pushed[0][0])
    assert desk.state.charter(desk.charter.digest).state == "closed"
    assert sum(event.steps for event in desk.ledger.spent("patients")) == 1
