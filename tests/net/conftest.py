"""A served link on the loopback, with certificates for one organisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from foedus_protocols.channel import TlsFiles
from foedus_protocols.link import LinkServer, serve_link
from foedus_protocols.store import FileStore
from net import ends


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running link port, what it stores, and the organisation's identity."""

    server: LinkServer
    desk: ends.Desk
    tls: TlsFiles

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "ends"
    ends.make_identities(folder, ["127.0.0.1", "localhost"])
    desk = ends.Desk(FileStore(folder / "files"))
    server = serve_link("127.0.0.1:0", desk, ends.tls_files(folder, "coordinator"))
    yield Served(server=server, desk=desk, tls=ends.tls_files(folder, ends.ORG))
    server.stop(0.1)
