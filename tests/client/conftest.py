"""A charter for three organisations, and a coordinator and worker made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_client.gate import Gate
from foedus_client.ledger import Ledger
from foedus_client.replay import adapter_bytes
from foedus_client.seat import Ports, Seat
from foedus_client.state import ClientState
from foedus_client.work import (
    CheckReply,
    CheckTask,
    EvaluateReply,
    EvaluateTask,
    Setup,
    Tick,
    TrainReply,
    TrainTask,
)
from foedus_protocols import accounting, codec, rules
from foedus_protocols.accounting import party_constants, weight
from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.charter import Charter, charter_events
from foedus_protocols.errors import ConnectError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.messages import Agreement, ClosedRound, History, Scores, TrainOrder
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.store import FileStore
from support.coded import decode_sum, read_packed

LENGTH = 300
FEDERATION = "north"
RUN = "north-1"
ORGS = ("ahorn", "birke", "celtis")
FOREVER = 2_000_000_000


@pytest.fixture
def operator_key() -> Ed25519PrivateKey:
    """The coordinator's operator."""
    return generate_signing_key()


@pytest.fixture
def make_charter() -> Callable[..., Charter]:
    """A function that makes a charter for `ORGS`."""

    def make(
        *, private: bool = True, evaluation: str = "plain", rounds: int = 4, every: int = 1, **changes: Any
    ) -> Charter:
        noise = 2.0 if private else 0.0
        participants = []
        for org, units_at_most in zip(ORGS, (128, 256, 512), strict=True):
            sampling_prob, expected_units = party_constants(units_at_most, 64)
            participants.append(
                {
                    "id": org,
                    "signing_key": public_hex(generate_signing_key()),
                    "unit": "topic",
                    "units_at_most": units_at_most,
                    "sampling_prob": float(sampling_prob),
                    "expected_units": float(expected_units),
                    "noise_multiplier": noise,
                    "weight": float(weight(expected_units, noise)),
                }
            )
        constants = [(one["weight"], one["expected_units"], one["noise_multiplier"]) for one in participants]
        promise = {"epsilon": 8.0, "delta": 1e-5} if private else {}
        value = {
            "version": 1,
            "federation": FEDERATION,
            "roster_digest": "0" * 64,
            "name": "trial",
            "purpose": "research",
            "domain": "medical",
            "participants": participants,
            "base": "1" * 64,
            "base_name": "tiny",
            "adapter": {
                "targets": "attention",
                "rank": 2,
                "alpha": 4.0,
                "seed": "public",
                "layout_digest": "2" * 64,
                "length": LENGTH,
                "initial_digest": digest(adapter_bytes(np.zeros(LENGTH, np.float32))),
            },
            "recipe": {"optimiser": {"name": "adam"}},
            "privacy": {
                "mode": "local" if private else "none",
                "adjacency": "add-remove-one",
                "l2_clip_norm": 0.5,
                "rounds": rounds,
                "steps_per_round": 1,
                "target_units": 64,
                **promise,
            },
            "masks": {
                "enabled": False,
                "min_survivors": 2,
                "ring_bits": 16,
                "update_bound": codec.update_bound(constants, LENGTH),
            },
            "schedule": {},
            "evaluation": {"term": evaluation, "every": every},
            "release": {},
            "not_before": 0,
            "expires": FOREVER,
            **({} if private else {"seed": 7}),
            **changes,
        }
        charter = Charter.model_validate_json(canonical_bytes(value))
        return Charter.parse(charter.canonical())

    return make


