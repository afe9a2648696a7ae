"""The two ends of a slow line: a link port and a plain socket at one, and at the other who compares them.

    python ends.py serve FOLDER ADDRESS              the coordinator's end; prints its two ports as JSON and serves
    python ends.py compare FOLDER LINK BARE ...      the organisation's end; prints what it measured as JSON
    python ends.py push FOLDER LINK ...              one push, however long it takes; prints the receipt's digest

Both transfers go over a connection that has just been opened and carried one small exchange, as the daemon's has: what
is timed is from the first byte until the other end has said that it has everything. `FOLDER` holds certificates that
`make_identities` wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols import identity
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.channel import TlsFiles, split_address
from foedus_protocols.errors import ConnectError
from foedus_protocols.link import LinkClient, serve_link
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.store import FileStore, Part

FEDERATION = "slow-league"
ORG = "clinic"
_PIECE = 1 << 20


def make_identities(folder: Path, hosts: list[str]) -> None:
    """A CA, the coordinator's certificate for `hosts`, and one organisation's."""
    ca = CertificateAuthority.create(FEDERATION)
    for name in ("coordinator", ORG):
        files = tls_files(folder, name)
        files.key.parent.mkdir(parents=True)
        key = identity.generate_tls_key()
        identity.save_key(files.key, key)
        files.ca.write_bytes(ca.pem)
        if name == ORG:
            pem = ca.issue_certificate(make_request(key, ORG), org=ORG, federation=FEDERATION)
        else:
            pem = ca.issue_server_certificate(key.public_key(), federation=FEDERATION, hosts=hosts)
        files.certificate.write_bytes(pem)


def tls_files(folder: Path, name: str) -> TlsFiles:
    """Where one end's identity lies."""
    return TlsFiles(certificate=folder / name / "tls.pem", key=folder / name / "tls.key", ca=folder / name / "ca.pem")


class Desk:
    """A link port's handlers over a folder: everything that is pushed is taken, everything that is there is given."""

    def __init__(self, store: FileStore) -> None:
        self.store = store
        self.offsets: list[int] = []
        self._key = Ed25519PrivateKey.generate()

    def check_member(self, org: str, leaf_serial: str) -> None:
        """Everybody with a certificate is one."""

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        """Tell at which offsets pushes began."""
        return {"org": org, "offsets": self.offsets}

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        """No messages."""
        time.sleep(wait_seconds)
        return None

    def deliver(self, org: str, envelope: bytes) -> None:
        """Nothing is asked."""

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        """A place for a file."""
        part = self.store.open_part(digest, size)
        self.offsets.append(part.offset)
        return part

    def received(self, org: str, digest: str, size: int, context: dict[str, Any]) -> bytes:
        """A receipt."""
        return sign_receipt(
            self._key, federation=FEDERATION, run="run-1", round=1, org=org, digest=digest, size=size,
            verdict="included", time=int(time.time()),
        ).encode()  # fmt: skip

    def path_of(self, org: str, digest: str) -> Path:
        """Any file that is there."""
        return self.store.path(digest)


def serve(folder: Path, address: str) -> None:
    """Serve both ports until standard input ends."""
    desk = Desk(FileStore(folder / "files"))
    link = serve_link(f"{address}:0", desk, tls_files(folder, "coordinator"))
    bare = socket.create_server((address, 0))
    threading.Thread(target=_take_bare, args=(bare,), daemon=True).start()
    print(json.dumps({"link": link.port, "bare": bare.getsockname()[1]}), flush=True)
    sys.stdin.read()
    link.stop(0.1)


def _take_bare(server: socket.socket) -> None:
    """Read what comes, in order, and answer with one byte when its announced length is there."""
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"+")
            left = int.from_bytes(connection.recv(8), "big")
            while left and (data := connection.recv(min(left, _PIECE))):
                left -= len(data)
            connection.sendall(b"+")


def bare_seconds(address: str, data: bytes) -> float:
    """A plain socket's time for the bytes."""
    with socket.create_connection(split_address(address)) as connection:
        connection.recv(1)
        started = time.monotonic()
        connection.sendall(len(data).to_bytes(8, "big"))
        connection.sendall(data)
        connection.recv(1)
        return time.monotonic() - started


def push_seconds(address: str, folder: Path, data: bytes) -> float:
    """The link's time for the bytes, over a new connection that has said hello."""
    path = folder / "vector"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    with LinkClient(address, tls_files(folder, ORG)) as client:
        client.hello({})
        started = time.monotonic()
        client.push(path, digest, {"run": "run-1", "round": 1})
        return time.monotonic() - started


def pull_seconds(address: str, folder: Path, digest: str, number: int) -> float:
    """The link's time for the same bytes the other way."""
    with LinkClient(address, tls_files(folder, ORG)) as client:
        client.hello({})
        started = time.monotonic()
        client.pull(digest, FileStore(folder / f"pulled-{number}"))
        return time.monotonic() - started


def compare(folder: Path, link: str, bare: str, size: int, times: int) -> dict[str, Any]:
    """Plain socket and link in turn over the same line, `times` each."""
    seconds: dict[str, list[float]] = {"bare": [], "push": [], "pull": []}
    for number in range(times):
        data = os.urandom(size)
        seconds["bare"].append(bare_seconds(bare, data))
        seconds["push"].append(push_seconds(link, folder, data))
        seconds["pull"].append(pull_seconds(link, folder, hashlib.sha256(data).hexdigest(), number))
    return {"bytes": size, **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
            "seconds": seconds}  # fmt: skip


def push_once(folder: Path, link: str, size: int) -> dict[str, Any]:
    """One push that may meet anything, dialled again as the daemon does; the offsets say where it went on."""
    data = os.urandom(size)
    path = folder / "vector"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    dialled = 0
    while True:
        dialled += 1
        try:
            with LinkClient(link, tls_files(folder, ORG)) as client:
                client.hello({})
                print("pushing", flush=True)
                receipt = client.push(path, digest, {"run": "run-1", "round": 1})
                offsets = client.hello({})["offsets"]
                return {"digest": digest, "receipt": receipt["digest"], "offsets": offsets, "dialled": dialled}
        except ConnectError:
            time.sleep(1.0)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("serve", "compare", "push"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--bytes", type=int, default=4 << 20)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    if given.what == "serve":
        serve(given.folder, given.addresses[0])
    elif given.what == "compare":
        print(json.dumps(compare(given.folder, *given.addresses, given.bytes, given.times)))
    else:
        print(json.dumps(push_once(given.folder, given.addresses[0], given.bytes)))


if __name__ == "__main__":
    main()
