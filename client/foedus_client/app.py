"""Flower's `ClientApp` in the worker: it binds `train` and `evaluate`, and nothing else.

A Flower message carries one `ConfigRecord` named ``foedus`` with the task as JSON bytes; vectors lie in files beside
it. The logic is in `session.py`, which knows nothing of Flower, so that the same two apps run over our link and in
Flower's own simulation.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from foedus_client.session import Session
from foedus_client.work import EvaluateTask, Task, TrainTask

RECORD = "foedus"


def build_app(session: Session) -> ClientApp:
    """The app over a loaded session."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = TrainTask.decode(body_of(message))
        return Message(content_of(session.train(task)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        task = EvaluateTask.decode(body_of(message))
        return Message(content_of(session.evaluate(task)), reply_to=message)

    return app


def content_of(task: Task) -> RecordDict:
    """A task or reply as a message's content."""
    return RecordDict({RECORD: ConfigRecord({"body": task.encode()})})


def body_of(message: Message) -> bytes:
    """The task's or reply's bytes in a message."""
    return bytes(message.content[RECORD]["body"])