class FakeCoordinator:
    """Signs receipts, keeps what was pushed, sums, and writes histories: the other end of a round."""

    def __init__(self, charter: Charter, key: Ed25519PrivateKey, store: FileStore) -> None:
        self.charter = charter
        self.key = key
        self.store = store
        self.pushed: list[tuple[str, bytes]] = []
        self.delivered: list[bytes] = []
        self.fail_before_push = False
        self.fail_after_push = False
        self.verdict: Literal["included", "late"] = "included"
        self.history: list[ClosedRound] = []
        self.adapter = np.zeros(charter.adapter.length, np.float32)
        self.optimiser = rules.initial_state(charter.rule(), charter.adapter.length)

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        """Take a vector in, or break before or after the bytes arrived."""
        if self.fail_before_push:
            raise ConnectError("the line is cut")
        self.pushed.append((digest, path.read_bytes()))
        if self.fail_after_push:
            raise ConnectError("the line is cut")
        receipt = sign_receipt(
            self.key,
            federation=FEDERATION,
            run=context["run"],
            round=context["round"],
            org="ahorn",
            digest=digest,
            size=path.stat().st_size,
            verdict=self.verdict,
            time=1,
        )
        return receipt.model_dump(mode="json")

    def deliver(self, envelope: bytes) -> None:
        """Take an answer in."""
        self.delivered.append(envelope)

    def close_round(
        self, number: int, vectors: dict[str, np.ndarray], tmp_path: Path, words: bytes | None = None
    ) -> None:
        """Sum the survivors' vectors (and the organisation's own words, where given), and go one adapter further."""
        coding = self.charter.coding()
        key = self.charter.coding_key(RUN, number)
        paths = []
        for org, vector in vectors.items():
            weighted = vector * np.float32(self.charter.relative_weight(org))
            encoded = codec.encode(weighted, coding=coding, key=key, uniform=codec.seeded_uniform(org.encode()))
            paths.append(tmp_path / f"{org}-{number}")
            paths[-1].write_bytes(codec.pack(encoded.words, coding.ring_bits))
        survivors = sorted(vectors)
        if words is not None:
            paths.append(tmp_path / f"ahorn-{number}")
            paths[-1].write_bytes(words)
            survivors = sorted([*survivors, "ahorn"])
        out = tmp_path / f"sum-{number}"
        codec.add_packed_files(paths, coding=coding, out=out)
        total = decode_sum(read_packed(out, coding), coding=coding, key=key)
        mean = rules.mean_of_sum(total, [self.charter.relative_weight(org) for org in survivors])
        self.adapter, self.optimiser = rules.advance(self.adapter, mean, rule=self.charter.rule(), state=self.optimiser)
        entry = ClosedRound(
            round=number,
            attempt=1,
            survivors=survivors,
            sum_digest=self.store.put(out),
            adapter_digest=self.adapter_digest,
        )
        self.history.append(entry)

    @property
    def agreement(self) -> Agreement:
        """Signatures that nobody here verifies: the numbered checks have tests of their own."""
        return Agreement(
            charter_digest=self.charter.digest,
            operator_signature="b" * 128,
            signatures=dict.fromkeys(ORGS, "c" * 128),
        )

    @property
    def adapter_digest(self) -> str:
        """Of the current adapter."""
        return digest(adapter_bytes(self.adapter))

    @property
    def history_digest(self) -> str:
        """Of the history file, which is put into the store."""
        return self.store.put_bytes(History(charter_digest=self.charter.digest, rounds=self.history).encode())

    def order(self, number: int, **changes: Any) -> TrainOrder:
        """A round's order from where the run stands."""
        value = {
            "charter_digest": self.charter.digest,
            "agreement_digest": self.store.put_bytes(self.agreement.encode()),
            "round": number,
            "attempt": 1,
            "adapter_digest": self.adapter_digest,
            "history_digest": self.history_digest,
            "deadline": float(FOREVER),
            "evaluate": False,
        }
        return TrainOrder(**(value | changes))


