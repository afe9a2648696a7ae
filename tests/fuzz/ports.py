"""The two ports and the link's client, over real TLS, with bytes in the place of messages.

Messages are handed to gRPC as bytes, so what is wrong reaches the generated parsers and the real handlers the way a
stranger's would: `LinkDesk` and `EnrolmentDesk` over a database, with a charter that waits for an answer and a round
that waits for vectors. The client is given a coordinator that answers with anything. A stream is one input too: each
message with its length before it.
"""

from __future__ import annotations

import logging
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from coordinator.conftest import FEDERATION, ORGS, draw
from foedus_coordinator.config import Config, Home
from foedus_coordinator.executor import link_desk, run_of
from foedus_coordinator.service import EnrolmentDesk
from foedus_protocols import link as link_module
from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.certificates import make_request
from foedus_protocols.channel import (
    MAX_MESSAGE_BYTES,
    TlsFiles,
    bind,
    client_credentials,
    client_options,
    server_credentials,
    server_options,
)
from foedus_protocols.charter import sign_charter
from foedus_protocols.enrolment import COLLECT_CONTEXT, EnrolmentRequest, serve_enrolment
from foedus_protocols.envelope import Envelope, seal
from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import MINOR, PROTOCOL, HelloRequest
from foedus_protocols.identity import COORDINATOR, generate_signing_key, generate_tls_key, public_hex, save_key, sign
from foedus_protocols.link import LinkClient, serve_link
from foedus_protocols.messages import CharterAnswer, CharterOffer
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.store import FileStore
from foedus_protocols.v1 import enrolment_pb2, envelope_pb2, link_pb2
from fuzz import mutate
from fuzz.watch import Target

NAMES = (
    "link-hello", "link-poll", "link-deliver", "link-push", "link-pull", "enrol", "collect",
    "client-hello", "client-poll", "client-push", "client-pull",
)  # fmt: skip

_ORG = ORGS[0]
_CALL_SECONDS = 90.0  # More than what `watch.py` calls a hang.
_REFUSALS = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
}
_CLIENT_BYTES = 5000
_LINK, _ENROLMENT = "/foedus.v1.Link/", "/foedus.v1.Enrolment/"


def targets(scratch: Path, stack: ExitStack) -> Iterator[Target]:
    """Both ports, then the client; `stack` closes them."""
    federation = _Federation.make(scratch / "federation")
    stack.callback(federation.home.storage.close)
    logged = stack.enter_context(_failures())
    yield from _link(federation, stack, logged)
    yield from _enrolment(federation, stack, logged)
    yield from _client(federation, scratch, stack)


@dataclass(kw_only=True)
class _Federation:
    """A coordinator's home with three members, a charter that was offered to them, and a round that is open."""

    home: Home
    tls: TlsFiles
    keys: dict[str, Any]
    run: str = ""
    charter: Any = None

    @classmethod
    def make(cls, root: Path) -> _Federation:
        config = Config(federation=FEDERATION, address="127.0.0.1", link_port=0, enrolment_port=0, listen="127.0.0.1")
        home = Home.create(root / "home", config)
        keys = {org: generate_signing_key() for org in ORGS}
        tls = TlsFiles(certificate=root / "tls.pem", key=root / "tls.key", ca=root / "ca.pem")
        for org, key in keys.items():
            tls_key = generate_tls_key()
            token = home.members.invite(org)
            csr = make_request(tls_key, org)
            asked = home.members.request(org, token, csr_pem=csr, signing_key=public_hex(key))
            home.members.approve(asked, authority=home.authority, key=home.operator_key)
            if org == _ORG:
                save_key(tls.key, tls_key)
                tls.certificate.write_bytes(home.members.find(asked.id).certificate_pem or b"")
                tls.ca.write_bytes(home.authority.pem)
        made = cls(home=home, tls=tls, keys=keys)
        made._offer()
        return made

    def _offer(self) -> None:
        charter = draw(self.home)
        self.charter, self.run = charter, f"{charter.name}-{charter.digest[:8]}"
        signature = sign_charter(self.home.operator_key, charter.digest)
        self.home.files.put_bytes(charter.canonical())
        self.home.storage.add_run(
            self.run,
            charter_digest=charter.digest,
            operator_signature=signature,
            base_config=b"{}",
            orgs=list(ORGS),
            files=[charter.digest],
        )
        run = run_of(self.home, self.home.storage.run(self.run), stop=threading.Event(), say=lambda line: None)
        run.ask(
            "charter", dict.fromkeys(ORGS, CharterOffer(charter_digest=charter.digest, operator_signature=signature))
        )
        self.home.storage.add_round(
            self.run,
            1,
            deadline=time.time() + 1e6,
            start_digest=charter.adapter.initial_digest,
            history_digest="0" * 64,
        )


