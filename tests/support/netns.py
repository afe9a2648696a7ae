"""A coordinator and some organisations in network namespaces of their own, each organisation behind a slow line.

Every organisation has one namespace with one route: over its line to the hub, where the coordinator runs. The lines are
those of `wire.py`. Making namespaces needs root, the `ip` command and TUN devices; `why_not` says what is missing, and
tests then use `proxy.py`, which needs nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from support.wire import Line

HUB = "hub"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def why_not() -> str | None:
    """What keeps this machine from making slow lines of packets, or None."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no `ip` command"
    if not Path("/dev/net/tun").exists():
        return "no TUN devices"
    probe = f"fd-probe-{secrets.token_hex(2)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode != 0:
        return "no network namespaces"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


class Network:
    """Namespaces and lines, for as long as the block lasts.

    The coordinator's address is `address` from everywhere; `at(place)` is the beginning of a command that runs in one
    place, `HUB` or an organisation's name.
    """

    address = "10.97.0.1"

    def __init__(self, lines: dict[str, Line]) -> None:
        self._lines = lines
        self._tag = f"fd{secrets.token_hex(2)}"
        self._wire: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def at(self, place: str) -> tuple[str, ...]:
        """The words to put before a command so that it runs there, in the same process."""
        return ("ip", "netns", "exec", self._name(place))

    def cut(self, org: str) -> None:
        """Lose everything on an organisation's line from now on, without a word to either side."""
        self._command(f"cut {list(self._lines).index(org)}")

    def mend(self, org: str) -> None:
        """Carry its packets again."""
        self._command(f"mend {list(self._lines).index(org)}")

    def _name(self, place: str) -> str:
        return f"{self._tag}-{place}"

    def _make(self) -> None:
        for place in (HUB, *self._lines):
            _ip("netns", "add", self._name(place))
            _ip("-n", self._name(place), "link", "set", "dev", "lo", "up")
        _ip("-n", self._name(HUB), "addr", "add", f"{self.address}/32", "dev", "lo")
        devices = []
        try:
            for number, org in enumerate(self._lines, start=1):
                near = self._device(f"{self._tag}n{number}", HUB, f"10.97.{number}.1", f"10.97.{number}.2")
                devices.append(near)
                devices.append(self._device(f"{self._tag}f{number}", org, f"10.97.{number}.2", f"10.97.{number}.1"))
                _ip("-n", self._name(org), "route", "add", "default", "via", f"10.97.{number}.1")
            self._start(devices)
        finally:
            for descriptor in devices:
                os.close(descriptor)

    def _device(self, name: str, place: str, address: str, peer: str) -> int:
        """A TUN device that lives in a namespace; its packets come to us."""
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        _ip("link", "set", "dev", name, "netns", self._name(place))
        _ip("-n", self._name(place), "addr", "add", address, "peer", peer, "dev", name)
        _ip("-n", self._name(place), "link", "set", "dev", name, "up")
        return descriptor

    def _start(self, devices: list[int]) -> None:
        pairs = list(zip(devices[::2], devices[1::2], strict=True))
        described = {"lines": [asdict(line) for line in self._lines.values()], "devices": pairs}
        self._wire = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("wire.py")), json.dumps(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=devices,
            text=True,
        )
        self._expect("up")

    def _command(self, command: str) -> None:
        assert self._wire is not None
        assert self._wire.stdin is not None
        self._wire.stdin.write(command + "\n")
        self._wire.stdin.flush()
        self._expect(command)

    def _expect(self, line: str) -> None:
        assert self._wire is not None
        assert self._wire.stdout is not None
        said = self._wire.stdout.readline().strip()
        if said != line:
            raise RuntimeError(f"expected the wire to say {line!r}, got {said!r}")

    def _remove(self) -> None:
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate()
        for place in (HUB, *self._lines):
            subprocess.run(["ip", "netns", "del", self._name(place)], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}")
