"""The daemon against a coordinator in this process: real envelopes, rosters, charters and signatures, no sockets."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_client import daemon as daemons
from foedus_client import greeting, life, offers
from foedus_client import round as rounds
from foedus_client.clock import MAX_SKEW_SECONDS
from foedus_client.config import Home
from foedus_client.ledger import Ledger
from foedus_client.life import life_of
from foedus_client.restoring import state_spent
from foedus_client.state import ClientState
from foedus_protocols.charter import verify_charter_signature
from foedus_protocols.errors import ConnectError, DataError, StateError, VerificationError
from foedus_protocols.files import DiskTrouble, disk_errors
from foedus_protocols.hello import MINOR
from foedus_protocols.identity import (
    generate_signing_key,
    public_hex,
)
from foedus_protocols.messages import (
    MAX_BODY_BYTES,
    AdvanceAnswer,
    AdvanceOrder,
    Body,
    CharterAnswer,
    CloseAnswer,
    CloseNotice,
    EvaluateAnswer,
    EvaluateOrder,
    History,
    TrainAnswer,
)
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.store import FileStore
from support.daemon_bench import FEDERATION, OTHER, RUN, US, Bench, Coordinator

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path: Path, make_worker: Callable[[], Any]) -> Bench:
    """An organisation that is ready to sign."""
    return Bench(tmp_path, make_worker())


def test_a_charter_is_signed_and_a_round_is_answered(bench: Bench) -> None:
    verify_charter_signature(public_hex(bench.key), bench.charter.digest, bench.sign())
    answer = bench.train()
    assert isinstance(answer, TrainAnswer)
    assert [answer.vector_digest] == bench.coordinator.pushed
    assert bench.state.charter(bench.charter.digest).state == "agreed"


def test_without_auto_sign_a_person_decides(bench: Bench) -> None:
    bench.set_policy(auto_sign="false")
    offer = bench.offer()
    assert bench.ask(offer) is None
    assert bench.ask(offer) is None
    assert bench.state.charter(bench.charter.digest).state == "offered"
    ClientState(bench.home.state).decide(bench.charter.digest, approve=True)
    answer = bench.ask(offer)
    assert isinstance(answer, CharterAnswer)
    assert answer.signature is not None


def test_a_persons_refusal_leaves_as_a_number_without_a_reason(bench: Bench) -> None:
    bench.set_policy(auto_sign="false")
    offer = bench.offer()
    bench.ask(offer)
    ClientState(bench.home.state).decide(bench.charter.digest, approve=False, reason="not with them")
    assert bench.ask(offer) == CharterAnswer(refused_step=0)
    assert b"not with them" not in bench.coordinator.answers[-1]


@pytest.mark.parametrize(
    ("change", "step"),
    [
        pytest.param({"minimum_members": "2"}, 6, id="too few members"),
        pytest.param({"purposes": "[]"}, 9, id="a purpose that is not allowed"),
        pytest.param({"allow_unprotected": "false"}, 10, id="mode none"),
        pytest.param({"coordinators": "[]"}, 2, id="an operator that is not named"),
    ],
)
def test_a_refusal_leaves_as_the_steps_number(bench: Bench, change: dict[str, str], step: int) -> None:
    bench.set_policy(**change)
    assert bench.ask(bench.offer()) == CharterAnswer(refused_step=step)
    assert bench.state.charter(bench.charter.digest).state == "refused"
    assert bench.train() == TrainAnswer(refused_step=3)


def test_a_charter_file_that_is_not_there_fails_check_1(bench: Bench) -> None:
    bench.coordinator.files.delete(bench.charter.digest)
    assert bench.ask(bench.offer()) == CharterAnswer(refused_step=1)


def test_the_same_message_gets_the_same_bytes_also_after_a_restart(bench: Bench) -> None:
    bench.sign()
    envelope = bench.coordinator.envelope("train", bench.order(), number=1)
    bench.coordinator.cut = 1
    with pytest.raises(ConnectError):
        bench.ask(envelope)
    bench.restart()
    bench.ask(envelope)
    bench.ask(envelope)
    assert bench.coordinator.answers[-1] == bench.coordinator.answers[-2]
    assert bench.worker.trained == 1
    assert len(bench.coordinator.pushed) == 1


def test_nothing_is_trained_before_everyone_signed(bench: Bench) -> None:
    mine = bench.sign()
    assert bench.train(signatures={US: mine}) == TrainAnswer(refused_step=12)
    assert bench.train(signatures={US: mine, OTHER: mine}) == TrainAnswer(refused_step=12)
    assert (bench.worker.trained, bench.coordinator.pushed) == (0, [])


def test_a_charter_that_was_never_offered_is_not_trained(bench: Bench) -> None:
    assert bench.train() == TrainAnswer()
    assert bench.worker.trained == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"sender": OTHER}, id="another sender"),
        pytest.param({"receiver": OTHER}, id="to somebody else"),
        pytest.param({"federation": "south"}, id="another federation"),
        pytest.param({"key": generate_signing_key()}, id="another key"),
    ],
)
def test_a_forged_message_is_dropped(bench: Bench, change: dict[str, Any]) -> None:
    assert bench.ask(bench.offer(**change)) is None
    assert bench.state.charters() == []


def test_a_number_that_was_used_is_not_answered(bench: Bench) -> None:
    bench.sign()
    notice = CloseNotice(charter_digest=bench.charter.digest, outcome="failed", reason="again")
    assert bench.ask(bench.coordinator.envelope("close", notice, sequence=1)) is None
    assert bench.state.charter(bench.charter.digest).state == "signed"


@pytest.mark.parametrize("kind", ["evaluate", "train", "advance"])
def test_malformed_or_unknown_messages_are_not_answered(bench: Bench, kind: str) -> None:
    bench.sign()
    assert bench.ask(bench.coordinator.envelope(kind, CloseAnswer(), number=1)) is None
    assert bench.ask(bench.coordinator.envelope("dump", CloseAnswer())) is None


def test_trouble_of_our_own_leaves_as_an_empty_answer(bench: Bench) -> None:
    bench.sign()
    bench.worker.train = _broken
    assert bench.train() == TrainAnswer()
    assert b"line 7" not in bench.coordinator.answers[-1]


def _broken(*_: object) -> None:
    raise DataError("line 7 of letters.jsonl is not JSON")


def test_close_is_answered_for_known_and_unknown_charters(bench: Bench) -> None:
    bench.sign()
    for digest in (bench.charter.digest, "7" * 64):
        notice = CloseNotice(charter_digest=digest, outcome="failed", reason="too few")
        assert bench.ask(bench.coordinator.envelope("close", notice)) == CloseAnswer()
    assert bench.state.charter(bench.charter.digest).state == "closed"
    assert bench.train() == TrainAnswer(refused_step=3)


def test_another_run_cannot_use_the_charter(bench: Bench) -> None:
    bench.sign()
    envelope = bench.coordinator.envelope("train", bench.order(), number=1, run="north-2")
    assert bench.ask(envelope) == TrainAnswer(refused_step=8)


def test_scores_need_the_charters_term(bench: Bench) -> None:
    bench.sign()
    assert bench.train(evaluate=True) == TrainAnswer(refused_step=9)
    order = EvaluateOrder(**bench.order().model_dump(exclude={"attempt", "evaluate"}))
    assert bench.ask(bench.coordinator.envelope("evaluate", order, number=3)) == EvaluateAnswer(refused_step=9)
    assert bench.worker.evaluated == 0


def test_a_forgotten_roster_is_refused(bench: Bench) -> None:
    bench.coordinator.rosters.pop()
    with pytest.raises(VerificationError, match="continues"):
        bench.daemon.greet(bench.coordinator)


def test_another_operator_is_refused(bench: Bench) -> None:
    bench.coordinator.key = generate_signing_key()
    with pytest.raises(VerificationError, match="operator_key"):
        bench.daemon.greet(bench.coordinator)


def test_the_loop_dials_again_and_ends_when_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "_FIRST_PAUSE", 0.01)
    bench.coordinator.cut = 1
    bench.coordinator.queue = [bench.offer()]
    deliver = bench.coordinator.deliver

    def and_stop(envelope: bytes) -> None:
        deliver(envelope)
        bench.stop.set()

    monkeypatch.setattr(bench.coordinator, "deliver", and_stop)
    dialled: list[int] = []

    def dial() -> Coordinator:
        dialled.append(1)
        return bench.coordinator

    bench.daemon.serve(dial)
    assert len(dialled) == 2
    assert bench.coordinator.closed >= 2
    assert len(bench.coordinator.answers) == 1


def test_an_answer_that_the_coordinator_will_not_have_does_not_end_the_daemon(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "_LONGEST_PAUSE", 0.01)
    bench.coordinator.queue = [bench.offer()]
    calls: list[bytes] = []

    def refuse(envelope: bytes) -> None:
        calls.append(envelope)
        if len(calls) == 3:
            bench.stop.set()
        raise StateError("refused: expected an answer to a message that was sent")

    monkeypatch.setattr(bench.coordinator, "deliver", refuse)
    bench.daemon.serve(lambda: bench.coordinator)
    assert len(calls) == 3
    assert len(set(calls)) == 1


def test_a_stop_hangs_up_in_the_middle_of_a_call(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hung_up = threading.Event()

    def poll(wait_seconds: float) -> bytes | None:
        bench.stop.set()
        assert hung_up.wait(10)
        raise ConnectError("closed")

    monkeypatch.setattr(bench.coordinator, "poll", poll)
    monkeypatch.setattr(bench.coordinator, "close", hung_up.set)
    bench.daemon.serve(lambda: bench.coordinator)
    assert hung_up.is_set()


@pytest.mark.parametrize(("late", "step"), [(MAX_SKEW_SECONDS / 2, None), (MAX_SKEW_SECONDS * 2, 3)])
def test_a_lie_about_the_time_keeps_no_charter_alive(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, late: float, step: int | None
) -> None:
    monkeypatch.setattr(time, "time", lambda: bench.charter.expires + late)
    for lie in (1e300, bench.charter.expires - 1.0):
        bench.coordinator.clock = lie
        bench.daemon.greet(bench.coordinator)
    answer = bench.ask(bench.offer())
    assert isinstance(answer, CharterAnswer)
    assert answer.refused_step == step


def test_a_file_longer_than_its_kind_is_not_fetched(bench: Bench) -> None:
    bench.sign()
    long = bench.coordinator.files.put_bytes(b" " * (MAX_BODY_BYTES + 1))
    assert bench.train(agreement_digest=long) == TrainAnswer(refused_step=8)
    assert not FileStore(bench.home.files).has(long)


def test_a_missing_home_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="join"):
        daemons.run(Home(tmp_path / "nowhere"), threading.Event())


def test_advance_of_an_empty_history_is_the_first_adapter(bench: Bench) -> None:
    bench.sign()
    history = History(charter_digest=bench.charter.digest, rounds=[])
    digest = bench.coordinator.files.put_bytes(history.encode())
    order = AdvanceOrder(charter_digest=bench.charter.digest, round=1, history_digest=digest)
    answer = bench.ask(bench.coordinator.envelope("advance", order, number=1))
    assert answer == AdvanceAnswer(adapter_digest=bench.charter.adapter.initial_digest)


# What must not end the daemon, nor hold up the rest.


def _ask_until_answered(bench: Bench, envelope: bytes, times: int) -> Body | None:
    """Hand a message over so often, and return the last answer."""
    answer = None
    for _ in range(times):
        assert answer is None
        answer = bench.ask(envelope)
    return answer


def _defect(*_: object, **__: object) -> None:
    raise RuntimeError("patient Nightingale has a cough")


@pytest.mark.parametrize("kind", ["train", "evaluate", "charter"])
def test_a_message_that_always_fails_is_answered_with_nothing_in_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    if kind == "charter":
        envelope = bench.offer()
        monkeypatch.setattr(offers, "check_charter", _defect)
        expected: Body = CharterAnswer(refused_step=10)
    else:
        bench.sign()
        monkeypatch.setattr(rounds, "catch_up", _defect)
        order = bench.order()
        if kind == "train":
            envelope, expected = bench.coordinator.envelope("train", order, number=1), TrainAnswer()
        else:
            last = EvaluateOrder(**order.model_dump(exclude={"attempt", "evaluate"}))
            envelope, expected = bench.coordinator.envelope("evaluate", last, number=3), EvaluateAnswer()
    assert _ask_until_answered(bench, envelope, daemons.POISON_FAILURES) == expected
    assert "Nightingale" not in caplog.text
    assert "RuntimeError" in caplog.text
    assert "Nightingale" not in str(life_of(bench.state))


def test_a_message_that_failed_is_put_aside_and_others_go_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sign()
    poison = bench.coordinator.envelope("train", bench.order(), number=1)
    monkeypatch.setattr(rounds, "catch_up", _defect)
    assert bench.ask(poison) is None
    bench.coordinator.queue = [poison]
    assert bench.daemon._next(bench.coordinator) is None  # It came again, and is not looked at yet.
    notice = CloseNotice(charter_digest=bench.charter.digest, outcome="failed", reason="again")
    assert bench.ask(bench.coordinator.envelope("close", notice)) == CloseAnswer()


def test_what_failed_for_a_while_is_answered_in_full_afterwards(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sign()
    envelope = bench.coordinator.envelope("train", bench.order(), number=1)
    with monkeypatch.context() as broken:
        broken.setattr(rounds, "catch_up", _defect)
        assert bench.ask(envelope) is None
    answer = bench.ask(envelope)
    assert isinstance(answer, TrainAnswer)
    assert answer.vector_digest is not None


def test_a_policy_that_cannot_be_read_refuses_no_charter(bench: Bench) -> None:
    text = bench.home.policy.read_text()
    bench.home.policy.write_text("auto_sign = perhaps")
    offer = bench.offer()
    assert _ask_until_answered(bench, offer, daemons.POISON_FAILURES + 2) is None
    bench.home.policy.write_text(text)
    answer = bench.ask(offer)
    assert isinstance(answer, CharterAnswer)
    assert answer.signature is not None


def test_a_charter_that_the_ledger_cannot_judge_is_refused_at_check_10(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*_: object, **__: object) -> None:
        raise VerificationError("nothing is left of delta")

    monkeypatch.setattr(offers, "admit_charter", judge)
    assert bench.ask(bench.offer()) == CharterAnswer(refused_step=10)


@pytest.mark.parametrize("auto_sign", ["true", "false"])
def test_a_charter_of_a_run_that_a_statement_covers_is_refused_at_check_10(bench: Bench, auto_sign: str) -> None:
    """Before a person is asked, and before anything is allotted to it."""
    bench.set_policy(auto_sign=auto_sign)
    ledger = Ledger(bench.home.ledger)
    ledger.open_namespace("patients", unit="topic")
    state_spent(ledger, "patients", [], runs=[RUN], delta=1e-5, cap=8.0)
    assert bench.ask(bench.offer()) == CharterAnswer(refused_step=10)
    assert "is covered by a statement and over for us" in bench.state.charter(bench.charter.digest).reason
    assert ledger.admission(bench.charter.digest) is None


def test_a_statement_that_comes_after_the_signature_ends_the_run_before_anything_is_trained(bench: Bench) -> None:
    bench.sign()
    state_spent(Ledger(bench.home.ledger), "patients", [], runs=[RUN], delta=1e-5, cap=8.0)
    assert bench.train() == TrainAnswer(refused_step=10)
    assert (bench.worker.trained, bench.coordinator.pushed) == (0, [])


@pytest.mark.parametrize("where", ["client.db", "ledger.db", "files", "anywhere"])
def test_a_full_disk_lets_nothing_leave_and_passes(bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    bench.sign()
    envelope = bench.coordinator.envelope("train", bench.order(), number=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO)) if where == "anywhere" else DiskTrouble("the disk is full")

    owner, method = {
        "client.db": (ClientState, "save_answer"),
        "ledger.db": (Ledger, "reserve"),
        "files": (FileStore, "put_bytes"),
        "anywhere": (rounds, "catch_up"),
    }[where]
    before = len(bench.coordinator.answers)
    with monkeypatch.context() as disk:
        disk.setattr(owner, method, full)
        for _ in range(daemons.POISON_FAILURES + 1):  # However often: it is no poison.
            with pytest.raises(DiskTrouble):
                bench.ask(envelope)
    assert len(bench.coordinator.answers) == before
    answer = bench.ask(envelope)
    assert isinstance(answer, TrainAnswer)
    assert [answer.vector_digest] == list(dict.fromkeys(bench.coordinator.pushed))


def test_a_daemon_that_starts_beside_a_full_disk_comes_up_when_there_is_space(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As SQLite says it: the ledger's first transaction finds no space."""
    monkeypatch.setattr("foedus_protocols.backoff._FIRST_START", 0.001)
    opened: list[Path] = []

    def opening(path: Path, *_: object, **__: object) -> Ledger:
        opened.append(path)
        if len(opened) == 2:
            bench.stop.set()
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        with disk_errors(path):
            raise error

    monkeypatch.setattr(daemons, "open_ledger", opening)
    daemons.run(bench.home, bench.stop)
    assert opened == [bench.home.ledger, bench.home.ledger]
    assert "the disk is full: free some space; starting again in" in caplog.text


