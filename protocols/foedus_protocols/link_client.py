"""The organisation's side of the link.

Control calls are tried once and raise a ConnectError: the daemon's own loop decides what to do. Transfers resume and
try again, with jitter, for as long as bytes keep moving within `patience_seconds`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc

from foedus_protocols.backoff import Backoff
from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.channel import (
    MAX_MESSAGE_BYTES,
    TlsFiles,
    TransientError,
    Watch,
    Watched,
    client_credentials,
    client_options,
    split_address,
    translate,
)
from foedus_protocols.errors import VerificationError
from foedus_protocols.store import CHUNK_BYTES, FileStore
from foedus_protocols.v1 import link_pb2, link_pb2_grpc

_CALL_SECONDS = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_Result = TypeVar("_Result")


class LinkClient:
    """A connection to the coordinator's link port. Methods may be called from several threads.

    Attributes:
        bytes_up: Bytes of messages sent, without TLS and HTTP framing.
        bytes_down: Bytes of messages received, counted alike.
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles,
        *,
        proxy: str | None = None,
        patience_seconds: float = 120.0,
        stall_seconds: float = 60.0,
        max_file_bytes: int = 8 << 30,
    ) -> None:
        """Check our own certificate and open a channel; the first call dials.

        Args:
            address: ``HOST:PORT`` as named in the coordinator's certificate.
            tls: Our certificate, key and the federation's CA.
            proxy: ``http://HOST:PORT``; environment variables are not looked at.
            patience_seconds: How long a transfer is tried again without any progress.
            stall_seconds: A transfer without progress for this long is cut off and tried again.
            max_file_bytes: No pull accepts more.

        Raises:
            ConnectError: Our certificate is expired, not yet valid, for another key or of another CA.
            ConfigError: The address, the proxy or a file is wrong.
        """
        split_address(address)
        self.address = address
        self.bytes_up = 0
        self.bytes_down = 0
        self._tls = tls
        self._proxy = proxy
        self._patience = patience_seconds
        self._max_file_bytes = max_file_bytes
        self._count_lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = Watch(stall_seconds)
        self._open()

    def _open(self) -> None:
        identity = self._tls.read()
        options = client_options(MAX_MESSAGE_BYTES, self._proxy)
        self._expires: datetime = identity.certificate.not_valid_after_utc
        self._channel = grpc.secure_channel(self.address, client_credentials(identity), options=options)
        self._stub = link_pb2_grpc.LinkStub(self._channel)

    def reload(self) -> None:
        """Read our certificate again and move to a new connection; gRPC has no other way to renew at the client.

        Calls in progress on the old connection fail and, where they are transfers, resume on the new one.
        """
        older = self._channel
        self._open()
        older.close()

    def close(self) -> None:
        """End every call."""
        self._closed.set()
        self._watch.stop()
        self._channel.close()

    def __enter__(self) -> LinkClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Control

    def hello(self, body: dict[str, Any]) -> dict[str, Any]:
        """Introduce ourselves; JSON both ways.

        Raises:
            ConnectError: No answer, or a TLS identity that does not check out.
            VerificationError: The coordinator refused us, or answered with something else.
        """
        reply = self._call("Hello", link_pb2.HelloRequest(body=canonical_bytes(body)), _CALL_SECONDS)
        answer = parse_canonical(reply.body)
        if not isinstance(answer, dict):
            raise VerificationError(f"expected a JSON object from {self.address}, got a {type(answer).__name__}")
        return answer

    def poll(self, wait_seconds: float) -> bytes | None:
        """The oldest message that we have not answered, as it came (open it with `envelope.open_envelope`), or None.

        Raises as `hello` does.
        """
        request = link_pb2.PollRequest(wait_seconds=wait_seconds)
        reply = self._call("Poll", request, wait_seconds + _CALL_SECONDS)
        return bytes(reply.envelope) if reply.HasField("envelope") else None

    def deliver(self, envelope: bytes) -> None:
        """Send an answer. When this returns, it is durable at the coordinator; it may be sent again.

        Raises as `hello` does.
        """
        self._call("Deliver", link_pb2.DeliverRequest(envelope=envelope), _CALL_SECONDS)

    def _call(self, method: str, request: Any, seconds: float) -> Any:
        self._check_certificate()
        self._count(up=request.ByteSize())
        try:
            reply = getattr(self._stub, method)(request, timeout=seconds)
        except grpc.RpcError as error:
            raise translate(error, self.address) from error
        except ValueError as error:  # gRPC's word for a channel that `close` or `reload` has closed.
            raise TransientError(f"expected an open connection to {self.address}, it was closed") from error
        self._count(down=reply.ByteSize())
        return reply

    # Transfers

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        """Send a file and return its receipt as it came; `receipt.open_receipt` checks signature and fields.

        Args:
            path: The file, which does not change meanwhile.
            digest: Its SHA-256.
            context: What it is for, as JSON (4 KiB at most).

        Raises:
            ConnectError: No progress within `patience_seconds`.
            VerificationError: Refused: too long, another digest, not expected, or we are not a member.
            StateError: Another connection of ours pushes the same file.
        """
        return self._persist(lambda watched: self._push_once(watched, path, digest, context))

    def pull(self, digest: str, store: FileStore, *, max_bytes: int | None = None) -> Path:
        """Fetch a file into a store and return its path; nothing is sent where the store holds it.

        Args:
            digest: The file's SHA-256, which is checked.
            store: Where it goes, and where a broken transfer resumes.
            max_bytes: The most that is accepted; the announced size is compared before a byte is read.

        Raises:
            ConnectError: No progress within `patience_seconds`.
            VerificationError: Refused, too long, or another digest.
        """
        limit = self._max_file_bytes if max_bytes is None else max_bytes
        if store.has(digest):
            held = store.path(digest)
            if held.stat().st_size > limit:
                raise VerificationError(f"expected a file of at most {limit} bytes, {digest} is longer")
            return held
        return self._persist(lambda watched: self._pull_once(watched, digest, store, limit))

    def _persist(self, once: Callable[[_Attempt], _Result]) -> _Result:
        """Repeat an attempt over broken connections, and once over a resumed part that turned out to be wrong."""
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        reached, last_progress, started_over = 0, time.monotonic(), False
        while True:
            attempt = _Attempt()
            try:
                self._check_certificate()
                return once(attempt)
            except VerificationError:
                if started_over or not attempt.resumed:
                    raise
                started_over = True
            except TransientError:
                if attempt.reached > reached:
                    reached, last_progress = attempt.reached, time.monotonic()
                    backoff.reset()
                if time.monotonic() - last_progress > self._patience:
                    raise
                if self._closed.wait(backoff.pause()):
                    raise

    def _push_once(self, attempt: _Attempt, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        size = path.stat().st_size
        header = link_pb2.PushHeader(digest=digest, size=size, context=canonical_bytes(context))
        offsets: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def outgoing() -> Iterator[Any]:
            yield self._sent(link_pb2.PushRequest(header=header))
            offset = offsets.get()
            if offset is None:
                return
            with path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(CHUNK_BYTES):
                    yield self._sent(link_pb2.PushRequest(chunk=chunk))
                    attempt.progress()

        try:
            with self._replies("Push", outgoing(), attempt) as replies:
                for reply in replies:
                    kind = reply.WhichOneof("kind")
                    if kind == "granted_offset":
                        attempt.reached = reply.granted_offset
                        attempt.resumed = reply.granted_offset > 0
                        offsets.put(reply.granted_offset)
                    elif kind == "receipt":
                        return _receipt(reply.receipt, digest, size)
        finally:
            offsets.put(None)  # gRPC runs `outgoing` in a thread of its own, which would wait for ever.
        raise TransientError(f"expected a receipt from {self.address}, the stream ended without one")

    def _pull_once(self, attempt: _Attempt, digest: str, store: FileStore, limit: int) -> Path:
        offset = store.received(digest)
        attempt.reached, attempt.resumed = offset, offset > 0
        request = self._sent(link_pb2.PullRequest(digest=digest, offset=offset))
        with self._replies("Pull", request, attempt) as replies:
            size = next((reply.size for reply in replies if reply.WhichOneof("kind") == "size"), None)
            if size is None:
                raise TransientError(f"expected a file from {self.address}, the stream ended before its size")
            if size > limit:
                raise VerificationError(f"expected a file of at most {limit} bytes, {self.address} announced {size}")
            with store.open_part(digest, size) as part:
                if part.offset != offset:
                    raise TransientError(f"expected to resume at {offset}, what is here ends at {part.offset}")
                for reply in replies:
                    part.write(reply.chunk)
                    attempt.reached = part.offset
                if not part.complete:
                    raise TransientError(
                        f"expected {size} bytes from {self.address}, the stream ended at {part.offset}"
                    )
                return part.finish()

    @contextmanager
    def _replies(self, method: str, request: Any, attempt: _Attempt) -> Iterator[Iterator[Any]]:
        """The counted replies of a streaming call under watch; the call ends with the block."""
        try:
            call = getattr(self._stub, method)(request)
        except ValueError as error:  # See `_call`.
            raise TransientError(f"expected an open connection to {self.address}, it was closed") from error

        def counted() -> Iterator[Any]:
            for reply in call:
                self._count(down=reply.ByteSize())
                attempt.progress()
                yield reply

        with self._watch.over(call.cancel) as attempt.watched:
            try:
                yield counted()
            except grpc.RpcError as error:
                raise translate(error, self.address) from error
            finally:
                call.cancel()

    # Both

    def _check_certificate(self) -> None:
        """Say that our certificate ran out before the coordinator closes the socket without a word."""
        if self._closed.is_set():
            raise TransientError(f"expected an open connection to {self.address}, it was closed")
        if datetime.now(UTC) > self._expires:
            self._tls.read()  # Raises with the reason, unless the file has been renewed meanwhile.
            self.reload()

    def _sent(self, message: Any) -> Any:
        self._count(up=message.ByteSize())
        return message

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._count_lock:
            self.bytes_up += up
            self.bytes_down += down


class _Attempt:
    """How far one attempt at a transfer came."""

    def __init__(self) -> None:
        self.reached = 0  # The offset that is known to be at the receiver.
        self.resumed = False
        self.watched: Watched | None = None

    def progress(self) -> None:
        """A message moved."""
        if self.watched is not None:
            self.watched.progress()


def _receipt(data: bytes, digest: str, size: int) -> dict[str, Any]:
    """A receipt as JSON, once it is for the file that we sent."""
    receipt = parse_canonical(data)
    if not isinstance(receipt, dict) or receipt.get("digest") != digest or receipt.get("bytes") != size:
        raise VerificationError(f"expected a receipt for file {digest} of {size} bytes, got another")
    return receipt
