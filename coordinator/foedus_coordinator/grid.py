"""Flower's `Grid` over our link: control messages through the durable mailbox, organisations as Flower nodes.

A Flower message carries one `ConfigRecord` named ``foedus``: the type, run, round and attempt of a control message and
its body's canonical bytes (`foedus_protocols.messages`). `push_messages` signs each as an envelope and queues it; a
message that a resumed run pushes again is the one that is queued already. `pull_messages` gives the answers that have
been stored, as often as asked. Vectors and adapters travel beside this, named by digest.

`Message` is built from `Metadata`, since the plain constructor reads a process-wide identity that only Flower's own
SuperLink sets. Time to live is ignored: deadlines are judged by the coordinator's clock (`rounds.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.envelope import Envelope, seal
from foedus_protocols.errors import StateError
from foedus_protocols.identity import COORDINATOR
from foedus_protocols.messages import Body

from foedus_coordinator.mailbox import Mailbox, Question
from foedus_coordinator.members import Members
from foedus_coordinator.storage import Storage

# Flower reads both when it is imported, and the command line may not have been what started us.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

RECORD = "foedus"
COORDINATOR_NODE = 1 << 62  # Far from the organisations' node ids, which the database counts from 1.
FLOWER_TYPES = {
    "charter": "query.charter",
    "train": "train",
    "advance": "query.advance",
    "evaluate": "evaluate",
    "close": "query.close",
}
_TTL_SECONDS = 30 * 24 * 3600.0
_POLL_SECONDS = 1.0


class LinkGrid(Grid):
    """The organisations of a federation, as one run sees them."""

    def __init__(
        self,
        *,
        storage: Storage,
        mailbox: Mailbox,
        members: Members,
        key: Ed25519PrivateKey,
        federation: str,
        run_name: str,
        orgs: Iterable[str],
    ) -> None:
        self._storage = storage
        self._mailbox = mailbox
        self._key = key
        self._federation = federation
        self._run_name = run_name
        self._nodes = {org: members.node_of(org) for org in orgs}
        self._orgs = {node: org for org, node in self._nodes.items()}
        self._run: Run | None = None

    # Flower's interface

    def set_run(self, run: Run) -> None:
        """Keep Flower's own description of the run, which nothing here reads."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run.

        Raises:
            StateError: Nobody set one.
        """
        if self._run is None:
            raise StateError("expected set_run to have been called before run is read; it was not")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return _message(
            content,
            message_id="",
            source=COORDINATOR_NODE,
            target=dst_node_id,
            reply_to="",
            group=group_id,
            message_type=message_type,
        )

    def get_node_ids(self) -> Iterable[int]:
        """The node ids of the run's organisations."""
        return list(self._orgs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sign and queue messages; durable when this returns.

        Returns:
            The digests of the queued envelopes, in the messages' order.
        """
        return self._mailbox.queue(dict(self._sealer(message) for message in messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have come to these messages, in no particular order."""
        return [self._reply(digest, answer) for digest, answer in self._mailbox.answers(message_ids).items()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, and pull their answers until all are there or `timeout` seconds are over."""
        ids = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            since = self._storage.generation
            replies = list(self.pull_messages(ids))
            left = _POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if len(replies) == len(ids) or left <= 0:
                return replies
            self._storage.wait(min(left, _POLL_SECONDS), since=since)

    # What the round's steps use

    def message(self, org: str, kind: str, body: Body, *, round: int = 0, attempt: int = 0) -> Message:
        """A control message to one organisation."""
        record = ConfigRecord({"type": kind, "round": round, "attempt": attempt, "body": body.encode()})
        content = RecordDict({RECORD: record})
        return self.create_message(content, FLOWER_TYPES[kind], self._nodes[org], f"{round}.{attempt}")

    def sender(self, message: Message) -> str:
        """The organisation that a reply is from."""
        return self._orgs[message.metadata.src_node_id]

    @staticmethod
    def body(message: Message) -> bytes:
        """The canonical bytes of a message's body."""
        return bytes(_record(message)["body"])

    def _sealer(self, message: Message) -> tuple[Question, Callable[[int], tuple[str, bytes]]]:
        """What a message is about, and what makes its envelope."""
        record = _record(message)
        org = self._orgs[message.metadata.dst_node_id]
        question = Question(
            run=self._run_name,
            round=int(record["round"]),
            attempt=int(record["attempt"]),
            type=str(record["type"]),
            org=org,
        )

        def sealed(sequence: int) -> tuple[str, bytes]:
            envelope = seal(
                self._key,
                type=question.type,
                federation=self._federation,
                run=question.run,
                round=question.round,
                attempt=question.attempt,
                sender=COORDINATOR,
                receiver=org,
                sequence=sequence,
                body=bytes(record["body"]),
            )
            return envelope.digest, envelope.encode()

        return question, sealed

    def _reply(self, digest: str, answer: bytes) -> Message:
        # The signature was checked when the answer was delivered (`service.py`); here it only changes its clothes.
        envelope = Envelope.decode(answer)
        header = envelope.header
        record = {"type": header.type, "round": header.round, "attempt": header.attempt, "body": envelope.body}
        return _message(
            RecordDict({RECORD: ConfigRecord(record)}),
            message_id=envelope.digest,
            source=self._nodes[header.sender],
            target=COORDINATOR_NODE,
            reply_to=digest,
            group=f"{header.round}.{header.attempt}",
            message_type=FLOWER_TYPES[header.type],
        )


def _record(message: Message) -> ConfigRecord:
    record: ConfigRecord = message.content.config_records[RECORD]
    return record


def _message(
    content: RecordDict, *, message_id: str, source: int, target: int, reply_to: str, group: str, message_type: str
) -> Message:
    metadata = Metadata(
        run_id=0,
        message_id=message_id,
        src_node_id=source,
        dst_node_id=target,
        reply_to_message_id=reply_to,
        group_id=group,
        created_at=time.time(),
        ttl=_TTL_SECONDS,
        message_type=message_type,
    )
    return Message(content, metadata=metadata)