def test_the_loop_outlives_defects_and_disks_and_says_each_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_FIRST_PAUSE", "_LONGEST_PAUSE", "_TROUBLE_PAUSE"):
        monkeypatch.setattr(daemons, name, 0.001)
    troubles = iter(
        [ValueError("patient Nightingale"), *[DiskTrouble("the disk is full")] * 3, *[ConnectError("nobody there")] * 3]
    )

    def hello(body: dict[str, Any]) -> dict[str, Any]:
        error = next(troubles, None)
        if error is None:
            bench.stop.set()
            raise ConnectError("closed")
        raise error

    monkeypatch.setattr(bench.coordinator, "hello", hello)
    bench.daemon.serve(lambda: bench.coordinator)
    assert [caplog.text.count(text) for text in ("ValueError", "disk is full", "nobody there")] == [1, 1, 1]
    assert "Nightingale" not in caplog.text


# What a person tells a running daemon.


def test_a_paused_daemon_trains_nothing_and_answers_the_rest(bench: Bench) -> None:
    bench.sign()
    life.pause(ClientState(bench.home.state), "machine is needed")
    assert bench.train() == TrainAnswer()
    assert bench.worker.trained == 0
    history = History(charter_digest=bench.charter.digest, rounds=[])
    digest = bench.coordinator.files.put_bytes(history.encode())
    order = AdvanceOrder(charter_digest=bench.charter.digest, round=1, history_digest=digest)
    answer = bench.ask(bench.coordinator.envelope("advance", order, number=1))
    assert answer == AdvanceAnswer(adapter_digest=bench.charter.adapter.initial_digest)
    assert life.resume(ClientState(bench.home.state))
    answer = bench.train()
    assert isinstance(answer, TrainAnswer)
    assert answer.vector_digest is not None


