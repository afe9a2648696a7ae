"""The Flower app of a virtual organisation's worker, and the daemon's port to it.

Flower's engine runs a `ClientApp` in Ray actors, as many at a time as there are cores or GPUs; a virtual organisation
has no process of its own, so that hundreds fit on one machine. The app is the worker's own (`foedus_client.app`): here
it is only given the session that a message asks for, which an actor keeps while it lives. An error of our tree crosses
as it does between a daemon and its worker: class, text and step, never a record.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from foedus_client.app import RECORD, body_of, build_app
from foedus_client.session import Session
from foedus_client.work import (
    CheckReply,
    CheckTask,
    EvaluateReply,
    EvaluateTask,
    Reply,
    Setup,
    Task,
    Tick,
    TrainReply,
    TrainTask,
)
from foedus_client.worker_process import error_of
from foedus_protocols.errors import FoedusError, PolicyRefused, RoundFailed

SETUP = "setup"
_SESSIONS = 2  # Bases that one actor keeps: each is a whole model.
_POLL_SECONDS = 0.05
_MESSAGE_TYPES = {"train": "train", "evaluate": "evaluate", "check": "query.check"}

R = TypeVar("R", bound=Task)
_sessions: OrderedDict[tuple[bytes, str], Session] = OrderedDict()


# In the actor


def client_app() -> ClientApp:
    """The app that Flower's engine gets: one for all virtual organisations, since a message carries its setup."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, context)

    @app.query("check")
    def check(message: Message, context: Context) -> Message:
        return _answer(message, context)

    return app


def _answer(message: Message, context: Context) -> Message:
    try:
        session = _session(message)
        if message.metadata.message_type == _MESSAGE_TYPES["check"]:
            body = session.check(CheckTask.decode(body_of(message))).encode()
        else:
            body = body_of(build_app(session)(message, context))
        reply = Reply(body=body.decode())
    except PolicyRefused as error:
        reply = Reply(error=type(error).__name__, text=str(error), step=error.step)
    except FoedusError as error:
        reply = Reply(error=type(error).__name__, text=str(error))
    except Exception as error:  # The engine would send the text of any exception, which may hold data.
        reply = Reply(error="RoundFailed", text=f"the virtual worker stopped with an unexpected {type(error).__name__}")
    return Message(RecordDict({RECORD: ConfigRecord({"body": reply.encode()})}), reply_to=message)


def _session(message: Message) -> Session:
    """The session that a message's setup asks for; an actor keeps the last few."""
    record = message.content[SETUP]
    key = (bytes(record["body"]), str(record["work"]))
    if key not in _sessions:
        _sessions[key] = Session.load(Setup.decode(key[0]), work=Path(key[1]))
    _sessions.move_to_end(key)
    while len(_sessions) > _SESSIONS:
        _, oldest = _sessions.popitem(last=False)
        oldest.close()
    return _sessions[key]


# At the daemon


class Engine:
    """Flower's grid of virtual nodes, shared by the daemons' threads. The `ServerApp` hands it over when it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._grid: Grid | None = None
        self._nodes: list[int] = []
        self.failed = threading.Event()

    def attach(self, grid: Grid, count: int) -> None:
        """Take Flower's grid, once it knows `count` virtual nodes."""
        while len(nodes := sorted(grid.get_node_ids())) < count:
            time.sleep(_POLL_SECONDS)
        self._grid, self._nodes = grid, nodes
        self._ready.set()

    def ask(self, index: int, kind: str, setup: Setup, work: Path, task: Task, answer: type[R], tick: Tick) -> R:
        """Have the node of an organisation do a task.

        Raises:
            FoedusError: The session's own error, or a RoundFailed where the engine answered with something else.
        """
        while not self._ready.wait(_POLL_SECONDS):
            tick()
        content = RecordDict(
            {
                RECORD: ConfigRecord({"body": task.encode()}),
                SETUP: ConfigRecord({"body": setup.encode(), "work": str(work)}),
            }
        )
        message = Message(content, dst_node_id=self._nodes[index], message_type=_MESSAGE_TYPES[kind])
        reply = Reply.decode(self._exchange(message, tick))
        if reply.error is not None:
            raise error_of(reply)
        return answer.decode((reply.body or "").encode())

    def _exchange(self, message: Message, tick: Tick) -> bytes:
        grid = self._grid
        if grid is None:
            raise RoundFailed("expected Flower's engine to run, it does not")
        with self._lock:
            (identity,) = grid.push_messages([message])
        while True:
            with self._lock:
                replies = list(grid.pull_messages([identity]))
            if replies:
                break
            tick()
            time.sleep(_POLL_SECONDS)
        if replies[0].has_error():
            raise RoundFailed(
                f"expected an answer of a virtual node, Flower's engine gave error {replies[0].error.code}"
            )
        return body_of(replies[0])


class VirtualWorker:
    """A daemon's worker that is a node of Flower's engine (`work.WorkerPort`)."""

    def __init__(self, engine: Engine, index: int, work: Path) -> None:
        self._engine = engine
        self._index = index
        self._work = work

    def check(self, setup: Setup, task: CheckTask, tick: Tick) -> CheckReply:
        """Run the sensitivity and noise checks."""
        return self._engine.ask(self._index, "check", setup, self._work, task, CheckReply, tick)

    def train(self, setup: Setup, task: TrainTask, tick: Tick) -> TrainReply:
        """Write one vector."""
        return self._engine.ask(self._index, "train", setup, self._work, task, TrainReply, tick)

    def evaluate(self, setup: Setup, task: EvaluateTask, tick: Tick) -> EvaluateReply:
        """Score held-out units."""
        return self._engine.ask(self._index, "evaluate", setup, self._work, task, EvaluateReply, tick)