class FakeWorker:
    """Writes a fresh random vector at each call, and counts the calls."""

    def __init__(self) -> None:
        self.trained = 0
        self.checked = 0
        self.evaluated = 0
        self.adapters: list[bytes] = []
        self.scores: Scores | None = Scores(loss_sum=12.5, tokens=10, units=2)
        self.error: Exception | None = None

    def check(self, setup: Setup, task: CheckTask, tick: Tick) -> CheckReply:
        """Pass."""
        self.checked += 1
        if self.error is not None:
            raise self.error
        return CheckReply(figures={})

    def train(self, setup: Setup, task: TrainTask, tick: Tick) -> TrainReply:
        """Write noise."""
        self.trained += 1
        self.adapters.append(Path(task.adapter).read_bytes())
        length = Path(task.adapter).stat().st_size // 4
        vector = np.random.default_rng().normal(0, 0.05, length).astype("<f4")
        vector.tofile(task.output)
        return TrainReply(figures={"sampled_units": 3})

    def evaluate(self, setup: Setup, task: EvaluateTask, tick: Tick) -> EvaluateReply:
        """Say the same scores."""
        self.evaluated += 1
        return EvaluateReply(scores=self.scores)


class Desk:
    """One organisation ("ahorn") with a fake coordinator and a fake worker, restartable."""

    def __init__(self, charter: Charter, key: Ed25519PrivateKey, home: Path) -> None:
        self.charter = charter
        self.home = home
        self.coordinator = FakeCoordinator(charter, key, FileStore(home / "coordinator"))
        self.worker = FakeWorker()
        self.now = 1_000.0
        self.pulls: list[str] = []
        self.checks: list[tuple[Agreement, bool]] = []
        (home / "work").mkdir()
        self.open()
        self.ledger.open_namespace("patients", unit="topic")
        self.ledger.admit(
            "patients",
            charter.digest,
            charter_events(charter, charter.participant("ahorn")),
            1e-5,
            100.0,
            expires=FOREVER,
            sign=lambda: "a" * 128,
        )
        self.state.note_offer(
            digest=charter.digest, run=RUN, name="trial", purpose="research", operator_signature="b" * 128
        )
        self.seat = Seat(
            charter=charter,
            org="ahorn",
            run=RUN,
            federation=FEDERATION,
            operator_key=public_hex(key),
            namespace="patients",
            setup=Setup(
                base="base",
                base_digest="1" * 64,
                rank=2,
                alpha=4.0,
                adapter_seed="public",
                layout_digest="2" * 64,
                files=[],
                units="record",
                columns={},
                split_key="00",
                max_tokens=64,
                max_records_per_unit=2,
            ),
            check=lambda agreement, spends: self.checks.append((agreement, spends)),
        )

    def open(self) -> None:
        """Open the files, as a fresh process would."""
        self.state = ClientState(self.home / "client.db")
        self.ledger = Ledger(self.home / "ledger.db")
        self.store = FileStore(self.home / "files")
        self.ports = Ports(
            state=self.state,
            ledger=self.ledger,
            store=self.store,
            pull=self.pull,
            gate=Gate(self.coordinator, self.state, clock=lambda: self.now),
            worker=self.worker,
            work=self.home / "work",
            clock=lambda: self.now,
        )

    def restart(self) -> None:
        """Close and open everything."""
        self.state.close()
        self.open()

    def pull(self, wanted: str, limit: int) -> Path:
        """Copy a file over, once."""
        if not self.store.has(wanted):
            self.pulls.append(wanted)
            self.store.put(self.coordinator.store.path(wanted))
        path = self.store.path(wanted)
        assert path.stat().st_size <= limit
        return path


@pytest.fixture
def make_worker() -> Callable[[], FakeWorker]:
    """A function that makes a worker of plain functions."""
    return FakeWorker


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    """An organisation at the start of a private run. The accountant, seconds a call, has tests of its own."""
    return make_desk()


@pytest.fixture
def make_desk(
    make_charter: Callable[..., Charter],
    operator_key: Ed25519PrivateKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Desk]:
    """An organisation at the start of a run of a given kind."""
    monkeypatch.setattr(accounting, "epsilon", lambda events, delta: 7.9)
    monkeypatch.setattr(accounting, "filter_order", lambda events, *, epsilon_cap, delta: 8.0)
    return lambda **kind: Desk(make_charter(**kind), operator_key, tmp_path)
