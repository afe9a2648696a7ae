"""A ledger that forgot: an older copy is recognised and made good, a lost one is refused until a person states it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_client.config import Membership
from foedus_client.ledger import Ledger
from foedus_client.receipts import Reconciled, abandoned, open_ledger, reconcile, remember_heads
from foedus_client.restoring import state_spent
from foedus_client.round import close, take_part
from foedus_client.unexplained import unexplained
from foedus_protocols.accounting import Event
from foedus_protocols.errors import ConnectError, StateError, VerificationError
from foedus_protocols.hello import ToldReceipt
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.messages import CloseNotice, TrainAnswer
from foedus_protocols.receipt import sign_receipt
from support.ledgers import charged

RUN = "north-1"
ONE = Event(noise_multiplier=2.0, sampling_prob=0.5, steps=1)


def spent(desk: Any) -> int:
    """How many steps the ledger says were spent."""
    return sum(event.steps for event in desk.ledger.spent("patients"))


class Hello:
    """What the coordinator tells again, and the comparison with it."""

    def __init__(self, desk: Any, key: Ed25519PrivateKey) -> None:
        self.desk = desk
        self.key = key
        self.us = Membership(
            org="ahorn", federation="north", operator_key=public_hex(key), link="127.0.0.1:1", proxy=None
        )
        desk.coordinator.store.put_bytes(desk.charter.canonical())
        self.told: list[ToldReceipt] = []

    def tell(self, number: int, words: str, **changes: Any) -> ToldReceipt:
        """Add a receipt to what is told."""
        terms: dict[str, Any] = {
            "federation": "north",
            "run": RUN,
            "round": number,
            "org": "ahorn",
            "digest": words,
            "size": 700,
        }
        terms |= {"verdict": "included", "time": 1}
        charter = changes.pop("charter", self.desk.charter.digest)
        key = changes.pop("key", self.key)
        self.told.append(ToldReceipt(charter=charter, receipt=sign_receipt(key, **(terms | changes))))
        return self.told[-1]

    def reconcile(self) -> Reconciled:
        """Compare, as the daemon does at each hello."""
        desk = self.desk
        return reconcile(
            self.told,
            ledger=desk.ledger,
            state=desk.state,
            us=self.us,
            pull=desk.pull,
            clock=lambda: desk.now,
        )

    def take_part(self, number: int) -> TrainAnswer:
        """A round in which everything arrives."""
        answer, _ = take_part(self.desk.order(number), self.desk.seat, self.desk.ports)
        remember_heads(self.desk.ledger, self.desk.state)
        if answer.vector_digest is not None:
            self.tell(number, answer.vector_digest)
        return answer


@pytest.fixture
def hello(desk: Any, operator_key: Ed25519PrivateKey) -> Hello:
    """An organisation that has greeted once, before anything was spent."""
    desk.order = desk.coordinator.order
    desk.state.mark_signed(desk.charter.digest, "a" * 128)
    found = Hello(desk, operator_key)
    assert found.reconcile() == Reconciled()
    return found


def save(desk: Any, *names: str) -> Path:
    """Back files of the home up, whole."""
    copy = desk.home / "backup"
    copy.mkdir()
    desk.state.close()
    for name in names:
        shutil.copy(desk.home / name, copy / name)
    desk.open()
    return copy


def put_back(desk: Any, *names: str) -> None:
    """Restore a backup, as a person would."""
    desk.state.close()
    for name in names:
        for trace in desk.home.glob(f"{name}*"):
            trace.unlink()
        shutil.copy(desk.home / "backup" / name, desk.home / name)
    desk.open()


@pytest.fixture(params=[("ledger.db",), ("ledger.db", "client.db")], ids=["ledger", "whole home"])
def files(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What was restored from a backup."""
    return tuple(request.param)


# --- (a) -------------------------------------------------------------------------------------------------------------


def test_known_receipts_change_nothing(desk: Any, hello: Hello) -> None:
    hello.take_part(1)
    hello.take_part(2)
    before = desk.ledger.entries("patients")
    assert hello.reconcile() == Reconciled()
    assert desk.ledger.entries("patients") == before


def test_a_receipt_that_a_kill_kept_from_the_ledger_is_committed(
    desk: Any, hello: Hello, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "commit", lambda *_: None)
    hello.take_part(1)
    monkeypatch.undo()
    assert hello.reconcile() == Reconciled(committed=1)
    assert [entry.kind for entry in desk.ledger.entries("patients")][-2:] == ["reserve", "commit"]
    assert hello.reconcile() == Reconciled()


# --- (b) -------------------------------------------------------------------------------------------------------------