@pytest.mark.parametrize("how", ["paused", "left", "late"])
def test_a_round_in_training_is_given_up_and_costs_nothing(bench: Bench, how: str) -> None:
    bench.sign()

    def train(setup: object, task: object, tick: Callable[[], None]) -> None:
        other = ClientState(bench.home.state)
        if how == "paused":
            life.pause(other, "now")
        elif how == "left":
            life.leave(other, Ledger(bench.home.ledger), bench.charter.digest, "now")
        else:
            bench.daemon._clock.offset += 2e6
        tick()
        raise AssertionError("the tick goes on")

    bench.worker.train = train
    assert bench.train() == TrainAnswer(refused_step=3 if how == "left" else None)
    assert bench.coordinator.pushed == []
    assert Ledger(bench.home.ledger).spent("patients") == ()


def test_a_run_that_was_left_is_trained_no_more_and_still_followed(bench: Bench) -> None:
    bench.sign()
    life.leave(ClientState(bench.home.state), Ledger(bench.home.ledger), bench.charter.digest, "we are out")
    assert bench.train() == TrainAnswer(refused_step=3)
    assert bench.worker.trained == 0
    assert bench.ask(bench.offer()) == CharterAnswer(refused_step=3)
    history = History(charter_digest=bench.charter.digest, rounds=[])
    digest = bench.coordinator.files.put_bytes(history.encode())
    order = AdvanceOrder(charter_digest=bench.charter.digest, round=1, history_digest=digest)
    answer = bench.ask(bench.coordinator.envelope("advance", order, number=1))
    assert answer == AdvanceAnswer(adapter_digest=bench.charter.adapter.initial_digest)
    notice = CloseNotice(charter_digest=bench.charter.digest, outcome="complete", reason="done")
    assert bench.ask(bench.coordinator.envelope("close", notice)) == CloseAnswer()
    record = bench.state.charter(bench.charter.digest)
    assert (record.state, record.reason) == ("closed", "we are out")
    assert bench.train() == TrainAnswer(refused_step=3)
    assert bench.state.was_left(bench.charter.digest)


