"""The two ends of a link as processes that a test can freeze.

    python frozen_ends.py server FOLDER PACE
    python frozen_ends.py client FOLDER PORT PACE

Each prints a line when something happens. PACE is ``real`` for the options as they are, ``fast`` for the same ones
with a tenth of the times.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from foedus_protocols import channel, link, link_client
from foedus_protocols.channel import TlsFiles
from foedus_protocols.errors import ConnectError
from foedus_protocols.link import LinkClient, serve_link
from foedus_protocols.store import FileStore, Part
from foedus_protocols.v1 import link_pb2, link_pb2_grpc

DIGEST = "0" * 64


def hurry() -> None:
    """Keep alive ten times as often as in earnest."""

    def sooner(options: channel.Options) -> channel.Options:
        return [(name, int(value) // 10 if name.endswith("_ms") else value) for name, value in options]

    server_options, client_options = channel.server_options, channel.client_options
    link.server_options = lambda most: sooner(server_options(most))
    link_client.client_options = lambda most, proxy: sooner(client_options(most, proxy))


class Seen(Part):
    """A part that says when its connection let go of it."""

    def close(self) -> None:
        super().close()
        print("closed", flush=True)


class Desk:
    """Handlers that wait, and say what begins and ends."""

    def __init__(self, folder: Path) -> None:
        self._store = FileStore(folder)

    def check_member(self, org: str, leaf_serial: str) -> None:
        """Everybody is a member."""

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        return {}

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        threading.Event().wait(wait_seconds)
        return None

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        print("granted", flush=True)
        return Seen(self._store, digest, size)


def server(folder: Path) -> None:
    tls = TlsFiles(certificate=folder / "tls.pem", key=folder / "tls.key", ca=folder / "ca.pem")
    running = serve_link("127.0.0.1:0", Desk(folder / "files"), tls, stall_seconds=600.0)  # type: ignore[arg-type]
    print(f"port {running.port}", flush=True)
    threading.Event().wait()


def client(folder: Path, port: int) -> None:
    tls = TlsFiles(certificate=folder / "tls.pem", key=folder / "tls.key", ca=folder / "ca.pem")
    with LinkClient(f"127.0.0.1:{port}", tls, stall_seconds=600.0) as dialled:
        dialled.hello({})
        threading.Thread(target=push, args=(dialled,), daemon=True).start()
        print("connected", flush=True)
        try:
            while True:
                dialled.poll(25.0)
        except ConnectError:
            print("noticed", flush=True)


def push(dialled: LinkClient) -> None:
    """Begin a push, and send no byte of it."""

    def requests() -> Iterator[Any]:
        yield link_pb2.PushRequest(header=link_pb2.PushHeader(digest=DIGEST, size=1000, context=b"{}"))
        threading.Event().wait()

    try:
        list(link_pb2_grpc.LinkStub(dialled._channel).Push(requests()))
    except grpc.RpcError:
        return


if __name__ == "__main__":
    role, place, *rest = sys.argv[1:]
    if rest[-1] == "fast":
        hurry()
    if role == "server":
        server(Path(place))
    else:
        client(Path(place), int(rest[0]))