def test_an_older_copy_is_recognised_and_its_spending_restored(
    desk: Any, hello: Hello, files: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    hello.take_part(1)
    save(desk, *files)
    words = [hello.take_part(number).vector_digest for number in (2, 3)]
    put_back(desk, *files)
    assert spent(desk) == 1
    found = hello.reconcile()
    assert found == Reconciled(restored=2, older=True, abandoned=(desk.charter.digest,))
    assert spent(desk) == 3
    assert "OLDER COPY" in caplog.text
    restored = [entry for entry in desk.ledger.entries("patients") if entry.body.get("restored")]
    assert [(entry.round, entry.body["words"]) for entry in restored] == [(2, words[0]), (3, words[1])]
    committed = [entry.round for entry in desk.ledger.entries("patients") if entry.kind == "commit"]
    assert committed == [1, 2, 3]
    desk.ledger.verify_chain()
    assert hello.reconcile() == Reconciled()
    assert spent(desk) == 3


def test_the_open_round_is_abandoned_and_charged_and_later_ones_go_on(
    desk: Any, hello: Hello, files: tuple[str, ...]
) -> None:
    save(desk, *files)
    hello.take_part(1)
    desk.coordinator.fail_after_push = True  # Round 2 leaves, and nobody here hears of it.
    with pytest.raises(ConnectError):
        hello.take_part(2)
    desk.coordinator.fail_after_push = False
    sent = len(desk.coordinator.pushed)
    put_back(desk, *files)
    hello.reconcile()
    assert spent(desk) == 1
    for _ in range(2):  # Every attempt of the round is answered in the same way.
        assert abandoned(desk.seat, 2, desk.ports)
        assert spent(desk) == 2
    assert len(desk.coordinator.pushed) == sent
    with pytest.raises(StateError, match="abandoned"):
        desk.ledger.reserve("patients", desk.charter.digest, RUN, 2, ONE, "f" * 64)
    assert not abandoned(desk.seat, 3, desk.ports)
    assert hello.take_part(3).vector_digest is not None
    assert spent(desk) == 3
    assert hello.reconcile() == Reconciled()


def test_nothing_is_reserved_before_the_open_round_was_charged(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db")
    hello.take_part(1)
    put_back(desk, "ledger.db")
    hello.reconcile()
    with pytest.raises(StateError, match="older copy"):
        desk.ledger.reserve("patients", desk.charter.digest, RUN, 2, ONE, "f" * 64)


def test_rounds_that_nobody_saw_are_charged_with_the_first_order_and_never_beyond_the_allotment(
    desk: Any, hello: Hello
) -> None:
    save(desk, "ledger.db")
    hello.take_part(1)
    put_back(desk, "ledger.db")
    hello.reconcile()
    assert abandoned(desk.seat, 4, desk.ports)  # Rounds 2 and 3 may have left in part before they failed.
    assert spent(desk) == 4
    assert sum(event.steps for event in charged(desk.ledger, "patients")) == 4


def test_a_copy_without_an_unseen_reservation_is_recognised_by_the_newest_entry_seen(desk: Any, hello: Hello) -> None:
    """Words left in part, nobody gave a receipt, and the ledger of before is put back."""
    save(desk, "ledger.db")
    desk.coordinator.fail_before_push = True
    with pytest.raises(ConnectError):
        hello.take_part(1)
    remember_heads(desk.ledger, desk.state)  # Done between the reservation and the departure.
    put_back(desk, "ledger.db")
    assert hello.reconcile() == Reconciled(older=True, abandoned=(desk.charter.digest,))
    assert abandoned(desk.seat, 1, desk.ports)
    assert spent(desk) == 1


def test_a_copy_put_back_under_a_running_daemon_lets_nothing_leave_and_is_still_recognised(
    desk: Any, hello: Hello
) -> None:
    save(desk, "ledger.db")
    desk.coordinator.fail_before_push = True
    with pytest.raises(ConnectError):
        hello.take_part(1)
    desk.coordinator.fail_before_push = False
    put_back(desk, "ledger.db")
    with pytest.raises(StateError, match="older or another copy"):
        hello.take_part(2)  # Before any hello.
    assert desk.coordinator.pushed == []
    assert hello.reconcile().older
    assert hello.take_part(2).vector_digest is not None  # Its words were reserved, and are the only ones.
    assert abandoned(desk.seat, 3, desk.ports)
    assert spent(desk) == 3  # Round 1, of which words may have left, among them.


def test_a_receipt_in_client_db_alone_is_enough(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db")
    hello.take_part(1)
    hello.told.clear()  # An older coordinator tells nothing.
    put_back(desk, "ledger.db")
    found = hello.reconcile()
    assert (found.restored, found.older) == (1, True)
    assert spent(desk) == 1


def test_of_a_run_that_is_over_all_words_count_and_the_rest_is_free(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db")
    hello.take_part(1)
    desk.coordinator.fail_after_push = True
    with pytest.raises(ConnectError):
        hello.take_part(2)
    close(CloseNotice(charter_digest=desk.charter.digest, outcome="stopped", reason="."), RUN, desk.ports)
    put_back(desk, "ledger.db")
    found = hello.reconcile()
    assert (found.older, found.abandoned) == (True, ())
    assert spent(desk) == 2
    assert sum(event.steps for event in charged(desk.ledger, "patients")) == 2


def test_a_charter_that_ends_before_its_open_round_was_charged_stays_charged_in_full(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db", "client.db")
    hello.take_part(1)
    put_back(desk, "ledger.db", "client.db")
    hello.reconcile()
    desk.ledger.release_allotment(desk.charter.digest)
    assert spent(desk) == 4
    with pytest.raises(StateError, match="never left"):
        desk.ledger.admit("patients", desk.charter.digest, [], 1e-5, 100.0, expires=2**40, sign=lambda: "b" * 128)


def test_a_comparison_that_was_killed_is_done_again(desk: Any, hello: Hello, monkeypatch: pytest.MonkeyPatch) -> None:
    save(desk, "ledger.db")
    for number in (1, 2, 3):
        hello.take_part(number)
    put_back(desk, "ledger.db")
    real, calls = Ledger.transaction, []

    def dying(ledger: Ledger) -> Any:
        calls.append(1)
        if len(calls) == 3:  # Abandon, restore one: the second is never written.
            raise KeyboardInterrupt
        return real(ledger)

    monkeypatch.setattr(Ledger, "transaction", dying)
    with pytest.raises(KeyboardInterrupt):
        hello.reconcile()
    monkeypatch.undo()
    assert spent(desk) == 1
    desk.restart()
    assert (hello.reconcile().restored, spent(desk)) == (2, 3)
    assert abandoned(desk.seat, 4, desk.ports)


def test_a_client_db_that_forgot_takes_its_rounds_over_from_the_receipts(desk: Any, hello: Hello) -> None:
    save(desk, "client.db")
    words = hello.take_part(1).vector_digest
    put_back(desk, "client.db")
    assert hello.reconcile() == Reconciled()
    made = desk.state.round(desk.charter.digest, 1)
    assert (made.words, made.words_bytes) == (words, 700)
    assert made.receipt["verdict"] == "included"
    assert spent(desk) == 1


# --- (c) -------------------------------------------------------------------------------------------------------------


def lose(desk: Any) -> None:
    """The ledger is gone, and client.db with it; keys and policy are there."""
    desk.state.close()
    for name in ("ledger.db", "client.db"):
        for trace in desk.home.glob(f"{name}*"):
            trace.unlink()
    desk.open()
    desk.ledger.open_namespace("patients", unit="topic")


def test_a_lost_ledger_is_refused_until_a_person_states_what_was_spent(desk: Any, hello: Hello) -> None:
    hello.take_part(1)
    hello.take_part(2)
    lose(desk)
    for _ in range(2):
        with pytest.raises(StateError, match="privacy ledger state") as refused:
            hello.reconcile()
        desk.now += 100
    assert f"{RUN} (purpose research, at least 2 rounds of 2:0.5)" in str(refused.value)
    (one,) = unexplained(desk.state)
    assert (one.run, one.charter, one.purpose, one.rounds) == (RUN, desk.charter.digest, "research", 2)
    assert (one.event, one.since) == (ONE, 1_000.0)
    stated = Event(noise_multiplier=2.0, sampling_prob=0.5, steps=3)
    state_spent(desk.ledger, "patients", [stated], runs=[RUN], delta=1e-5, cap=100.0)
    assert hello.reconcile() == Reconciled()
    assert unexplained(desk.state) == []
    assert desk.ledger.spent("patients") == (stated,)


def test_a_run_that_a_statement_covers_is_over_for_us(desk: Any, hello: Hello) -> None:
    state_spent(desk.ledger, "patients", [ONE], runs=[RUN], delta=1e-5, cap=100.0)
    with pytest.raises(StateError, match="covered by a statement"):
        hello.take_part(1)
    assert spent(desk) == 1
    assert desk.coordinator.pushed == []


def test_a_run_that_a_statement_covers_is_over_in_every_namespace(desk: Any, hello: Hello) -> None:
    """The person stated the run's spending in another namespace than the policy has for it."""
    desk.ledger.open_namespace("visitors", unit="topic")
    state_spent(desk.ledger, "visitors", [ONE], runs=[RUN], delta=1e-5, cap=100.0)
    with pytest.raises(StateError, match="covered by a statement"):
        hello.take_part(1)
    assert desk.coordinator.pushed == []


def test_a_copy_from_before_a_signature_is_refused_though_nothing_has_a_receipt(desk: Any, hello: Hello) -> None:
    desk.state.close()
    for trace in desk.home.glob("ledger.db*"):
        trace.unlink()
    desk.open()
    desk.ledger.open_namespace("patients", unit="topic")
    with pytest.raises(StateError, match=RUN):
        hello.reconcile()


def test_what_can_be_restored_is_restored_before_the_refusal(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db")
    hello.take_part(1)
    put_back(desk, "ledger.db")
    hello.tell(1, "e" * 64, charter="9" * 64, run="other-1")
    desk.coordinator.store.put_bytes(b"no charter")
    real = desk.pull

    def pull(wanted: str, limit: int) -> Path:
        if wanted == "9" * 64:
            raise VerificationError("no such file")
        found: Path = real(wanted, limit)
        return found

    desk.pull = pull
    with pytest.raises(StateError, match=r"other-1 \(purpose unknown, at least 1 rounds"):
        hello.reconcile()
    assert spent(desk) == 1
    state_spent(desk.ledger, "patients", [], runs=["other-1"], delta=1e-5, cap=100.0)
    assert not hello.reconcile().older


def test_a_ledger_that_is_gone_is_never_made_anew(desk: Any, hello: Hello) -> None:
    path = desk.home / "ledger.db"
    open_ledger(path, desk.state)
    hello.take_part(1)
    for trace in desk.home.glob("ledger.db*"):
        trace.unlink()
    with pytest.raises(StateError, match=f"it is gone: .*{RUN}"):
        open_ledger(path, desk.state)
    assert not path.exists()
    with pytest.raises(StateError):  # The running daemon's, too.
        desk.ledger.spent("patients")
    assert not path.exists()
    path.touch()
    with pytest.raises(StateError, match="it is gone"):
        open_ledger(path, desk.state)


def test_the_first_ledger_is_made_and_remembered(desk: Any, tmp_path: Path) -> None:
    path = tmp_path / "first.db"
    open_ledger(path, desk.state)
    open_ledger(path, desk.state)
    path.unlink()
    with pytest.raises(StateError, match="no run is known"):
        open_ledger(path, desk.state)


# --- Lies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"federation": "south"}, "another federation"),
        ({"org": "birke"}, "another org"),
        ({"key": generate_signing_key()}, "signature"),
        ({"digest": "e" * 64}, "for the words"),
        ({"run": "north-2"}, "of another run"),
        ({"charter": "9" * 64}, "of another run"),
        ({"round": 5}, "up to 4"),
        ({"round": 0}, "up to 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_receipt_that_lies_is_refused_and_nothing_written(
    desk: Any, hello: Hello, changes: dict[str, Any], text: str
) -> None:
    hello.take_part(1)
    before = desk.ledger.entries("patients")
    words = desk.state.round(desk.charter.digest, 1).words
    hello.tell(1, words, **changes)
    with pytest.raises(VerificationError, match=text):
        hello.reconcile()
    assert desk.ledger.entries("patients") == before


def test_two_receipts_for_one_unknown_round_are_refused(desk: Any, hello: Hello) -> None:
    hello.tell(1, "e" * 64)
    hello.tell(1, "f" * 64)
    with pytest.raises(VerificationError, match="for the words"):
        hello.reconcile()
    assert spent(desk) == 0


def test_in_mode_none_words_are_restored_and_nothing_is_spent(
    make_desk: Callable[..., Any], operator_key: Ed25519PrivateKey
) -> None:
    desk = make_desk(private=False)
    desk.order = desk.coordinator.order
    hello = Hello(desk, operator_key)
    save(desk, "ledger.db")
    hello.take_part(1)
    put_back(desk, "ledger.db")
    assert hello.reconcile().restored == 1
    assert desk.ledger.reservation(desk.charter.digest, RUN, 1) is not None
    assert abandoned(desk.seat, 2, desk.ports)
    assert hello.take_part(3).vector_digest is not None
    assert spent(desk) == 0


def test_a_restored_round_gets_no_second_set_of_words(desk: Any, hello: Hello) -> None:
    save(desk, "ledger.db", "client.db")
    hello.take_part(1)
    put_back(desk, "ledger.db", "client.db")
    hello.reconcile()
    assert not abandoned(desk.seat, 1, desk.ports)
    with pytest.raises(StateError, match="one set of words"):
        desk.state.save_words(desk.charter.digest, 1, digest="e" * 64, size=700)
    with pytest.raises(StateError, match="spent once"):
        desk.ledger.reserve("patients", desk.charter.digest, RUN, 1, ONE, "e" * 64)
    assert spent(desk) == 1