def test_what_it_does_is_written_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sign()
    seen: list[str | None] = []
    train = bench.worker.train

    def look(*arguments: Any) -> Any:
        seen.append(life_of(ClientState(bench.home.state)).doing)
        return train(*arguments)

    bench.worker.train = look
    bench.train()
    assert seen == [f"round 1 of {RUN}: training"]
    assert life_of(bench.state).last_contact is not None


def test_a_closed_runs_files_are_erased_and_its_charter_stays(bench: Bench) -> None:
    bench.sign()
    bench.train()
    order = bench.order()
    store = FileStore(bench.home.files)
    assert store.has(order.agreement_digest)
    assert store.has(order.history_digest)
    notice = CloseNotice(charter_digest=bench.charter.digest, outcome="complete", reason="done")
    bench.ask(bench.coordinator.envelope("close", notice))
    gone = [order.agreement_digest, order.history_digest, *bench.coordinator.pushed]
    assert not any(store.has(digest) for digest in gone)
    assert store.has(bench.charter.digest)


# Versions.


@pytest.mark.parametrize("minor", [MINOR - 1, MINOR, MINOR + 1])
def test_a_coordinator_one_minor_version_away_is_spoken_to(bench: Bench, minor: int) -> None:
    bench.coordinator.minor = minor
    bench.daemon.greet(bench.coordinator)
    bench.sign()


