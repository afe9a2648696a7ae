"""The daemon's end of its worker: start, ask, restart.

The worker is a child started by ``exec`` on one end of a socket pair; every other descriptor of the daemon (database,
link sockets) is closed in it. Messages are byte strings with a maximal length: ``Connection.recv`` would unpickle.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess  # nosec B404
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from foedus_protocols import errors
from foedus_protocols.errors import FoedusError, PolicyRefused, RoundFailed
from foedus_protocols.files import DiskTrouble, disk_errors

from foedus_client.work import (
    MAX_TASK_BYTES,
    CheckReply,
    CheckTask,
    EvaluateReply,
    EvaluateTask,
    Reply,
    Request,
    Setup,
    SetupReply,
    Task,
    Tick,
    TrainReply,
    TrainTask,
)

_LOG = logging.getLogger("foedus.client")
_WAIT_SECONDS = 1.0
_STOP_SECONDS = 5.0
_LOAD_SECONDS = 1800.0
"""What a base may take to load, whatever the deadline of the order that it is loaded for: the next order uses it."""
_ATTEMPTS = 4  # A task that kills its process each time (memory) is given up; one that was killed from outside is not.

# What a worker may know of its surroundings. Proxies, tokens and the like are not in the list.
_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CC", "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "FOEDUS_THREADS", "FOEDUS_DEVICE", "FOEDUS_DTYPE",
    "FOEDUS_ATTENTION", "FOEDUS_CHECKPOINTING", "FOEDUS_EXPERTS", "FOEDUS_STREAMING", "FOEDUS_UNITS_A_FORWARD",
)  # fmt: skip

R = TypeVar("R", bound=Task)


class WorkerLost(Exception):
    """The worker's process ended while it was asked something."""


class WorkerProcess:
    """A worker that is started when it is first needed and again after it died.

    Guarantees:
        The child gets the work folder, the base's path, the data files' paths and the split key in its setup, and no
        identity or link key. (Keeping it from reading key files by itself is not done in this version.)
    """

    def __init__(
        self,
        work: Path,
        *,
        stderr: Path | None = None,
        command: Sequence[str] = (sys.executable, "-m", "foedus_client.worker"),
    ) -> None:
        self._work = work
        self._stderr = stderr
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._setup: Setup | None = None
        self._loading: Setup | None = None
        self._loading_since = 0.0

    @property
    def pid(self) -> int | None:
        """The child's process id, None while none runs."""
        return None if self._process is None else self._process.pid

    def check(self, setup: Setup, task: CheckTask, tick: Tick) -> CheckReply:
        """Run the sensitivity and noise checks."""
        return self._ask(setup, "check", task, CheckReply, tick)

    def train(self, setup: Setup, task: TrainTask, tick: Tick) -> TrainReply:
        """Write one vector."""
        return self._ask(setup, "train", task, TrainReply, tick)

    def evaluate(self, setup: Setup, task: EvaluateTask, tick: Tick) -> EvaluateReply:
        """Score held-out units."""
        return self._ask(setup, "evaluate", task, EvaluateReply, tick)

    def stop(self) -> None:
        """End the child; it is killed if it does not leave by itself, as a frozen one does not."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._connection = self._setup = self._loading = None

    def _ask(self, setup: Setup, kind: str, task: Task, answer: type[R], tick: Tick) -> R:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._load(setup, tick)
                return self._exchange(kind, task, answer, tick)
            except WorkerLost:
                self.stop()
                _LOG.warning("the worker's process ended during %s (attempt %d of %d)", kind, attempt, _ATTEMPTS)
        raise RoundFailed(
            f"expected the worker to finish {kind}, its process ended {_ATTEMPTS} times; "
            "see worker.log in the client's home (out of memory?)"
        )

    def _load(self, setup: Setup, tick: Tick) -> None:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._start()
        if self._setup == setup:
            return
        if self._loading is not None and self._loading != setup:
            self.stop()
            self._start()
        self._setup = None
        if self._loading is None:
            self._send("setup", setup)
            self._loading, self._loading_since = setup, time.monotonic()
        answer = self._wait(tick, keep=self._goes_on_loading)
        self._loading = None
        reply = _read(answer, SetupReply)
        self._setup = setup
        _LOG.info(
            "worker ready on %s: %d units to train on, %d held out",
            reply.device,
            reply.train_units,
            reply.heldout_units,
        )

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        with ExitStack() as stack:
            stack.callback(theirs.close)
            stack.enter_context(disk_errors(self._work))
            stderr = None if self._stderr is None else stack.enter_context(self._stderr.open("ab"))
            # Until the descriptor has another owner it is closed here.
            kept = stack.enter_context(closing(ours))
            # This program's own module, without a shell.
            self._process = subprocess.Popen(  # nosec B603
                [*self._command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environment,
                cwd=self._work,
            )
            self._connection = Connection(kept.detach())

    def _exchange(self, kind: str, task: Task, answer: type[R], tick: Tick) -> R:
        self._send(kind, task)
        return _read(self._wait(tick, keep=lambda: False), answer)

    def _send(self, kind: str, task: Task) -> None:
        request = Request.model_validate({"kind": kind, "body": task.encode().decode()})
        if self._connection is None:
            raise WorkerLost
        try:
            self._connection.send_bytes(request.encode())
        except OSError as error:
            raise WorkerLost from error

    def _wait(self, tick: Tick, *, keep: Callable[[], bool]) -> Reply:
        """Wait for the reply to what was sent. `tick` may give up; `keep` says whether the child lives on then."""
        connection = self._connection
        if connection is None:
            raise WorkerLost
        try:
            while not connection.poll(_WAIT_SECONDS):
                tick()
            return Reply.decode(connection.recv_bytes(MAX_TASK_BYTES))
        except (EOFError, OSError) as error:
            raise WorkerLost from error
        except BaseException:
            # A child at work on what nobody waits for must not answer the next question with it.
            if not keep():
                self.stop()
            raise

    def _goes_on_loading(self) -> bool:
        """Whether a child that is not ready at the deadline may be: else a slow base would be loaded for ever anew."""
        if time.monotonic() - self._loading_since > _LOAD_SECONDS or self.pid is None:
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
        except OSError:
            return True  # No such file on this system: nobody can tell a frozen process, and the limit holds.


def _read(reply: Reply, answer: type[R]) -> R:
    if reply.error is not None:
        raise error_of(reply)
    return answer.decode((reply.body or "").encode())


def error_of(reply: Reply) -> FoedusError:
    """The worker's error, as the same class of the tree."""
    if reply.error == DiskTrouble.__name__:
        return DiskTrouble(reply.text)
    kind = getattr(errors, reply.error or "", FoedusError)
    if not (isinstance(kind, type) and issubclass(kind, FoedusError)):
        return FoedusError(reply.text)
    if issubclass(kind, PolicyRefused):
        return kind(reply.step, reply.text)
    return kind(reply.text)
