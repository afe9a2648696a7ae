"""A federation without sockets: a real home, real desks, and organisations that answer with real bodies and words."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_coordinator import run as run_module
from foedus_coordinator.config import Config, Home
from foedus_coordinator.executor import run_of
from foedus_coordinator.run import Run
from foedus_coordinator.service import LinkDesk
from foedus_protocols import codec, rules
from foedus_protocols.canonical import canonical_bytes, digest, parse_canonical
from foedus_protocols.certificates import make_request
from foedus_protocols.charter import Charter, sign_charter, verify_agreement
from foedus_protocols.charter_draft import draft
from foedus_protocols.envelope import Envelope, open_envelope, seal
from foedus_protocols.errors import StateError
from foedus_protocols.identity import COORDINATOR, generate_signing_key, generate_tls_key, public_hex
from foedus_protocols.messages import (
    AdvanceAnswer,
    AdvanceOrder,
    Agreement,
    Body,
    CharterAnswer,
    CharterOffer,
    CloseAnswer,
    EvaluateAnswer,
    EvaluateOrder,
    History,
    Scores,
    TrainAnswer,
    TrainOrder,
)
from support.replayed import RoundSum, replay

FEDERATION = "test"
ORGS = ("alpha", "beta", "gamma")
BASE_CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "model_type": "gpt_oss",
}


def _as_it_is(kind: str, body: Body) -> Body:
    return body


@dataclass
class FakeOrganisation:
    """An organisation that trains nothing: its vectors are drawn once a round, everything else is real."""

    org: str
    key: Ed25519PrivateKey
    operator_key: str
    desk: LinkDesk
    charter: Charter | None = None
    run: str = ""
    sequence: int = 0
    words: dict[int, bytes] = field(default_factory=dict)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    receipts: dict[int, dict[str, Any]] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    answered: dict[str, bytes] = field(default_factory=dict)
    change: Callable[[str, Body], Body] = _as_it_is
    silent: set[str] = field(default_factory=set)

    def step(self) -> bool:
        """Take one message, if there is one, and answer it."""
        data = self.desk.poll(self.org, 0.0)
        if data is None:
            return False
        opened = open_envelope(
            data, public_key=self.operator_key, sender=COORDINATOR, receiver=self.org, federation=FEDERATION
        )
        if opened.header.type in self.silent:
            return True
        if opened.digest not in self.answered:
            body = self.change(opened.header.type, self._answer(opened))
            self.answered[opened.digest] = self._seal(opened, body)
        self.desk.deliver(self.org, self.answered[opened.digest])
        return True

    def _seal(self, question: Envelope, body: Body) -> bytes:
        self.sequence += 1
        header = question.header
        return seal(
            self.key,
            type=header.type,
            federation=FEDERATION,
            run=header.run,
            round=header.round,
            attempt=header.attempt,
            sender=self.org,
            receiver=COORDINATOR,
            sequence=self.sequence,
            body=body.encode(),
            reply_to=question.digest,
        ).encode()

    def _answer(self, opened: Envelope) -> Body:
        kind, body = opened.header.type, opened.body
        self.run = opened.header.run
        if kind == "charter":
            return self._sign(CharterOffer.decode(body))
        if kind == "train":
            return self._train(TrainOrder.decode(body))
        if kind == "advance":
            return AdvanceAnswer(adapter_digest=self._replay(AdvanceOrder.decode(body).history_digest))
        if kind == "evaluate":
            order = EvaluateOrder.decode(body)
            assert self._replay(order.history_digest) == order.adapter_digest
            return EvaluateAnswer(scores=Scores(loss_sum=50.0, tokens=100, units=4))
        self.closed.append(opened.header.run)
        return CloseAnswer()

    def _pull(self, name: str) -> bytes:
        data = self.desk.path_of(self.org, name).read_bytes()
        assert digest(data) == name
        return data

    def _sign(self, offer: CharterOffer) -> CharterAnswer:
        self.charter = Charter.parse(self._pull(offer.charter_digest))
        return CharterAnswer(signature=sign_charter(self.key, self.charter.digest))

    def _train(self, order: TrainOrder) -> TrainAnswer:
        assert self.charter is not None
        verify_agreement(self.charter, Agreement.decode(self._pull(order.agreement_digest)), self.operator_key)
        assert self._replay(order.history_digest) == order.adapter_digest
        words = self._words(order.round)
        self.push(words, order.round, order.attempt)
        scores = Scores(loss_sum=100.0 - order.round, tokens=100, units=4) if order.evaluate else None
        return TrainAnswer(vector_digest=digest(words), vector_bytes=len(words), scores=scores)

    def push(self, words: bytes, number: int, attempt: int = 1) -> dict[str, Any]:
        """Push a vector as the link does, and keep the receipt."""
        context = {"run": self.run, "round": number, "attempt": attempt}
        with self.desk.granted(self.org, digest(words), len(words), context) as part:
            while part.offset < len(words):
                part.write(words[part.offset : part.offset + (1 << 20)])
            part.finish()
        receipt = parse_canonical(self.desk.received(self.org, digest(words), len(words), context))
        self.receipts.setdefault(number, receipt)
        assert receipt == self.receipts[number]
        return receipt

    def _words(self, number: int) -> bytes:
        """Drawn once for a round, whatever the attempt."""
        assert self.charter is not None
        if number not in self.words:
            coding = self.charter.coding()
            generator = np.random.default_rng([number, *self.org.encode()])
            vector = generator.standard_normal(coding.length).astype(np.float32)
            vector *= np.float32(0.3 * coding.update_bound / np.linalg.norm(vector))
            self.vectors[number] = vector
            key = self.charter.coding_key(self.run, number)
            uniform = codec.seeded_uniform(f"{self.org} {number}".encode())
            encoded = codec.encode(vector, coding=coding, key=key, uniform=uniform)
            self.words[number] = codec.pack(encoded.words, coding.ring_bits)
        return self.words[number]

    def _replay(self, history_digest: str) -> str:
        """What a plain replay makes of the published history."""
        assert self.charter is not None
        adapter, _ = self._replayed(self.charter, self.run, history_digest)
        found = digest(adapter.astype("<f4").tobytes())
        self.adapters.append(found)
        return found

    def _replayed(self, charter: Charter, run: str, history_digest: str) -> tuple[np.ndarray, rules.State | None]:
        """Adapter and state after a run's history; an extension's begins where the run before it ended."""
        coding = charter.coding()
        start, state = charter.adapter.start(lambda: BASE_CONFIG), None
        if (extends := charter.extends) is not None:
            ended = Charter.parse(self._pull(extends.charter))
            start, state = self._replayed(ended, extends.run, extends.history)
        rounds = []
        for entry in History.decode(self._pull(history_digest)).rounds:
            words = codec.unpack(self._pull(entry.sum_digest), coding.ring_bits, coding.padded).astype(np.int64)
            weights = [charter.relative_weight(org) for org in entry.survivors]
            rounds.append(RoundSum(words=words, weights=weights, key=charter.coding_key(run, entry.round)))
        return replay(start, rounds, coding=coding, rule=charter.rule(), state=state)

    def begin_anew(self) -> None:
        """Forget what belongs to one run."""
        self.words, self.vectors, self.receipts, self.adapters = {}, {}, {}, []


@dataclass
class Federation:
    """A home, its desk, its organisations, and a run that can be put together again and again."""

    root: Path
    home: Home
    desk: LinkDesk
    orgs: dict[str, FakeOrganisation]
    run_id: str = ""

    def start_run(self, **changes: Any) -> Charter:
        """Draw up a charter and hand it over, as the command does."""
        charter = draw(self.home, **changes)
        self.run_id = f"{charter.name}-{charter.digest[:8]}"
        self.home.files.put_bytes(charter.canonical())
        self.home.storage.add_run(
            self.run_id,
            charter_digest=charter.digest,
            operator_signature=sign_charter(self.home.operator_key, charter.digest),
            base_config=canonical_bytes(BASE_CONFIG),
            orgs=[participant.id for participant in charter.participants],
            files=[charter.digest],
        )
        return charter

    def run(self, *, stop: threading.Event | None = None) -> Run:
        """The run as a freshly started coordinator sees it: nothing in memory survives."""
        home = Home(self.root)
        return run_of(home, home.storage.run(self.run_id), stop=stop or threading.Event(), say=lambda line: None)


def draw(home: Home, **changes: Any) -> Charter:
    """A small charter in mode `none`; `changes` replace whole tables of the draft."""
    terms: dict[str, Any] = {
        "name": "small",
        "purpose": "tests",
        "domain": "none",
        "participants": [{"id": org, "unit": "record", "units_at_most": 64} for org in ORGS],
        "adapter": {"rank": 2, "alpha": 4.0, "seed": "tests"},
        "privacy": {"mode": "none", "rounds": 2, "l2_clip_norm": 1.0},
        "masks": {"min_survivors": 2},
        "schedule": {"round_seconds": 20.0},
        "evaluation": {"term": "plain"},
        "seed": 1,
    }
    terms |= changes
    return draft(
        {name: value for name, value in terms.items() if value is not None},
        federation=FEDERATION,
        roster=home.members.roster(),
        base_digest="b" * 64,
        base_config=BASE_CONFIG,
        base_name="toy",
        now=int(time.time()) - 1,
    )


def enrol(home: Home, org: str) -> Ed25519PrivateKey:
    """Invite, ask and approve."""
    key = generate_signing_key()
    token = home.members.invite(org)
    request = home.members.request(
        org, token, csr_pem=make_request(generate_tls_key(), org), signing_key=public_hex(key)
    )
    home.members.approve(request, authority=home.authority, key=home.operator_key)
    return key


@pytest.fixture(scope="session")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ed25519PrivateKey]]:
    """A home with three members, to be copied."""
    root = tmp_path_factory.mktemp("coordinator") / "home"
    home = Home.create(
        root, Config(federation=FEDERATION, address="127.0.0.1", link_port=0, enrolment_port=0, listen="127.0.0.1")
    )
    keys = {org: enrol(home, org) for org in ORGS}
    home.storage.close()
    return root, keys


@pytest.fixture
def make_federation(
    enrolled: tuple[Path, dict[str, Ed25519PrivateKey]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Federation]]:
    """Makes federations that share nothing but the members' keys."""
    template, keys = enrolled
    made: list[Federation] = []
    # The run and the desk are apart here as two processes are, and only look at each other's commits this often.
    monkeypatch.setattr(run_module, "_POLL_SECONDS", 0.005)

    def make() -> Federation:
        root = tmp_path / f"home-{len(made)}"
        shutil.copytree(template, root)
        home = Home(root)
        desk = LinkDesk(
            storage=home.storage,
            mailbox=home.mailbox,
            members=home.members,
            authorities=home.authorities,
            files=home.files,
            vectors=home.vectors,
            key=home.operator_key,
            federation=FEDERATION,
        )
        operator_key = public_hex(home.operator_key)
        orgs = {org: FakeOrganisation(org, key, operator_key, desk) for org, key in keys.items()}
        made.append(Federation(root, home, desk, orgs))
        return made[-1]

    yield make
    for federation in made:
        federation.home.storage.close()


@pytest.fixture
def federation(make_federation: Callable[[], Federation]) -> Federation:
    """One federation."""
    return make_federation()


class Pump:
    """Lets the organisations answer in a thread of their own while the run executes."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self.errors: list[BaseException] = []

    def __enter__(self) -> Pump:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.errors:
            raise self.errors[0]

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                busy = [one.step() for one in self._federation.orgs.values()]
            except (StateError, AssertionError) as error:
                self.errors.append(error)
                return
            if not any(busy):
                self._stop.wait(0.005)


@pytest.fixture
def pump() -> type[Pump]:
    """The class, for `with pump(federation):`."""
    return Pump