def test_a_coordinator_too_far_away_is_refused_with_whom_to_update(bench: Bench) -> None:
    bench.coordinator.minor = MINOR + 2
    with pytest.raises(VerificationError, match="update the organisation"):
        bench.daemon.greet(bench.coordinator)


# Receipts: all of them are accounted for before anything is answered (`receipts.py` judges them).


def _receipts(bench: Bench, count: int) -> list[dict[str, Any]]:
    """Receipts that the coordinator signed long ago."""
    return [
        {
            "charter": "7" * 64,
            "receipt": sign_receipt(
                bench.coordinator.key,
                federation=FEDERATION,
                run="old",
                round=number,
                org=US,
                digest="8" * 64,
                size=1,
                verdict="included",
                time=1,
            ).model_dump(mode="json"),
        }
        for number in range(1, count + 1)
    ]


def test_every_page_of_receipts_is_judged_once_and_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[list[int]] = []

    def note(told: Any, **_: object) -> None:
        judged.append([one.receipt.round for one in told])

    monkeypatch.setattr(greeting, "reconcile", note)
    bench.coordinator.receipts = _receipts(bench, 5)
    bench.daemon.greet(bench.coordinator)
    bench.daemon.greet(bench.coordinator)
    bench.coordinator.receipts = _receipts(bench, 6)
    bench.daemon.greet(bench.coordinator)
    assert judged == [[1, 2, 3, 4, 5], [], [6]]
    bench.coordinator.receipts = _receipts(bench, 3)  # The coordinator lost some: all are told again.
    bench.daemon.greet(bench.coordinator)
    bench.daemon.greet(bench.coordinator)
    assert judged[3:] == [[], [1, 2, 3]]
    bench.restart()
    assert judged[5:] == [[1, 2, 3]]


