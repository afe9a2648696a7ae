"""A TCP proxy of the tests' own: it slows a connection down, loses some of it, counts its bytes, and cuts it.

It stands between a client and one target on the loopback interface and copies bytes without looking at them, so TLS
goes through untouched. All connections share one line in each direction, as they would behind a hospital's router.
What TCP makes of a lost packet is modelled, not the packet: the bytes behind it arrive a round trip later. A test that
needs real packets on a real link uses network namespaces instead (`netns.py`).
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

_PIECE_BYTES = 16 * 1024
_PACKET_BYTES = 1448  # What a TCP segment carries over Ethernet.
_LEAST_QUEUE_BYTES = 64 * 1024
_CONNECT_SECONDS = 10.0
_BACKLOG = 64
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with a timeout of 0.


class ShapingProxy:
    """A listener on 127.0.0.1 that forwards every connection to `target`.

    Args:
        target: Host and port.
        rate_bytes: Bytes a second in each direction, all connections together; None does not limit it.
        delay_seconds: One way, so a round trip takes twice as long.
        loss: Probability that a packet of 1,448 bytes is lost; what is behind it comes a round trip later.
        seed: Of the losses.

    Attributes:
        port: Where it listens, once started.
        bytes_up: Bytes that clients sent and the target was given.
        bytes_down: Bytes that the target sent and clients were given.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        rate_bytes: float | None = None,
        delay_seconds: float = 0.0,
        loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.port = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._up = _Line(rate_bytes, delay_seconds, loss, random.Random(f"{seed}/up"))
        self._down = _Line(rate_bytes, delay_seconds, loss, random.Random(f"{seed}/down"))
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._refuse_until = 0.0
        self._hold_until = 0.0

    def start(self) -> Self:
        """Open the port and forward from now on."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="proxy-accept", daemon=True).start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def cut(self, seconds: float) -> None:
        """Reset every connection, and every new one for so many seconds from now. Returns at once."""
        with self._lock:
            self._refuse_until = max(self._refuse_until, time.monotonic() + seconds)
            open_now = list(self._connections)
        for connection in open_now:
            connection.reset()

    def hold(self, seconds: float) -> None:
        """Deliver nothing for so many seconds from now and tell nobody, as an unplugged cable does. Returns at once."""
        with self._lock:
            self._hold_until = max(self._hold_until, time.monotonic() + seconds)

    def close(self) -> None:
        """Close the port and every connection."""
        self._closed.set()
        if self._listener is not None:
            # A close alone does not wake a thread that is in accept.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            open_now = list(self._connections)
        for connection in open_now:
            connection.reset()

    # What the threads do

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                refused = time.monotonic() < self._refuse_until
            if refused:
                _reset(client)
                continue
            threading.Thread(target=self._connect, args=(client,), name="proxy-connect", daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            target = socket.create_connection(self.target, timeout=_CONNECT_SECONDS)
        except OSError:
            _reset(client)
            return
        target.settimeout(None)
        for each in (client, target):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(self, client, target)
        with self._lock:
            self._connections.add(connection)
            cut = self._closed.is_set() or time.monotonic() < self._refuse_until
        if cut:
            connection.reset()
        connection.start()

    def _held_for(self) -> float:
        """Seconds until the line delivers again."""
        with self._lock:
            return 0.0 if self._closed.is_set() else max(0.0, self._hold_until - time.monotonic())

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.bytes_up += up
            self.bytes_down += down

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Line:
    """One direction of the link: when bytes that are handed in now arrive at the other end."""

    def __init__(self, rate_bytes: float | None, delay_seconds: float, loss: float, rng: random.Random) -> None:
        self._rate = rate_bytes
        self._delay = delay_seconds
        self._loss = loss
        self._rng = rng
        self._lock = threading.Lock()
        self._free_at = 0.0
        # Twice the bytes that are on a busy line, so that its queue never limits the rate.
        self.queue_bytes = max(_LEAST_QUEUE_BYTES, int((rate_bytes or 1e9) * 4 * delay_seconds))

    def arrival(self, size: int) -> float:
        """The moment at which the last of `size` bytes arrives, on the monotonic clock."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + (size / self._rate if self._rate else 0.0)
            packets = -(-size // _PACKET_BYTES)
            lost = self._loss > 0.0 and any(self._rng.random() < self._loss for _ in range(packets))
            return self._free_at + self._delay + (2 * self._delay if lost else 0.0)


class _Connection:
    """A client's socket and the target's, with a pipe in each direction."""

    def __init__(self, proxy: ShapingProxy, client: socket.socket, target: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._target = target
        self._lock = threading.Lock()
        self._running = 2
        self._pipes = (
            _Pipe(client, target, proxy._up, proxy._held_for, lambda size: proxy._count(up=size), self._ended),
            _Pipe(target, client, proxy._down, proxy._held_for, lambda size: proxy._count(down=size), self._ended),
        )

    def start(self) -> None:
        for pipe in self._pipes:
            pipe.start()

    def reset(self) -> None:
        """Drop the connection at both ends without a farewell."""
        for pipe in self._pipes:
            pipe.stop()
        _reset(self._client)
        _reset(self._target)
        self._proxy._forget(self)

    def _ended(self, clean: bool) -> None:
        """One pipe is done; after both, or after a broken one, so is the connection."""
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last and clean:
            self._client.close()
            self._target.close()
            self._proxy._forget(self)
        elif not clean:
            self.reset()


class _Pipe:
    """One direction of one connection: a thread reads and dates what it read, another delivers it when it is due."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        line: _Line,
        held_for: Callable[[], float],
        count: Callable[[int], None],
        ended: Callable[[bool], None],
    ) -> None:
        self._source = source
        self._sink = sink
        self._line = line
        self._held_for = held_for
        self._count = count
        self._ended = ended
        self._changed = threading.Condition()
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._stopped = False

    def start(self) -> None:
        for work in (self._read, self._deliver):
            threading.Thread(target=work, name="proxy-pipe", daemon=True).start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _read(self) -> None:
        last = 0.0
        while True:
            try:
                piece = self._source.recv(_PIECE_BYTES)
            except OSError:
                self._ended(False)
                return
            last = max(last, self._line.arrival(len(piece)))  # Bytes arrive in order, whatever was lost.
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._queued < self._line.queue_bytes)
                if self._stopped:
                    return
                self._queue.append((last, piece))
                self._queued += len(piece)
                self._changed.notify_all()
            if not piece:
                return

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or bool(self._queue))
                if self._stopped:
                    return
                due, piece = self._queue[0]
                wait = max(due - time.monotonic(), self._held_for())
                if wait > 0:
                    self._changed.wait(wait)
                    continue
                self._queue.popleft()
                self._queued -= len(piece)
                self._changed.notify_all()
            self._count(len(piece))  # Before they go, so that whoever has read them finds them counted.
            try:
                if not piece:
                    self._sink.shutdown(socket.SHUT_WR)
                    self._ended(True)
                    return
                self._sink.sendall(piece)
            except OSError:
                self._ended(False)
                return


def _reset(connection: socket.socket) -> None:
    """Close with an RST instead of a FIN; threads that are in a call on it wake."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