# The coordinator's ports


def _link(federation: _Federation, stack: ExitStack, logged: list[BaseException]) -> Iterator[Target]:
    # A poll may wait this long however long it asks for; what waits longer hangs.
    earlier, link_module.MAX_POLL_SECONDS = link_module.MAX_POLL_SECONDS, 0.02
    stack.callback(setattr, link_module, "MAX_POLL_SECONDS", earlier)
    server = serve_link("127.0.0.1:0", link_desk(federation.home), federation.home.tls, stall_seconds=2.0)
    stack.callback(server.stop, 0.1)
    channel = _channel(f"127.0.0.1:{server.port}", client_credentials(federation.tls.read()), stack)
    hello = HelloRequest(protocol=PROTOCOL, minor=MINOR, version="0.2.0", org=_ORG)
    asked = Envelope.decode(link_desk(federation.home).poll(_ORG, 0.0) or b"")
    answer = CharterAnswer(signature=sign_charter(federation.keys[_ORG], federation.charter.digest))
    sealed = seal(
        federation.keys[_ORG], type="charter", federation=FEDERATION, run=federation.run, round=asked.header.round,
        attempt=asked.header.attempt, sender=_ORG, receiver=COORDINATOR, sequence=1, body=answer.encode(),
        reply_to=asked.digest,
    ).encode()  # fmt: skip
    unary = {
        "hello": (
            link_pb2.HelloRequest(body=canonical_bytes(hello.encode())),
            mutate.message(link_pb2.HelloRequest, {"body": mutate.canonical}),
        ),
        "poll": (link_pb2.PollRequest(wait_seconds=0.01), mutate.message(link_pb2.PollRequest, {})),
        "deliver": (
            link_pb2.DeliverRequest(envelope=sealed),
            mutate.message(
                link_pb2.DeliverRequest,
                {
                    "envelope": mutate.message(
                        envelope_pb2.Envelope, {"header": mutate.canonical, "body": mutate.canonical}
                    )
                },
            ),
        ),
    }
    for name, (valid, change) in unary.items():
        yield Target(
            name=f"link-{name}",
            seeds=[valid.SerializeToString()],
            mutate=change,
            parse=_unary(channel, _LINK + name.capitalize(), logged),
        )
    yield _push(federation, channel, logged)
    yield Target(
        name="link-pull",
        seeds=[link_pb2.PullRequest(digest=federation.charter.digest).SerializeToString()],
        mutate=mutate.message(link_pb2.PullRequest, {}),
        parse=_streamed(channel.unary_stream(_LINK + "Pull"), lambda data: data, logged),
    )


def _push(federation: _Federation, channel: grpc.Channel, logged: list[BaseException]) -> Target:
    size = federation.charter.coding().packed_bytes
    words = random.Random(1).randbytes(size)
    context = canonical_bytes({"run": federation.run, "round": 1, "attempt": 1})
    header = link_pb2.PushHeader(digest=digest(words), size=size, context=context)
    stream = [
        link_pb2.PushRequest(header=header).SerializeToString(),
        *(link_pb2.PushRequest(chunk=words[at : at + 1000]).SerializeToString() for at in range(0, size, 1000)),
    ]
    call = _streamed(channel.stream_stream(_LINK + "Push"), lambda data: iter(_unframed(data)), logged)
    parts = federation.home.vectors.root / "parts"

    def push(data: bytes) -> None:
        try:
            call(data)
        finally:
            if sum(path.stat().st_size for path in parts.iterdir()) > 8 * size:
                raise AssertionError("parts without end")

    return Target(
        name="link-push",
        seeds=[_framed(stream)],
        mutate=_stream(mutate.message(link_pb2.PushRequest, {"context": mutate.canonical})),
        parse=push,
    )


