"""The daemon against a coordinator in this process: real envelopes, rosters, charters and signatures, no sockets."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_client import daemon as daemons
from foedus_client import policy
from foedus_client.config import ClientConfig, Home
from foedus_client.daemon import Daemon
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace
from foedus_client.state import ClientState
from foedus_protocols.charter import Charter, sign_charter, verify_charter_signature
from foedus_protocols.charter_draft import draft
from foedus_protocols.envelope import check_reply, open_envelope, seal
from foedus_protocols.errors import ConnectError, DataError, StateError, VerificationError
from foedus_protocols.identity import COORDINATOR, generate_signing_key, key_fingerprint, public_hex, save_key
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.messages import (
    MAX_BODY_BYTES,
    AdvanceAnswer,
    AdvanceOrder,
    Agreement,
    Body,
    CharterAnswer,
    CharterOffer,
    CloseAnswer,
    CloseNotice,
    EvaluateAnswer,
    EvaluateOrder,
    History,
    TrainAnswer,
    TrainOrder,
)
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.roster import Roster, SignedRoster
from foedus_protocols.store import FileStore

pytestmark = pytest.mark.unit

BASE = Path(__file__).parents[2] / "model" / "foedus_model" / "tiny"
FEDERATION, RUN, US, OTHER = "north", "north-1", "ahorn", "birke"
ANSWERS: dict[str, type[Body]] = {
    "charter": CharterAnswer,
    "train": TrainAnswer,
    "advance": AdvanceAnswer,
    "evaluate": EvaluateAnswer,
    "close": CloseAnswer,
}


class Coordinator:
    """A link whose other end is here: files, a queue of envelopes, receipts."""

    def __init__(self, folder: Path, us: str, other: str) -> None:
        self.key = generate_signing_key()
        self.files = FileStore(folder / "coordinator")
        first = Roster.genesis(FEDERATION)
        second = first.add(OTHER, other, since=1)
        self.rosters = [first, second, second.add(US, us, since=2)]
        for roster in self.rosters:
            self.files.put_bytes(roster.canonical())
        self.sequence = 0
        self.queue: list[bytes] = []
        self.answers: list[bytes] = []
        self.pushed: list[str] = []
        self.cut = 0
        self.closed = 0
        self.clock = time.time() + 3600.0

    def hello(self, body: dict[str, Any]) -> dict[str, Any]:
        newest = SignedRoster.make(self.key, self.rosters[-1])
        return {
            "protocol": 1,
            "federation": FEDERATION,
            "org": US,
            "operator_key": public_hex(self.key),
            "roster_digest": newest.roster.digest,
            "roster_signature": newest.signature,
            "server_time": self.clock,
        }

    def poll(self, wait_seconds: float) -> bytes | None:
        return self.queue[0] if self.queue else None

    def deliver(self, envelope: bytes) -> None:
        if self.cut:
            self.cut -= 1
            raise ConnectError("the line is cut")
        self.answers.append(envelope)
        if self.queue:
            self.queue.pop(0)

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        self.pushed.append(digest)
        receipt = sign_receipt(
            self.key,
            federation=FEDERATION,
            run=context["run"],
            round=context["round"],
            org=US,
            digest=digest,
            size=path.stat().st_size,
            verdict="included",
            time=1,
        )
        return receipt.model_dump(mode="json")

    def pull(self, digest: str, store: FileStore, *, max_bytes: int) -> Path:
        if not store.has(digest):
            if not self.files.has(digest):
                raise VerificationError("no such file")
            if self.files.path(digest).stat().st_size > max_bytes:
                raise VerificationError("too long")
            store.put(self.files.path(digest))
        return store.path(digest)

    def close(self) -> None:
        self.closed += 1

    def envelope(self, kind: str, body: Body, *, number: int = 0, **changes: Any) -> bytes:
        self.sequence += 1
        fields: dict[str, Any] = {
            "type": kind,
            "federation": FEDERATION,
            "run": RUN,
            "round": number,
            "attempt": min(number, 1),
            "sender": COORDINATOR,
            "receiver": US,
            "sequence": self.sequence,
            "body": body.encode(),
        }
        return seal(changes.pop("key", self.key), **(fields | changes)).encode()


class Bench:
    """A joined organisation's home, its daemon, and the coordinator."""

    def __init__(self, folder: Path, worker: Any) -> None:
        self.home = Home(folder / "home")
        self.home.make()
        self.key, self.other = generate_signing_key(), generate_signing_key()
        save_key(self.home.signing_key, self.key)
        self.coordinator = Coordinator(folder, public_hex(self.key), public_hex(self.other))
        self.worker = worker
        self._configure()
        self.charter = self._charter()
        self.open()

    def _configure(self) -> None:
        self.home.save(
            ClientConfig(
                org=US,
                enrolment="127.0.0.1:1",
                ca_fingerprint="0" * 64,
                federation=FEDERATION,
                operator_key=public_hex(self.coordinator.key),
                link="127.0.0.1:2",
            )
        )
        rules = self.home.policy
        policy.write_template(rules)
        policy.add_coordinator(rules, public_hex(self.coordinator.key))
        policy.add_base(rules, BaseEntry(digest=read_manifest(BASE).digest, path=str(BASE)))
        policy.confirm_peer(rules, OTHER, key_fingerprint(public_hex(self.other)))
        entry = DatasetEntry(name="d", purposes=["research"], namespace="patients", files=["/d.jsonl"], units="topic")
        policy.add_dataset(rules, entry, Namespace(unit="topic", units_at_most=128, epsilon_cap=8.0, delta=1e-5))
        self.set_policy(minimum_members="1", auto_sign="true", allow_unprotected="true")

    def set_policy(self, **values: str) -> None:
        """Change single values of the policy, as a person would."""
        text = self.home.policy.read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, count=1, flags=re.MULTILINE)
        self.home.policy.write_text(text)

    def _charter(self) -> Charter:
        toml = {
            "name": "trial",
            "purpose": "research",
            "domain": "medical",
            "seed": 1,
            "participants": [{"id": org, "unit": "topic", "units_at_most": 128} for org in (US, OTHER)],
            "adapter": {"rank": 1},
            "privacy": {"mode": "none", "rounds": 2},
        }
        charter = draft(
            toml,
            federation=FEDERATION,
            roster=self.coordinator.rosters[-1],
            base_digest=read_manifest(BASE).digest,
            base_config=read_config(BASE),
            base_name="tiny",
            now=int(self.coordinator.clock) - 60,
        )
        self.coordinator.files.put_bytes(charter.canonical())
        return charter

    def open(self) -> None:
        """A fresh daemon over the same home."""
        self.state = ClientState(self.home.state)
        self.stop = threading.Event()
        self.daemon = Daemon(self.home, self.home.membership(), state=self.state, worker=self.worker, stop=self.stop)
        self.daemon.greet(self.coordinator)

    def restart(self) -> None:
        """As after a kill."""
        self.state.close()
        self.open()

    def ask(self, envelope: bytes) -> Body | None:
        """Hand a message over, and return the answer's checked body, None where there was none."""
        before = len(self.coordinator.answers)
        self.coordinator.queue = [envelope]
        self.daemon.handle(envelope, self.coordinator)
        if len(self.coordinator.answers) == before:
            return None
        reply = open_envelope(
            self.coordinator.answers[-1],
            public_key=public_hex(self.key),
            sender=US,
            receiver=COORDINATOR,
            federation=FEDERATION,
        )
        question = open_envelope(
            envelope,
            public_key=public_hex(self.coordinator.key),
            sender=COORDINATOR,
            receiver=US,
            federation=FEDERATION,
        )
        check_reply(reply, to=question)
        return ANSWERS[reply.header.type].decode(reply.body)

    def offer(self, **changes: Any) -> bytes:
        """The charter's offer."""
        signature = sign_charter(self.coordinator.key, self.charter.digest)
        body = CharterOffer(charter_digest=self.charter.digest, operator_signature=signature)
        return self.coordinator.envelope("charter", body, **changes)

    def sign(self) -> str:
        """Have the charter signed."""
        answer = self.ask(self.offer())
        assert isinstance(answer, CharterAnswer)
        assert answer.signature is not None
        return answer.signature

    def order(self, number: int = 1, *, signatures: dict[str, str] | None = None, **changes: Any) -> TrainOrder:
        """A round's order, with everyone's signatures."""
        mine = sign_charter(self.key, self.charter.digest)
        theirs = sign_charter(self.other, self.charter.digest)
        agreement = Agreement(
            charter_digest=self.charter.digest,
            operator_signature=sign_charter(self.coordinator.key, self.charter.digest),
            signatures=signatures or {US: mine, OTHER: theirs},
        )
        history = History(charter_digest=self.charter.digest, rounds=[])
        values = {
            "charter_digest": self.charter.digest,
            "agreement_digest": self.coordinator.files.put_bytes(agreement.encode()),
            "round": number,
            "attempt": 1,
            "adapter_digest": self.charter.adapter.initial_digest,
            "history_digest": self.coordinator.files.put_bytes(history.encode()),
            "deadline": self.coordinator.clock + 1e6,
            "evaluate": False,
        }
        return TrainOrder(**(values | changes))

    def train(self, **changes: Any) -> Body | None:
        """Order round 1."""
        return self.ask(self.coordinator.envelope("train", self.order(**changes), number=1))


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


@pytest.mark.parametrize(("late", "step"), [(daemons.MAX_SKEW_SECONDS / 2, None), (daemons.MAX_SKEW_SECONDS * 2, 3)])
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
