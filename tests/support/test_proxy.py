"""The tests' own proxy: what goes in comes out, slower; a cut line is cut, a held one is silent."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from support.proxy import ShapingProxy

_DEADLINE_SECONDS = 20.0


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A target that sends everything back."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def dial(proxy: ShapingProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=_DEADLINE_SECONDS)


def there_and_back(connection: socket.socket, data: bytes) -> bytes:
    """Send everything, and read as much."""
    sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    sender.start()
    back = bytearray()
    while len(back) < len(data) and (piece := connection.recv(1 << 16)):
        back += piece
    sender.join(_DEADLINE_SECONDS)
    return bytes(back)


@pytest.mark.parametrize(
    "shape",
    [{}, {"rate_bytes": 2e6}, {"delay_seconds": 0.02, "loss": 0.05, "seed": 3}],
    ids=["plain", "slow", "far and lossy"],
)
def test_bytes_come_out_as_they_went_in_and_are_counted(echo: tuple[str, int], shape: dict[str, float]) -> None:
    data = random.Random(1).randbytes(300_000)
    with ShapingProxy(echo, **shape) as proxy, dial(proxy) as connection:
        assert hashlib.sha256(there_and_back(connection, data)).digest() == hashlib.sha256(data).digest()
        assert (proxy.bytes_up, proxy.bytes_down) == (len(data), len(data))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # The end of a stream goes through too.


def test_a_limited_line_is_no_faster_than_its_rate_and_all_connections_share_it(echo: tuple[str, int]) -> None:
    with ShapingProxy(echo, rate_bytes=400_000.0) as proxy:
        began = time.monotonic()
        with dial(proxy) as one, dial(proxy) as other:
            first = threading.Thread(target=there_and_back, args=(one, bytes(100_000)), daemon=True)
            first.start()
            there_and_back(other, bytes(100_000))
            first.join(_DEADLINE_SECONDS)
        assert time.monotonic() - began >= 0.5  # 200,000 bytes up; a lower bound holds on a busy machine too.


def test_a_cut_resets_what_is_open_refuses_for_a_while_and_then_works_again(echo: tuple[str, int]) -> None:
    with ShapingProxy(echo) as proxy:
        with dial(proxy) as connection:
            assert there_and_back(connection, b"before") == b"before"
            proxy.cut(1.0)
            assert _is_dead(connection)
        assert not _answers(proxy)
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not _answers(proxy):
            assert time.monotonic() < deadline


def test_a_held_line_delivers_nothing_closes_nothing_and_loses_nothing(echo: tuple[str, int]) -> None:
    with ShapingProxy(echo) as proxy, dial(proxy) as connection:
        assert there_and_back(connection, b"before") == b"before"
        proxy.hold(1.0)
        connection.settimeout(0.3)
        connection.sendall(b"during")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(_DEADLINE_SECONDS)
        assert connection.recv(6) == b"during"


def test_a_closed_proxy_is_gone(echo: tuple[str, int]) -> None:
    proxy = ShapingProxy(echo).start()
    connection = dial(proxy)
    assert there_and_back(connection, b"hello") == b"hello"
    proxy.close()
    with connection:
        assert _is_dead(connection)
    with pytest.raises(OSError):
        dial(proxy)


def test_a_target_that_is_away_looks_like_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()
    with ShapingProxy(nobody) as proxy:
        assert not _answers(proxy)


def _answers(proxy: ShapingProxy) -> bool:
    """Whether a new connection is served. A refused one is reset, in some kernels before `connect` returns."""
    try:
        with dial(proxy) as connection:
            return not _is_dead(connection)
    except OSError:
        return False


def _is_dead(connection: socket.socket) -> bool:
    """Whether a connection is closed or reset, rather than echoing."""
    try:
        connection.sendall(b"?")
        return connection.recv(1) == b""
    except OSError:
        return True