def _enrolment(federation: _Federation, stack: ExitStack, logged: list[BaseException]) -> Iterator[Target]:
    home = federation.home
    desk = EnrolmentDesk(
        members=home.members,
        federation=FEDERATION,
        operator_key=public_hex(home.operator_key),
        authorities=home.authorities,
        link_address="127.0.0.1:1",
    )
    server = serve_enrolment("127.0.0.1:0", desk, home.tls, attempts_per_minute=1e9)
    stack.callback(server.stop, 0.1)
    channel = _channel(f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(home.authority.pem), stack)
    key = generate_signing_key()
    csr = make_request(generate_tls_key(), "newcomer")
    token = home.members.invite("newcomer")
    request = EnrolmentRequest.make(org="newcomer", token=token, csr_pem=csr, signing_key=key)
    change = mutate.message(enrolment_pb2.EnrolRequest, {})

    def proved(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        """Half of the requests prove what they say, whatever it is."""
        data = change(rng, seeds)
        if rng.random() < 0.5:
            return data
        try:
            said = enrolment_pb2.EnrolRequest.FromString(data)
        except Exception:
            return data
        made = EnrolmentRequest.make(org=said.org, token=said.token, csr_pem=said.csr_pem, signing_key=key)
        return bytes(enrolment_pb2.EnrolRequest(**vars(made)).SerializeToString())

    yield Target(
        name="enrol",
        seeds=[enrolment_pb2.EnrolRequest(**vars(request)).SerializeToString()],
        mutate=proved,
        parse=_unary(channel, _ENROLMENT + "Enrol", logged),
    )
    kept = home.members.request("newcomer", token, csr_pem=csr, signing_key=public_hex(key))
    proof = sign(key, COLLECT_CONTEXT, kept.id.encode())
    yield Target(
        name="collect",
        seeds=[enrolment_pb2.CollectRequest(request_id=kept.id, proof=proof).SerializeToString()],
        mutate=mutate.message(enrolment_pb2.CollectRequest, {}),
        parse=_unary(channel, _ENROLMENT + "Collect", logged),
    )


def _channel(address: str, credentials: grpc.ChannelCredentials, stack: ExitStack) -> grpc.Channel:
    channel = grpc.secure_channel(address, credentials, options=client_options(MAX_MESSAGE_BYTES, None))
    stack.callback(channel.close)
    return channel


def _unary(channel: grpc.Channel, method: str, logged: list[BaseException]) -> Callable[[bytes], None]:
    call = channel.unary_unary(method)  # Without serialisers: bytes in, bytes out.

    def parse(data: bytes) -> None:
        with _answers(logged):
            call(data, timeout=_CALL_SECONDS)

    return parse


def _streamed(call: Any, requests: Callable[[bytes], Any], logged: list[BaseException]) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        with _answers(logged):
            for _ in call(requests(data), timeout=_CALL_SECONDS):
                pass

    return parse


@contextmanager
def _answers(logged: list[BaseException]) -> Iterator[None]:
    """A refusal is an error of the tree here too; a handler's unexpected error is raised as what it was."""
    logged.clear()
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        if logged:
            raise logged[0] from None
        if code in _REFUSALS or (code == grpc.StatusCode.INTERNAL and "deserializing request" in details):
            raise VerificationError(f"{code.name}: {details}") from None
        raise AssertionError(f"{code.name}: {details}") from None


@contextmanager
def _failures() -> Iterator[list[BaseException]]:
    """What the ports log as unexpected, with its traceback; nothing of it is printed."""
    found: list[BaseException] = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None and "handler failed" in record.getMessage():
                found.append(record.exc_info[1])

    loggers = [logging.getLogger(name) for name in ("foedus_protocols.channel", "grpc")]
    before = [(logger.propagate, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [Catch()]
    try:
        yield found
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


# The client


def _client(federation: _Federation, scratch: Path, stack: ExitStack) -> Iterator[Target]:
    """The client against a coordinator with a valid certificate that answers with what it is told to."""
    answers: list[bytes] = []
    address = _liar(federation.home.tls, answers, stack)
    client = LinkClient(address, federation.tls, patience_seconds=0.0, stall_seconds=3.0)
    stack.callback(client.close)
    data = random.Random(2).randbytes(_CLIENT_BYTES)
    vector = scratch / "vector"
    vector.write_bytes(data)
    named = digest(data)
    store = FileStore(scratch / "pulled")

    def with_answers(call: Callable[[], object]) -> Callable[[bytes], None]:
        def parse(stream: bytes) -> None:
            answers[:] = _unframed(stream)
            call()

        return parse

    def pull() -> None:
        store.delete(named)
        client.pull(named, store, max_bytes=2 * _CLIENT_BYTES)

    receipt = sign_receipt(
        federation.home.operator_key, federation=FEDERATION, run=federation.run, round=1, org=_ORG, digest=named,
        size=_CLIENT_BYTES, verdict="included", time=1_800_000_000,
    ).encode()  # fmt: skip
    reply, pulled = link_pb2.PushReply, link_pb2.PullReply
    replies: dict[str, tuple[list[Any], Callable[[], object]]] = {
        "hello": ([link_pb2.HelloReply(body=b'{"a":[1,"b"]}')], lambda: client.hello({})),
        "poll": ([link_pb2.PollReply(envelope=b"envelope")], lambda: client.poll(0.0)),
        "push": (
            [reply(waiting=link_pb2.Waiting()), reply(granted_offset=0), reply(receipt=receipt)],
            lambda: client.push(vector, named, {}),
        ),
        "pull": (
            [
                pulled(waiting=link_pb2.Waiting()),
                pulled(size=_CLIENT_BYTES),
                pulled(chunk=data[:4000]),
                pulled(chunk=data[4000:]),
            ],
            pull,
        ),
    }
    for name, (valid, call) in replies.items():
        kind = type(valid[0])
        yield Target(
            name=f"client-{name}",
            seeds=[_framed([message.SerializeToString() for message in valid])],
            mutate=_stream(mutate.message(kind, {"body": mutate.canonical, "receipt": mutate.canonical})),
            parse=with_answers(call),
        )


def _liar(tls: TlsFiles, answers: list[bytes], stack: ExitStack) -> str:
    """A port with the coordinator's certificate that sends `answers`, whatever it is asked."""

    def one(request: bytes, context: grpc.ServicerContext) -> bytes:
        return answers[0] if answers else b""

    def many(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from list(answers)

    methods = {
        **{name: grpc.unary_unary_rpc_method_handler(one) for name in ("Hello", "Poll", "Deliver")},
        "Push": grpc.stream_stream_rpc_method_handler(many),
        "Pull": grpc.unary_stream_rpc_method_handler(many),
    }
    pool = ThreadPoolExecutor(8)
    server = grpc.server(pool, options=server_options(MAX_MESSAGE_BYTES))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("foedus.v1.Link", methods),))
    port = bind(server, "127.0.0.1:0", server_credentials(tls, require_client=True))
    server.start()
    stack.callback(pool.shutdown, wait=False)
    stack.callback(server.stop, 0.1)
    return f"127.0.0.1:{port}"


# Streams as one input


def _framed(messages: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(message)) + message for message in messages)


def _unframed(data: bytes) -> list[bytes]:
    """The messages of a stream; a length that runs past the end takes what is there."""
    messages, at = [], 0
    while at + 4 <= len(data) and len(messages) < 1000:
        (length,) = struct.unpack_from("<I", data, at)
        messages.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return messages


def _stream(change: mutate.Mutator) -> mutate.Mutator:
    """A stream with messages changed, lost, repeated or in another order."""

    def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        messages = _unframed(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(messages))
            match rng.randrange(6):
                case 0:
                    del messages[at]
                case 1:
                    messages.insert(at, messages[at])
                case 2:
                    rng.shuffle(messages)
                case _:
                    messages[at] = change(rng, [messages[at]])
            messages = messages or [b""]
        return _framed(messages)

    return mutated