def test_a_coordinator_that_withholds_receipts_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.coordinator.receipts = _receipts(bench, 5)
    bench.coordinator.page = 0
    with pytest.raises(VerificationError, match="announced"):
        bench.daemon.greet(bench.coordinator)


def test_a_page_of_receipts_that_comes_for_ever_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hello, pages = bench.coordinator.hello, iter(range(5))

    def same(body: dict[str, Any]) -> dict[str, Any]:
        if next(pages, None) is None:
            raise ConnectError("asked for ever")
        return hello(body | {"receipts_from": 0}) | {"receipts_total": 2**40}

    bench.coordinator.receipts = _receipts(bench, 5)
    monkeypatch.setattr(bench.coordinator, "hello", same)
    with pytest.raises(VerificationError, match="each receipt once"):
        bench.daemon.greet(bench.coordinator)


def test_spending_that_the_ledger_does_not_know_is_refused_before_anything_is_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "_LONGEST_PAUSE", 0.001)
    bench.coordinator.receipts = _receipts(bench, 1)
    bench.coordinator.queue = [bench.offer()]
    hello, count = bench.coordinator.hello, iter(range(3))

    def counted(body: dict[str, Any]) -> dict[str, Any]:
        if next(count, None) is None:
            bench.stop.set()
        return hello(body)

    monkeypatch.setattr(bench.coordinator, "hello", counted)
    bench.daemon.serve(lambda: bench.coordinator)
    assert bench.coordinator.answers == []
    assert "privacy ledger state" in (life_of(bench.state).last_error or "")


# Slots.


def test_a_vector_that_waits_for_its_slot_holds_up_nobody(tmp_path: Path, make_worker: Callable[[], Any]) -> None:
    bench = Bench(tmp_path, make_worker(), schedule={"vector_slot_seconds": 600.0})
    bench.sign()
    train = bench.coordinator.envelope("train", bench.order(), number=1)
    assert bench.ask(train) is None
    assert "slot" in (life_of(bench.state).doing or "")
    notice = CloseNotice(charter_digest="7" * 64, outcome="failed", reason="another run")
    assert bench.ask(bench.coordinator.envelope("close", notice)) == CloseAnswer()
    bench.coordinator.queue = [train]
    assert bench.daemon._next(bench.coordinator) is None
    bench.daemon._clock.offset += 600.0
    answer = bench.ask(train)
    assert isinstance(answer, TrainAnswer)
    assert bench.coordinator.pushed == [answer.vector_digest]
    assert bench.worker.trained == 1
