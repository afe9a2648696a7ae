"""The link: one port with mutual TLS, dialled by the organisation.

Control messages are polled and delivered as signed envelopes; vectors, sums and charters travel beside them, named by
digest, in chunks of 1 MiB that resume where a connection broke. The idea that keeps memory flat is **grant before
bytes**: of all organisations that want to push or pull a large file, `slots` may at a time, and none of the others
sends anything, since what grows with organisations is gRPC's own buffers and not our code's. No member holds more than
one of the slots, or more than a few calls (`turns.py`).

Handlers are plain threads: file, hash and database calls block anyway, and asyncio was not measurably faster. This
module is the coordinator's side; `link_client.py` is the organisation's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc

from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.channel import (
    MAX_MESSAGE_BYTES,
    Peer,
    TlsFiles,
    Watch,
    Watched,
    answering,
    bind,
    peer_of,
    server_credentials,
    server_options,
)
from foedus_protocols.envelope import MAX_ENVELOPE_BYTES
from foedus_protocols.errors import ConfigError, ConnectError, VerificationError
from foedus_protocols.identity import COORDINATOR
from foedus_protocols.link_client import LinkClient
from foedus_protocols.messages import MAX_BODY_BYTES
from foedus_protocols.store import CHUNK_BYTES, Part, check_digest
from foedus_protocols.turns import Turns
from foedus_protocols.v1 import link_pb2, link_pb2_grpc

MAX_CONTEXT_BYTES = 4 * 1024
MAX_POLL_SECONDS = 30.0
_POLL_SLICE_SECONDS = 0.5  # A waiting poll looks at roster, dates and shutdown this often.
_WAITING_SECONDS = 5.0  # A transfer that waits for a slot hears from us this often, so that it does not look stalled.
_SPARE_THREADS = 8


class LinkHandlers(Protocol):
    """What the coordinator does with what arrives. Methods run in many threads at once; errors of ours travel back.

    `org` is always the organisation in the caller's certificate, never a claim.
    """

    def check_member(self, org: str, leaf_serial: str) -> None:
        """Raise a VerificationError unless `org` is a member and this certificate of it was issued and not revoked.

        Called at each call, with each chunk of a transfer, and twice a second of a stream: it has to be cheap.

        Args:
            org: The organisation in the certificate.
            leaf_serial: The certificate's serial number in lower-case hexadecimal.
        """

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        """Answer an introduction. JSON both ways (`hello.py`): versions, roster, receipts, CAs, renewals."""

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        """The oldest encoded envelope that `org` has not answered, waiting up to `wait_seconds` for one."""

    def deliver(self, org: str, envelope: bytes) -> None:
        """Take in an answer: durable before it returns, and applied once however often it comes."""

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        """Open the part that a push may fill (`FileStore.open_part`), or raise: size and purpose are judged here.

        Called when the push has its slot. A file that is held already gives a complete part, and no byte is sent.
        """

    def received(self, org: str, digest: str, size: int, context: dict[str, Any]) -> bytes:
        """The file is durable: record it and return the signed receipt (`receipt.py`). The same again on a repeat."""

    def path_of(self, org: str, digest: str) -> Path:
        """The file that `org` wants to pull, or raise where it may not have it."""


class LinkServer:
    """A running link port."""

    def __init__(self, server: grpc.Server, service: _Service, pool: ThreadPoolExecutor, port: int) -> None:
        self._server = server
        self._service = service
        self._pool = pool
        self.port = port

    def stop(self, grace: float = 2.0) -> None:
        """Let waiting polls return, give open streams `grace` seconds, and close the port."""
        self._service.stopping.set()
        self._server.stop(grace).wait()
        self._service.watch.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)


def serve_link(
    address: str,
    handlers: LinkHandlers,
    tls: TlsFiles,
    *,
    slots: int = 2,
    members: int = 64,
    stall_seconds: float = 60.0,
    max_file_bytes: int = 8 << 30,
) -> LinkServer:
    """Open the link port and serve it.

    Args:
        address: ``HOST:PORT``; port 0 takes a free one, which the result names.
        handlers: What happens with what arrives.
        tls: The coordinator's certificate, key and CA; the federation's name is read from the certificate.
        slots: Large transfers at a time, pushes and pulls together.
        members: Organisations that are served without waiting: each may hold two threads.
        stall_seconds: A stream without progress for this long is cut off.
        max_file_bytes: No push may announce more.

    Raises:
        StateError: The port is taken.
        ConfigError: The certificate is not a coordinator's.
    """
    name = tls.read().name
    if name.org != COORDINATOR:
        raise ConfigError(f"expected the coordinator's certificate in {tls.certificate}, got that of {name.uri}")
    # One pool thread for each open call; beyond that, RESOURCE_EXHAUSTED instead of silence.
    threads = 2 * members + slots + _SPARE_THREADS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="foedus-link")
    options = server_options(MAX_MESSAGE_BYTES)
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=threads)
    service = _Service(handlers, name.federation, slots, Watch(stall_seconds), max_file_bytes)
    link_pb2_grpc.add_LinkServicer_to_server(service, server)
    port = bind(server, address, server_credentials(tls, require_client=True))
    server.start()
    return LinkServer(server, service, pool, port)


class _Service(link_pb2_grpc.LinkServicer):
    """The generated service's methods: identity first, sizes second, then the handler."""

    def __init__(self, handlers: LinkHandlers, federation: str, slots: int, watch: Watch, max_file_bytes: int) -> None:
        self.watch = watch
        self.stopping = threading.Event()
        self._handlers = handlers
        self._federation = federation
        self._turns = Turns(slots)
        self._max_file_bytes = max_file_bytes
        self._lock = threading.Lock()
        self._transfers: dict[str, grpc.ServicerContext] = {}

    def Hello(self, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(context), self._caller(context) as peer:
            body = _json_object(request.body, MAX_BODY_BYTES)
            return link_pb2.HelloReply(body=canonical_bytes(self._handlers.hello(peer.org, body, peer.serial)))

    def Poll(self, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(context), self._caller(context) as peer:
            # Not a number is not greater than 0 either.
            wait = min(request.wait_seconds, MAX_POLL_SECONDS) if request.wait_seconds > 0 else 0.0
            deadline = time.monotonic() + wait
            while True:
                left = deadline - time.monotonic()
                envelope = self._handlers.poll(peer.org, min(max(left, 0.0), _POLL_SLICE_SECONDS))
                self._check(peer)
                if envelope is not None:
                    return link_pb2.PollReply(envelope=envelope)
                if left <= 0 or self.stopping.is_set() or not context.is_active():
                    return link_pb2.PollReply()

    def Deliver(self, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(context), self._caller(context) as peer:
            if len(request.envelope) > MAX_ENVELOPE_BYTES:
                raise VerificationError(f"expected an envelope of at most {MAX_ENVELOPE_BYTES} bytes, got more")
            self._handlers.deliver(peer.org, request.envelope)
            return link_pb2.DeliverReply()

    def Push(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with answering(context), ExitStack() as stack:
            peer = stack.enter_context(self._caller(context))
            watched = stack.enter_context(self.watch.over(context.cancel, lambda: self._check(peer)))
            header = _push_header(next(requests, None), self._max_file_bytes)
            info = _json_object(header.context, MAX_CONTEXT_BYTES)
            self._replace(f"{peer.org} {header.digest}", context)
            if header.size > CHUNK_BYTES:
                yield from self._wait_for_slot(peer.org, stack, context, watched, link_pb2.PushReply)
            part = stack.enter_context(self._handlers.granted(peer.org, header.digest, header.size, info))
            yield link_pb2.PushReply(granted_offset=part.offset)
            _receive(requests, part, watched, lambda: self._check(peer))
            part.finish()
            receipt = self._handlers.received(peer.org, header.digest, header.size, info)
            yield link_pb2.PushReply(receipt=receipt)

    def Pull(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with answering(context), ExitStack() as stack:
            peer = stack.enter_context(self._caller(context))
            watched = stack.enter_context(self.watch.over(context.cancel, lambda: self._check(peer)))
            check_digest(request.digest)
            path = self._handlers.path_of(peer.org, request.digest)
            size = path.stat().st_size
            if request.offset > size:
                raise VerificationError(f"expected an offset within {size} bytes, got {request.offset}")
            if size - request.offset > CHUNK_BYTES:
                self._replace(f"{peer.org} {request.digest}", context)
                yield from self._wait_for_slot(peer.org, stack, context, watched, link_pb2.PullReply)
            yield link_pb2.PullReply(size=size)
            with path.open("rb") as file:
                file.seek(request.offset)
                while chunk := file.read(CHUNK_BYTES):
                    self._check(peer)
                    yield link_pb2.PullReply(chunk=chunk)
                    watched.progress()

    @contextmanager
    def _caller(self, context: grpc.ServicerContext) -> Iterator[Peer]:
        """The member that calls, counted for as long as the call lasts."""
        peer = peer_of(context, self._federation)
        self._check(peer)
        with self._turns.call(peer.org):
            yield peer

    def _check(self, peer: Peer) -> None:
        peer.check_dates()
        self._handlers.check_member(peer.org, peer.serial)

    def _replace(self, what: str, context: grpc.ServicerContext) -> None:
        """Cut off an older transfer of the same file: its peer broke off, and our side has not noticed yet."""

        def forget() -> None:
            with self._lock:
                if self._transfers.get(what) is context:
                    del self._transfers[what]

        with self._lock:
            older = self._transfers.get(what)
            self._transfers[what] = context
        if older is not None:
            older.cancel()
        if not context.add_callback(forget):
            forget()

    def _wait_for_slot(
        self, org: str, stack: ExitStack, context: grpc.ServicerContext, watched: Watched, reply: Callable[..., Any]
    ) -> Iterator[Any]:
        """Take one of the slots for as long as `stack` is open, and say "waiting" meanwhile."""
        said = time.monotonic()
        while not self._turns.take_slot(org, 0.5):
            if self.stopping.is_set() or not context.is_active():
                raise ConnectError("expected a free transfer slot, the coordinator is stopping; try again")
            watched.progress()
            if time.monotonic() - said > _WAITING_SECONDS:
                said = time.monotonic()
                yield reply(waiting=link_pb2.Waiting())
        stack.callback(self._turns.give_slot_back, org)
        watched.progress()


def _push_header(request: Any, max_file_bytes: int) -> Any:
    """The first message of a push, once it is one and announces no more than is allowed."""
    if request is None or request.WhichOneof("kind") != "header":
        raise VerificationError("expected a push to begin with its header, got something else")
    check_digest(request.header.digest)
    if request.header.size > max_file_bytes:
        raise VerificationError(
            f"expected a file of at most {max_file_bytes} bytes, got {request.header.size} announced"
        )
    return request.header


def _receive(requests: Iterator[Any], part: Part, watched: Watched, check: Callable[[], None]) -> None:
    """Write chunks until all announced bytes are there. The end of the stream is no sign that they are."""
    while not part.complete:
        request = next(requests, None)
        if request is None:
            return  # `Part.finish` compares what came with what was announced.
        if request.WhichOneof("kind") != "chunk":
            raise VerificationError("expected chunks after the header, got another header")
        check()
        part.write(request.chunk)
        watched.progress()


def _json_object(data: bytes, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise VerificationError(f"expected at most {limit} bytes of JSON, got {len(data)}")
    value = parse_canonical(data)
    if not isinstance(value, dict):
        raise VerificationError(f"expected a JSON object, got a {type(value).__name__}")
    return value


__all__ = ["LinkClient", "LinkHandlers", "LinkServer", "TlsFiles", "serve_link"]
