"""The long-running process of an organisation: it dials the coordinator, answers what it asks, and runs a worker.

One loop: poll, open the envelope, act, pass the gate, deliver. Each message is answered once; the answer is on disk
before it leaves, and leaves again as it is when the message comes again. A broken line is not an error: the loop
dials again, with patience and jitter. Nothing listens here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter, Participant
from foedus_protocols.charter_checks import OrgView, Stage, check_charter
from foedus_protocols.console import printable
from foedus_protocols.envelope import Envelope, open_envelope, seal
from foedus_protocols.errors import (
    CheckpointError,
    ConfigError,
    ConnectError,
    DataError,
    FoedusError,
    PolicyRefused,
    PrivacyCheckFailed,
    RoundFailed,
    StateError,
    UsageError,
    VerificationError,
)
from foedus_protocols.identity import COORDINATOR, load_signing_key
from foedus_protocols.link_client import LinkClient
from foedus_protocols.messages import (
    AdvanceOrder,
    Agreement,
    Body,
    CharterOffer,
    CloseAnswer,
    CloseNotice,
    EvaluateAnswer,
    EvaluateOrder,
    TrainAnswer,
    TrainOrder,
)
from foedus_protocols.roster import Roster
from foedus_protocols.store import FileStore

from foedus_client import offers, policy
from foedus_client import round as rounds
from foedus_client.config import Home, Membership
from foedus_client.gate import Gate, Permit
from foedus_client.ledger import Ledger
from foedus_client.lock import HomeLock
from foedus_client.membership import org_view, read_hello, update_rosters
from foedus_client.offers import OfferDesk
from foedus_client.seat import Ports, Seat, take_seat
from foedus_client.state import CharterRecord, ClientState
from foedus_client.work import WorkerPort
from foedus_client.worker_process import WorkerProcess

_LOG = logging.getLogger("foedus.client")

POLL_SECONDS = 15.0
HELLO_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
STOP_SECONDS = 0.5
_REASON_CHARACTERS = 500
MAX_SKEW_SECONDS = 86_400.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
_random = secrets.SystemRandom()

Answer = tuple[Body, Permit]


class Stopped(Exception):
    """Somebody asked the daemon to end while it waited."""


class Link(Protocol):
    """What the daemon uses of `LinkClient`."""

    def hello(self, body: dict[str, Any]) -> dict[str, Any]:
        """Introduce ourselves."""

    def poll(self, wait_seconds: float) -> bytes | None:
        """The oldest message that we have not answered."""

    def deliver(self, envelope: bytes) -> None:
        """Send an answer."""

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        """Send a file."""

    def pull(self, digest: str, store: FileStore, *, max_bytes: int) -> Path:
        """Fetch a file of at most so many bytes."""

    def close(self) -> None:
        """Hang up."""


@dataclass(kw_only=True)
class Clock:
    """The coordinator's clock as measured in hello. A skew is tolerated, and never a reason to end.

    It is followed for a day and no further: a coordinator that lies about the time must not keep a charter alive.
    """

    offset: float = 0.0

    def follow(self, theirs: float, ours: float) -> None:
        """Take over a measured skew."""
        skew = theirs - ours
        if abs(skew) > MAX_SKEW_SECONDS:
            _LOG.error("the coordinator's clock and ours differ by %.1f days, which is not followed", skew / 86_400.0)
        self.offset = min(max(skew, -MAX_SKEW_SECONDS), MAX_SKEW_SECONDS)

    def __call__(self) -> float:
        """Unix seconds."""
        return time.time() + self.offset


def run(home: Home, stop: threading.Event) -> None:
    """Be the organisation's daemon until `stop` is set.

    Raises:
        StateError: Not joined, or another daemon has this home.
        ConfigError: Policy, keys or certificate are not usable.
    """
    us = home.membership()
    home.make()
    policy.load(home.policy)
    with HomeLock(home.lock):
        worker = WorkerProcess(home.work, stderr=home.worker_log)
        state = ClientState(home.state)
        try:
            daemon = Daemon(home, us, state=state, worker=worker, stop=stop)
            daemon.serve(lambda: LinkClient(us.link, home.tls, proxy=us.proxy))
        finally:
            worker.stop()
            state.close()


class Daemon:
    """One organisation's side of every run of its federation."""

    def __init__(
        self, home: Home, us: Membership, *, state: ClientState, worker: WorkerPort, stop: threading.Event
    ) -> None:
        self._home = home
        self._us = us
        self._state = state
        self._worker = worker
        self._stop = stop
        self._key: Ed25519PrivateKey = load_signing_key(home.signing_key)
        self._clock = Clock()
        self._ledger = Ledger(home.ledger, clock=self._clock)
        self._store = FileStore(home.files)
        self._rosters: list[Roster] = []
        self._inbox: deque[bytes] = deque()
        self._seats: dict[str, Seat] = {}
        self._waiting: set[str] = set()
        self._beat = 0.0

    # The loop.

    def serve(self, dial: Callable[[], Link]) -> None:
        """Connect, answer, and connect again, until told to stop."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                with self._open(dial()) as link:
                    self.greet(link)
                    pause = _FIRST_PAUSE
                    self._answer_all(link)
            except Stopped:
                return
            except ConnectError as error:
                if not self._stop.is_set():
                    _LOG.warning("%s", error)
            except (VerificationError, StateError) as error:  # What the other side says is no reason to end here.
                _LOG.error("%s", error)
                pause = _LONGEST_PAUSE
            self._stop.wait(pause * _random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LONGEST_PAUSE)

    @contextmanager
    def _open(self, link: Link) -> Iterator[Link]:
        """A link that is hung up at the end, and at once when somebody asks the daemon to stop in the middle of a call.

        Whatever a call was about is durable and comes again, so cutting it costs nothing.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.wait(STOP_SECONDS):
                if self._stop.is_set():
                    link.close()
                    return

        watcher = threading.Thread(target=watch, name="foedus-stop", daemon=True)
        watcher.start()
        try:
            yield link
        finally:
            done.set()
            watcher.join()
            link.close()

    def greet(self, link: Link) -> None:
        """Introduce ourselves: compare what we joined with, measure the clock, fetch the roster.

        Raises:
            VerificationError: The coordinator is not the one that we joined, or its roster forgets what was seen.
        """
        asked = time.time()
        answer = link.hello({"protocol": 1, "org": self._us.org})
        head, signature, clock = read_hello(answer, self._us)
        self._clock.follow(clock, (asked + time.time()) / 2)
        self._rosters = update_rosters(head, signature, us=self._us, state=self._state, pull=self._puller(link))
        self._inbox.clear()
        _LOG.info("connected to %s, %d members", self._us.federation, len(self._rosters[-1].members))

    def _answer_all(self, link: Link) -> None:
        greeted = time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - greeted > HELLO_SECONDS:
                self.greet(link)
                greeted = time.monotonic()
            data = self._inbox.popleft() if self._inbox else link.poll(POLL_SECONDS)
            if data is not None:
                self.handle(data, link)

    # One message.

    def handle(self, data: bytes, link: Link) -> None:
        """Answer one message, once.

        Raises:
            ConnectError: The line broke; the message will come again.
            Stopped: The daemon is to end.
        """
        try:
            envelope = open_envelope(
                data,
                public_key=self._us.operator_key,
                sender=COORDINATOR,
                receiver=self._us.org,
                federation=self._us.federation,
            )
        except VerificationError as error:
            _LOG.error("a message is not what it should be: %s", error)
            return
        gate = Gate(link, self._state, clock=self._clock)
        stored = self._state.answer_to(envelope.digest)
        if stored is None:
            stored = self._make_answer(envelope, link, gate)
        if stored is not None:
            gate.send(stored)
            self._state.mark_delivered(envelope.digest)

    def _make_answer(self, envelope: Envelope, link: Link, gate: Gate) -> bytes | None:
        """Act on a message and store its answer; None where it cannot be answered now."""
        header = envelope.header
        try:
            self._state.require_unused(header.sequence)
            answer = self._act(envelope, self._ports(link, gate))
            if answer is None:
                return None
            body, permit = answer
            gate.approve(body, permit=permit)
            return self._state.save_answer(envelope.digest, header.sequence, self._seal(body, envelope))
        except ConnectError:
            raise
        except FoedusError as error:
            _LOG.error("%s of round %d cannot be answered: %s", header.type, header.round, error)
            return None

    def _seal(self, body: Body, question: Envelope) -> bytes:
        header = question.header
        return seal(
            self._key,
            type=header.type,
            federation=self._us.federation,
            run=header.run,
            round=header.round,
            attempt=header.attempt,
            sender=self._us.org,
            receiver=COORDINATOR,
            sequence=self._state.next_sequence(),
            body=body.encode(),
            reply_to=question.digest,
        ).encode()

    def _act(self, envelope: Envelope, ports: Ports) -> Answer | None:
        kind, run, data = envelope.header.type, envelope.header.run, envelope.body
        if kind == "charter":
            return offers.consider(CharterOffer.decode(data), run, self._offer_desk(ports))
        if kind == "train":
            return self._train(TrainOrder.decode(data), run, ports)
        if kind == "evaluate":
            return self._evaluate(EvaluateOrder.decode(data), run, ports)
        if kind == "advance":
            order = AdvanceOrder.decode(data)
            return rounds.advance(order, self._seat(order.charter_digest, run, ports), ports)
        if kind == "close":
            return self._close(CloseNotice.decode(data), run, ports)
        raise VerificationError(f"expected one of five message types, got {kind!r}")

    def _train(self, order: TrainOrder, run: str, ports: Ports) -> Answer:
        permit = Permit(charter=order.charter_digest, run=run, round=order.round)
        try:
            return rounds.take_part(order, self._seat(order.charter_digest, run, ports), ports)
        except FoedusError as error:
            step = refusal_of(error)
            _LOG.error("round %d: no vector: %s", order.round, error)
            return TrainAnswer(refused_step=step), permit

    def _evaluate(self, order: EvaluateOrder, run: str, ports: Ports) -> Answer:
        permit = Permit(charter=order.charter_digest, run=run, round=order.round)
        try:
            return rounds.evaluate(order, self._seat(order.charter_digest, run, ports), ports)
        except FoedusError as error:
            step = refusal_of(error)
            _LOG.error("round %d: no scores: %s", order.round, error)
            return EvaluateAnswer(refused_step=step), permit

    def _close(self, notice: CloseNotice, run: str, ports: Ports) -> Answer:
        if self._state.knows(notice.charter_digest):
            self._known(notice.charter_digest, run)
            answer: Answer = rounds.close(notice, run, ports)
        else:
            answer = CloseAnswer(), Permit(charter=notice.charter_digest, run=run)
        self._seats.pop(notice.charter_digest, None)
        self._waiting.discard(notice.charter_digest)
        _LOG.info("run %s is over: %s (%s)", run, notice.outcome, printable(notice.reason)[:_REASON_CHARACTERS])
        return answer

    # What a message stands on.

    def _ports(self, link: Link, gate: Gate) -> Ports:
        return Ports(
            state=self._state,
            ledger=self._ledger,
            store=self._store,
            pull=self._puller(link),
            gate=gate,
            worker=self._worker,
            work=self._home.work,
            tick=lambda: self._tick(link),
            clock=self._clock,
        )

    def _puller(self, link: Link) -> Callable[[str, int], Path]:
        return lambda digest, limit: link.pull(digest, self._store, max_bytes=limit)

    def _tick(self, link: Link) -> None:
        """While the worker works: look whether to stop, and let the coordinator know that we are there."""
        if self._stop.is_set():
            raise Stopped
        if time.monotonic() - self._beat < HEARTBEAT_SECONDS:
            return
        self._beat = time.monotonic()
        try:
            other = link.poll(0.0)
        except (ConnectError, VerificationError, StateError):
            return  # The vector is worth finishing; the line is looked at when it is needed.
        if other is not None and other not in self._inbox:
            self._inbox.append(other)

    def _offer_desk(self, ports: Ports) -> OfferDesk:
        return OfferDesk(
            state=self._state,
            ledger=self._ledger,
            pull=ports.pull,
            view=lambda: self._view("sign"),
            auto_sign=lambda: policy.load(self._home.policy).auto_sign,
            signing_key=self._key,
            waiting=self._waiting,
        )

    def _view(self, stage: Stage) -> OrgView:
        return org_view(
            self._us,
            policy=policy.load(self._home.policy),
            ledger=self._ledger,
            rosters=self._rosters,
            signing_key=self._key,
            stage=stage,
            now=self._clock(),
        )

    def _known(self, charter_digest: str, run: str) -> CharterRecord:
        record = self._state.charter(charter_digest)
        if record.run != run:
            raise VerificationError(f"expected charter {charter_digest[:12]} in run {record.run}, got it in {run}")
        return record

    def _seat(self, charter_digest: str, run: str, ports: Ports) -> Seat:
        """Our seat in a run that we signed and that is not over."""
        record = self._known(charter_digest, run)
        if record.state not in ("signed", "agreed"):
            raise PolicyRefused(3, f"expected a charter that we signed and that goes on, this one is {record.state}")
        if charter_digest not in self._seats:
            data = ports.pull(charter_digest, MAX_CHARTER_BYTES).read_bytes()
            self._seats[charter_digest] = self._make_seat(data, record)
        return self._seats[charter_digest]

    def _make_seat(self, data: bytes, record: CharterRecord) -> Seat:
        def check(agreement: Agreement, spends: bool) -> None:
            view = self._view("round")
            if not spends:
                view = replace(view, budget=_nothing_to_cover)
            check_charter(data, record.digest, record.operator_signature, view, stage="round", agreement=agreement)

        charter, rules = Charter.parse(data), policy.load(self._home.policy)
        split_key = self._home.split_key(rules.dataset_for(charter.purpose).namespace)
        return take_seat(charter, record.run, self._us, rules=rules, split_key=split_key, check=check)


def _nothing_to_cover(charter: Charter, mine: Participant) -> None:
    """The ledger's part of check 10 where nothing is spent."""


def refusal_of(error: FoedusError) -> int | None:
    """What leaves instead of a vector: a failed check's number, or nothing where the trouble is our own.

    Raises:
        FoedusError: The same error again, where the message is to be tried again.
    """
    if isinstance(error, PolicyRefused):
        return error.step
    if isinstance(error, PrivacyCheckFailed):
        return 10
    if isinstance(error, VerificationError):
        return 8
    if isinstance(error, DataError | CheckpointError | ConfigError | RoundFailed | StateError | UsageError):
        return None
    raise error
