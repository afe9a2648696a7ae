"""The long-running process of an organisation: it dials the coordinator, answers what it asks, and runs a worker.

One loop: poll, open the envelope, act, pass the gate, deliver. Each message is answered once; the answer is on disk
before it leaves, and leaves again as it is when the message comes again. A broken line is not an error: the loop
dials again, with patience and jitter. Nor is a full disk: the loop says so once, and tries again. A message that cannot
be answered is put aside while others go on. Nothing listens here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from foedus_protocols.backoff import Backoff, start_when_there_is_space
from foedus_protocols.channel import split_address
from foedus_protocols.envelope import Envelope, open_envelope, seal
from foedus_protocols.errors import ConfigError, ConnectError, FoedusError, StateError, VerificationError
from foedus_protocols.files import DiskTrouble, disk_trouble
from foedus_protocols.identity import COORDINATOR, load_signing_key
from foedus_protocols.link_client import LinkClient
from foedus_protocols.logs import frames_of
from foedus_protocols.manifest import read_config
from foedus_protocols.proxy import choose
from foedus_protocols.store import FileStore

from foedus_client import policy
from foedus_client.answers import Answer, Answers
from foedus_client.clock import Clock
from foedus_client.config import Home, Membership
from foedus_client.gate import Gate
from foedus_client.greeting import Greeter, greet
from foedus_client.later import Later
from foedus_client.life import Heartbeat
from foedus_client.lock import HomeLock
from foedus_client.receipts import open_ledger
from foedus_client.scratch import sweep
from foedus_client.seat import Ports
from foedus_client.slots import Held
from foedus_client.state import ClientState
from foedus_client.work import WorkerPort
from foedus_client.worker_process import WorkerProcess

_LOG = logging.getLogger("foedus.client")

POLL_SECONDS = 15.0
HELLO_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
STOP_SECONDS = 0.5
POISON_FAILURES = 5
"""After so many failures a message is answered with nothing, where its type has such an answer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
_TROUBLE_PAUSE = 60.0
_REPEAT_SECONDS = 300.0
_STALE_PART_SECONDS = 7 * 86_400.0
_IDLE = "waiting for messages"


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

    def reload(self) -> None:
        """Read our TLS files again."""

    def close(self) -> None:
        """Hang up."""


