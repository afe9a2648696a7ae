"""A link port at the far end of a slow line: of packets, or of a proxy's making."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from net import ends
from support import netns
from support.proxy import ShapingProxy
from support.wire import Line

ENDS = Path(__file__).with_name("ends.py")
ORG = "clinic"


@dataclass(frozen=True, kw_only=True)
class FarEnd:
    """A served link and a plain socket, as the organisation's end of the line reaches them.

    Attributes:
        kind: Which line this is, in words.
        folder: The identities; `ends.py` takes it.
        link: The link port's address.
        bare: The plain socket's address.
        files: The coordinator's folder of files.
        prefix: Words before a command that is to run at the organisation's end.
        outage: Lose everything for so many seconds, and return when the line carries again.
    """

    kind: str
    folder: Path
    link: str
    bare: str
    files: Path
    prefix: tuple[str, ...]
    outage: Callable[[float], None]

    def command(self, what: str, *arguments: str) -> list[str]:
        """An `ends.py` command at the organisation's end."""
        return [*self.prefix, sys.executable, str(ENDS), what, str(self.folder), *arguments]


@contextmanager
def packets(folder: Path, line: Line) -> Iterator[FarEnd]:
    """Serve behind a slow line of packets; `folder` gets identities."""
    address = netns.Network.address
    ends.make_identities(folder, [address])
    with ExitStack() as stack:
        network = stack.enter_context(netns.Network({ORG: line}))
        ports = _serve(stack, folder, address, network.at(netns.HUB))

        def outage(seconds: float) -> None:
            network.cut(ORG)
            time.sleep(seconds)
            network.mend(ORG)

        yield FarEnd(
            kind="packets through network namespaces",
            folder=folder,
            link=f"{address}:{ports['link']}",
            bare=f"{address}:{ports['bare']}",
            files=folder / "files",
            prefix=network.at(ORG),
            outage=outage,
        )


@contextmanager
def proxied(folder: Path, line: Line) -> Iterator[FarEnd]:
    """Serve behind shaping proxies; `folder` gets identities. An outage resets the connection here."""
    ends.make_identities(folder, ["127.0.0.1"])
    with ExitStack() as stack:
        ports = _serve(stack, folder, "127.0.0.1", ())
        shaped: dict[str, ShapingProxy] = {}
        for name, port in ports.items():
            proxy = ShapingProxy(
                ("127.0.0.1", port),
                rate_bytes=line.rate_bits / 8,
                delay_seconds=line.delay_seconds,
                loss=line.loss,
                seed=line.seed,
            )
            shaped[name] = stack.enter_context(proxy)

        def outage(seconds: float) -> None:
            shaped["link"].cut(seconds)
            time.sleep(seconds)

        yield FarEnd(
            kind="a shaping proxy",
            folder=folder,
            link=f"127.0.0.1:{shaped['link'].port}",
            bare=f"127.0.0.1:{shaped['bare'].port}",
            files=folder / "files",
            prefix=(),
            outage=outage,
        )


def _serve(stack: ExitStack, folder: Path, address: str, prefix: tuple[str, ...]) -> dict[str, int]:
    """Start the coordinator's end, and stop it with the stack."""
    server = subprocess.Popen(
        [*prefix, sys.executable, str(ENDS), "serve", str(folder), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(server.communicate)  # Its standard input ends, and so does it.
    assert server.stdout is not None
    ports: dict[str, int] = json.loads(server.stdout.readline())
    return ports
