"""A joined organisation's home with its daemon, against a coordinator in this process: real envelopes, no sockets."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

from foedus_client import policy
from foedus_client.config import ClientConfig, Home
from foedus_client.daemon import Daemon
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace
from foedus_client.state import ClientState
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.charter import Charter, sign_charter
from foedus_protocols.charter_draft import draft
from foedus_protocols.envelope import open_envelope, seal
from foedus_protocols.errors import ConnectError, VerificationError
from foedus_protocols.hello import MINOR
from foedus_protocols.identity import (
    COORDINATOR,
    generate_signing_key,
    generate_tls_key,
    key_fingerprint,
    public_hex,
    save_key,
)
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.messages import (
    AdvanceAnswer,
    Agreement,
    Body,
    CharterAnswer,
    CharterOffer,
    CloseAnswer,
    EvaluateAnswer,
    History,
    TrainAnswer,
    TrainOrder,
)
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.roster import Roster, SignedRoster
from foedus_protocols.store import FileStore

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
        self.hellos: list[dict[str, Any]] = []
        self.minor = MINOR
        self.receipts: list[dict[str, Any]] = []
        self.page = 2

    def hello(self, body: dict[str, Any]) -> dict[str, Any]:
        self.hellos.append(body)
        newest = SignedRoster.make(self.key, self.rosters[-1])
        return {
            "protocol": 1,
            "minor": self.minor,
            "federation": FEDERATION,
            "org": US,
            "operator_key": public_hex(self.key),
            "roster_digest": newest.roster.digest,
            "roster_version": newest.roster.version,
            "roster_signature": newest.signature,
            "server_time": self.clock,
            "receipts": self.receipts[body.get("receipts_from", 0) :][: self.page],
            "receipts_total": len(self.receipts),
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

    def reload(self) -> None:
        raise AssertionError("nothing was renewed")

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

    def __init__(self, folder: Path, worker: Any, **terms: Any) -> None:
        self.home = Home(folder / "home")
        self.home.make()
        self.key, self.other = generate_signing_key(), generate_signing_key()
        save_key(self.home.signing_key, self.key)
        self._certify()
        self.coordinator = Coordinator(folder, public_hex(self.key), public_hex(self.other))
        self.worker = worker
        self._configure()
        self.charter = self._charter(terms)
        self.open()

    def _certify(self) -> None:
        authority, key = CertificateAuthority.create(FEDERATION), generate_tls_key()
        save_key(self.home.tls.key, key)
        self.home.tls.ca.write_bytes(authority.pem)
        pem = authority.issue_certificate(make_request(key, US), federation=FEDERATION, org=US)
        self.home.tls.certificate.write_bytes(pem)

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
        policy.confirm_peers(rules, {OTHER: key_fingerprint(public_hex(self.other))})
        entry = DatasetEntry(name="d", purposes=["research"], namespace="patients", files=["/d.jsonl"], units="topic")
        policy.add_dataset(rules, entry, Namespace(unit="topic", units_at_most=128, epsilon_cap=8.0, delta=1e-5))
        self.set_policy(minimum_members="1", auto_sign="true", allow_unprotected="true")

    def set_policy(self, **values: str) -> None:
        """Change single values of the policy, as a person would."""
        text = self.home.policy.read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, count=1, flags=re.MULTILINE)
        self.home.policy.write_text(text)

    def _charter(self, terms: dict[str, Any]) -> Charter:
        toml = {
            "name": "trial",
            "purpose": "research",
            "domain": "medical",
            "seed": 1,
            "participants": [{"id": org, "unit": "topic", "units_at_most": 128} for org in (US, OTHER)],
            "adapter": {"rank": 1},
            "privacy": {"mode": "none", "rounds": 2},
            **terms,
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
        assert reply.header.reply_to == question.digest
        same = ("type", "run", "round", "attempt")
        assert [getattr(reply.header, one) for one in same] == [getattr(question.header, one) for one in same]
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