def run(home: Home, stop: threading.Event, *, worker: WorkerPort | None = None) -> None:
    """Be the organisation's daemon until `stop` is set. A full disk at the start is waited out.

    Args:
        home: A joined organisation's home.
        stop: Set from a signal handler or another thread.
        worker: What trains; a child process of our own where absent.

    Raises:
        StateError: Not joined, another daemon has this home, or the ledger is gone.
        ConfigError: Policy, keys or certificate are not usable.
    """
    us = home.membership()
    proxy = choose(home.load().proxy, split_address(us.link)[0])
    by = "directly" if proxy is None else f"through the proxy {proxy.shown} (from {proxy.source})"
    _LOG.info("dialling %s %s", us.link, by)

    def serve() -> None:
        home.make()
        sweep(home.root)
        policy.load(home.policy)
        with HomeLock(home.lock), ClientState(home.state) as state:
            child = WorkerProcess(home.work, stderr=home.worker_log)
            try:
                daemon = Daemon(home, us, state=state, worker=worker or child, stop=stop)
                daemon.serve(lambda: LinkClient(us.link, home.tls, proxy=us.proxy))
            finally:
                child.stop()

    start_when_there_is_space(serve, stop=stop, say=_LOG.error)


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
        self._key = load_signing_key(home.signing_key)
        self._clock = Clock()
        self._ledger = open_ledger(home.ledger, state, clock=self._clock)
        self._store = FileStore(home.files)
        self._store.drop_parts(older_than_seconds=_STALE_PART_SECONDS)
        self._answers = Answers(
            home=home, us=us, state=state, ledger=self._ledger, signing_key=self._key, clock=self._clock
        )
        self._receipts = 0
        self._inbox: deque[bytes] = deque()
        self._later = Later()
        self._heart = Heartbeat(state)
        self._complaint = _Complaint()
        self._beat = 0.0

    # The loop.

    def serve(self, dial: Callable[[], Link]) -> None:
        """Connect, answer, and connect again, until told to stop.

        Raises:
            ConfigError: The first time that it dials: address, proxy or key files are not usable.
        """
        self._heart.started()
        backoff, dialled = Backoff(_FIRST_PAUSE, _TROUBLE_PAUSE), False
        while not self._stop.is_set():
            longest = _TROUBLE_PAUSE
            try:
                with self._open(dial()) as link:
                    dialled = True
                    self.greet(link)
                    backoff.reset()
                    self._answer_all(link)
            except Stopped:
                break
            except ConnectError as error:
                longest = _LONGEST_PAUSE
                self._say(logging.WARNING, str(error))
            except ConfigError as error:
                if not dialled:
                    raise
                self._say(logging.ERROR, str(error))
            except FoedusError as error:  # What the other side says, and a full disk, are no reason to end here.
                self._say(logging.ERROR, str(error))
                backoff.at_least(_LONGEST_PAUSE)
            except Exception as error:  # Nor is a defect: the process is what keeps the organisation's state.
                self._say(logging.ERROR, f"unexpected: {frames_of(error)}")
                backoff.at_least(_LONGEST_PAUSE)
            self._heart.disconnected()
            self._stop.wait(backoff.pause(longest))
        self._heart.disconnected()

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
        """Introduce ourselves, and learn who is a member and what was spent (`greeting.py`).

        Raises:
            VerificationError: The coordinator is not the one that we joined, or contradicts what was seen.
            StateError: The ledger does not know what was spent: nothing is answered before a person has said it.
        """
        greeter = Greeter(home=self._home, us=self._us, state=self._state, ledger=self._ledger, clock=self._clock)
        greeted = greet(greeter, hello=link.hello, reload=link.reload, pull=self._puller(link), receipts=self._receipts)
        first = not self._answers.rosters
        self._answers.rosters, self._receipts = greeted.rosters, greeted.receipts
        self._inbox.clear()
        self._later.let_go()
        self._heart.connected()
        if self._complaint.settled() or first:
            _LOG.info("connected to %s, %d members", self._us.federation, len(greeted.rosters[-1].members))

    def _answer_all(self, link: Link) -> None:
        greeted = time.monotonic()
        self._heart.doing(_IDLE)
        while not self._stop.is_set():
            if time.monotonic() - greeted > HELLO_SECONDS:
                self.greet(link)
                greeted = time.monotonic()
            data = self._next(link)
            if data is not None:
                self.handle(data, link)
                self._heart.doing(_IDLE)

    def _next(self, link: Link) -> bytes | None:
        """The next message to look at: one that was put aside and is due, one that came meanwhile, or a new one."""
        if (due := self._later.due()) is not None:
            return due
        if self._inbox:
            data: bytes | None = self._inbox.popleft()
        else:
            soonest = self._later.soonest()
            data = link.poll(POLL_SECONDS if soonest is None else min(POLL_SECONDS, soonest))
            self._heart.contact()
        return None if data is None or self._later.waits(data) else data

    # One message.

    def handle(self, data: bytes, link: Link) -> None:
        """Answer one message, once; or put it aside where it cannot be answered now.

        Raises:
            ConnectError: The line broke; the message will come again.
            DiskTrouble: The disk does not do its part; the message will come again.
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
            failures = self._later.failed(data)
            _LOG.error("a message is not what it should be (seen %d times): %s", failures, error)
            return
        gate = Gate(link, self._state, clock=self._clock)
        try:
            stored = self._state.answer_to(envelope.digest) or self._make_answer(envelope, link, gate)
            if stored is None:
                return
            gate.send(stored)
            self._state.mark_delivered(envelope.digest)
        except (ConnectError, DiskTrouble, Stopped):
            raise
        except Held as held:
            self._later.put_aside(data, held.seconds)
        except OSError as error:
            if (trouble := disk_trouble(error, self._home.root)) is not None:
                raise trouble from error
            self._failed(data, envelope, gate, error)
        except Exception as error:  # One message must not end the daemon, nor hold up the others.
            self._failed(data, envelope, gate, error)
        else:
            self._later.done(data)

    def _make_answer(self, envelope: Envelope, link: Link, gate: Gate) -> bytes | None:
        """Act on a message and store its answer; None where a person has to decide first."""
        self._state.require_unused(envelope.header.sequence)
        answer = self._answers.to(envelope, self._ports(link, gate))
        return None if answer is None else self._store_answer(answer, envelope, gate)

    def _store_answer(self, answer: Answer, question: Envelope, gate: Gate) -> bytes:
        body, permit = answer
        gate.approve(body, permit=permit)
        header = question.header
        sealed = seal(
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
        )
        return self._state.save_answer(question.digest, header.sequence, sealed.encode())

    def _failed(self, data: bytes, envelope: Envelope, gate: Gate, error: Exception) -> None:
        """A message could not be answered: try again later, and in the end say that there is nothing to say."""
        header, failures = envelope.header, self._later.failed(data)
        # An error of our own tree holds no record; of any other only the class and the places leave this function.
        what = str(error) if isinstance(error, FoedusError) else f"unexpected: {frames_of(error)}"
        _LOG.error("%s of round %d cannot be answered (%d times): %s", header.type, header.round, failures, what)
        self._heart.trouble(f"{header.type} of {header.run}: {what}")
        # A policy that cannot be read is for a person to mend, and no word on the charter.
        if failures < POISON_FAILURES or (header.type == "charter" and isinstance(error, ConfigError)):
            return
        try:
            instead = self._answers.instead(envelope)
            if instead is not None and self._state.answer_to(envelope.digest) is None:
                gate.send(self._store_answer(instead, envelope, gate))
                self._state.mark_delivered(envelope.digest)
                self._later.done(data)
        except (VerificationError, StateError) as second:
            if isinstance(second, DiskTrouble):
                raise
            _LOG.error("%s of round %d is left unanswered: %s", header.type, header.round, second)

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
            doing=self._heart.doing,
            base_config=lambda digest: read_config(policy.load(self._home.policy).base_path(digest)),
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
        self._heart.contact()
        if other is not None and other not in self._inbox:
            self._inbox.append(other)

    def _say(self, level: int, what: str) -> None:
        """Log a trouble of the loop: once, and again while it goes on for long."""
        if self._stop.is_set():
            return
        self._heart.trouble(what)
        if self._complaint.is_new(what):
            _LOG.log(level, "%s", what)


class _Complaint:
    """The loop's last trouble, so that an outage of hours is not a line every five seconds."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._said = 0.0

    def is_new(self, what: str) -> bool:
        """Whether to say it (again)."""
        now = time.monotonic()
        if what == self._what and now - self._said < _REPEAT_SECONDS:
            return False
        self._what, self._said = what, now
        return True

    def settled(self) -> bool:
        """Nothing is wrong any more; returns whether something was."""
        was = self._what is not None
        self._what = None
        return was
