"""A proxy of a hospital's kind: it knows CONNECT, may want an account, and forgets tunnels that have been silent.

Bytes are copied without a look, so TLS goes through untouched. What has been forgotten is swallowed without a word to
either side, as an address translator does with a connection that it no longer knows.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

_HEAD_BYTES = 8192
_PIECE_BYTES = 1 << 16


class ConnectProxy:
    """A listener on 127.0.0.1.

    Args:
        account: ``user:password`` that callers must show; None asks for nothing.
        forget_seconds: How long a tunnel may be silent, both directions together.

    Attributes:
        port: Where it listens.
        targets: ``host:port`` of each tunnel that was opened, in order.
        refused: How many callers showed no account, or another.
        bytes_up: Bytes that callers sent through tunnels.
    """

    def __init__(self, *, account: str | None = None, forget_seconds: float | None = None) -> None:
        self.targets: list[str] = []
        self.refused = 0
        self.bytes_up = 0
        self._account = account
        self._forget_seconds = forget_seconds
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="connect-accept", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every tunnel and the listener."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(caller)
            threading.Thread(target=self._serve, args=(caller,), name="connect-serve", daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with contextlib.suppress(OSError), caller:
            head = b""
            while not head.endswith(b"\r\n\r\n") and len(head) < _HEAD_BYTES:
                head += caller.recv(1)
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            if method != "CONNECT":
                caller.sendall(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
                return
            if not self._known(head):
                self.refused += 1
                caller.sendall(
                    b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n'
                    b"Content-Length: 0\r\n\r\n"
                )
                return
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as far:
                self._open.append(far)
                self.targets.append(target)
                caller.sendall(b"HTTP/1.1 200 Connection Established\r\n\r\n")
                _Tunnel(self, caller, far, self._forget_seconds).carry()

    def _known(self, head: bytes) -> bool:
        if self._account is None:
            return True
        token = base64.b64encode(self._account.encode())
        return any(
            line.partition(b":")[0].lower() == b"proxy-authorization" and line.endswith(b" " + token)
            for line in head.split(b"\r\n")
        )


class _Tunnel:
    """Two sockets whose bytes are exchanged until one ends."""

    def __init__(
        self, proxy: ConnectProxy, caller: socket.socket, far: socket.socket, forget_seconds: float | None
    ) -> None:
        self._proxy = proxy
        self._caller = caller
        self._far = far
        self._forget_seconds = forget_seconds
        self._last = time.monotonic()

    def carry(self) -> None:
        back = threading.Thread(target=self._copy, args=(self._far, self._caller), name="connect-back", daemon=True)
        back.start()
        self._copy(self._caller, self._far)
        back.join()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                now = time.monotonic()
                if self._forget_seconds is not None and now - self._last > self._forget_seconds:
                    continue  # Forgotten: swallowed, and so is all that follows, since `_last` no longer moves.
                self._last = now
                if source is self._caller:
                    self._proxy.bytes_up += len(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
