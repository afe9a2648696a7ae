"""The worker: the child process that holds the base model and the data, and no keys.

``python -m foedus_client.worker FD PARENT`` answers on one end of a socket pair until the other end closes. A `train`
or `evaluate` task becomes a Flower `Message` for the `ClientApp` of `app.py`; `setup` and `check` are between the
daemon and its worker alone. Messages are JSON of bounded length, never pickle. When the daemon dies, so does the
worker, also in the middle of a step and also a frozen one (the kernel sees to it), and the next worker begins when the
folder's lock is free: two workers must not write into one work folder.

An error of our own tree crosses with its text, which by the house's rule holds no record. Of any other exception only
the class crosses, and the log gets the stack without its message: a library's text may quote what it choked on.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from foedus_protocols.errors import FoedusError, PolicyRefused, StateError
from foedus_protocols.files import disk_trouble
from foedus_protocols.logs import frames_of, setup

from foedus_client.app import body_of, build_app, content_of
from foedus_client.session import Session
from foedus_client.tether import alone, leave_with
from foedus_client.work import MAX_TASK_BYTES, CheckTask, EvaluateTask, Reply, Request, Setup, Task, TrainTask

_LOG = logging.getLogger("foedus.worker")
_TTL_SECONDS = 86_400.0


class Worker:
    """Answers requests one by one; the session and its app stay loaded between them."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._session: Session | None = None
        self._app: ClientApp | None = None

    def answer(self, data: bytes) -> bytes:
        """One request, one reply; no exception leaves."""
        try:
            request = Request.decode(data)
            body = self._dispatch(request)
        except PolicyRefused as error:
            return Reply(error=type(error).__name__, text=str(error), step=error.step).encode()
        except FoedusError as error:
            return Reply(error=type(error).__name__, text=str(error)).encode()
        except Exception as error:  # The daemon is told the class; the process lives on.
            if isinstance(error, OSError) and (trouble := disk_trouble(error, self._work)) is not None:
                return Reply(error=type(trouble).__name__, text=str(trouble)).encode()
            _LOG.error("unexpected: %s", frames_of(error))
            text = f"the worker stopped with an unexpected {type(error).__name__}; see worker.log"
            return Reply(error="RoundFailed", text=text).encode()
        return Reply(body=body.decode()).encode()

    def _dispatch(self, request: Request) -> bytes:
        data = request.body.encode()
        if request.kind == "setup":
            self.close()  # The old base goes before the new one comes.
            session = Session.load(Setup.decode(data), work=self._work)
            self._session, self._app = session, build_app(session)
            return session.describe().encode()
        if self._session is None or self._app is None:
            raise StateError("expected a setup before anything else is asked of the worker")
        if request.kind == "check":
            return self._session.check(CheckTask.decode(data)).encode()
        if request.kind == "train":
            return run_app(self._app, "train", TrainTask.decode(data))
        return run_app(self._app, "evaluate", EvaluateTask.decode(data))

    def close(self) -> None:
        """Let go of the session and end what copies experts beside it; any number of times."""
        session, self._session, self._app = self._session, None, None
        if session is None:
            return
        session.close()
        del session
        gc.collect()  # A model refers to itself: its memory and its mapped files would stay until a collection.


def run_app(app: ClientApp, message_type: str, task: Task) -> bytes:
    """Call a `ClientApp` with a task as a Flower message, and return the reply's body."""
    metadata = Metadata(
        run_id=0,
        message_id=uuid.uuid4().hex,
        src_node_id=0,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=_TTL_SECONDS,
        message_type=message_type,
    )
    context = Context(run_id=0, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return body_of(app(Message(content_of(task), metadata=metadata), context))


def serve(connection: Connection, answer: Callable[[bytes], bytes]) -> None:
    """Answer until the other end closes."""
    while True:
        try:
            data = connection.recv_bytes(MAX_TASK_BYTES)
        except (EOFError, ConnectionResetError):
            return
        reply = answer(data)
        try:
            connection.send_bytes(reply)
        except BrokenPipeError:
            return


def main(arguments: list[str]) -> int:
    """Serve on a socket's descriptor, for as long as the process that is named beside it lives.

    It ends in order, with what copies beside it, when the other end closes and on SIGTERM, in the middle of a step too.
    """
    setup()
    signal.signal(signal.SIGTERM, _leave)
    leave_with(int(arguments[1]))
    with alone(Path.cwd()), closing(Worker(Path.cwd())) as worker:
        serve(Connection(int(arguments[0])), worker.answer)
    return 0


def _leave(*_: object) -> NoReturn:
    """End in order, once: a second SIGTERM must not interrupt the closing. The daemon kills what does not end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
