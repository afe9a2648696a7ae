"""Is a coordinator well? Checks that look from outside, as an operator's monitor would, and change nothing.

Each check finds its own trouble; the first of the list decides the exit code, so the most telling come first.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from foedus_protocols.certificates import parse_certificate
from foedus_protocols.channel import TlsFiles
from foedus_protocols.errors import ConnectError, FoedusError, RoundFailed, StateError, VerificationError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from foedus_coordinator import pulse
from foedus_coordinator.config import Home, at

LOW_DISK_BYTES = 512 << 20
_PORT_SECONDS = 5.0
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # nosec B104: it is dialled, not bound.


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is as it should be.
        detail: What was found, in words.
        exit_code: What the command leaves with where this is the first that is not ok (``docs/exit-codes.md``).
    """

    name: str
    ok: bool
    detail: str
    exit_code: int


def look(home: Home) -> list[Check]:
    """All checks, in order: process, disk, database, certificate, ports, runs."""
    said = pulse.read(home.root)
    running = home.is_locked()
    found = [
        _running(running, said),
        _disk(home),
        _database(home),
        _certificate(home.tls),
    ]
    if running:
        found += [*_ports(home, said), _runs(said)]
    return found


def _running(running: bool, said: dict[str, Any]) -> Check:
    if not running:
        return _check("process", StateError, "not running; start it with `foedus coordinator up`", ok=False)
    hours = (time.time() - said.get("started", time.time())) / 3600
    return _check("process", StateError, f"running for {hours:.1f} h, process {said.get('pid', 'unknown')}")


def _disk(home: Home) -> Check:
    free = shutil.disk_usage(home.root).free
    found = f"{free / (1 << 20):,.0f} MiB free in {home.root}"
    if free >= LOW_DISK_BYTES:
        return _check("disk", StateError, found)
    return _check("disk", StateError, f"{found}, fewer than {LOW_DISK_BYTES >> 20}: free some space", ok=False)


def _database(home: Home) -> Check:
    """Whether the database can be read, and SQLite finds its pages in order."""
    try:
        with home.storage.read() as connection:
            if home.storage.engine.dialect.name != "sqlite":
                connection.execute(text("SELECT 1"))
                return _check("database", StateError, "answers")
            problems = [str(value) for value in connection.execute(text("PRAGMA quick_check(3)")).scalars()]
    except (FoedusError, SQLAlchemyError, OSError) as error:
        problems = [str(getattr(error, "orig", error))]
    if problems == ["ok"]:
        return _check("database", StateError, "in order")
    text_ = f"damaged ({'; '.join(problems)}): stop the coordinator and restore the newest backup"
    return _check("database", StateError, text_, ok=False)


def _certificate(tls: TlsFiles) -> Check:
    """Whether the ports' certificate is valid, and is renewed in time: at half of its life."""
    try:
        certificate = parse_certificate(tls.certificate.read_bytes())
    except (FoedusError, OSError) as error:
        return _check("certificate", VerificationError, f"cannot be read: {error}", ok=False)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    days = f"{left.total_seconds() / 86_400:.1f} days left"
    if left < life / 4:
        return _check("certificate", VerificationError, f"{days}: not renewed in time, see the log", ok=False)
    return _check("certificate", VerificationError, days)


def _ports(home: Home, said: dict[str, Any]) -> Iterator[Check]:
    """Whether both ports answer with a certificate of this federation's authority."""
    config = home.config
    configured = {
        "link": at(config.address, config.link_port),
        "enrolment": at(config.address, config.enrolment_port),
    }
    for name, address in configured.items():
        port = int(said.get(name, address).rpartition(":")[2])
        try:
            _shake_hands(_ANY_HOST.get(config.listen, config.listen), port, config.address, home.tls)
        except OSError as error:  # Also what TLS does not like.
            detail = f"port {port} does not answer: {error.strerror or error}"
            yield _check(f"{name} port", ConnectError, detail, ok=False)
        else:
            yield _check(f"{name} port", ConnectError, f"port {port} answers")


def _shake_hands(host: str, port: int, name: str, tls: TlsFiles) -> None:
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=_PORT_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname=name),
    ):
        pass


def _runs(said: dict[str, Any]) -> Check:
    troubles: dict[str, dict[str, Any]] = said.get("troubles", {})
    if not troubles:
        return _check("runs", RoundFailed, "no run is in trouble")
    words = "; ".join(f"{run}: {one['error']} ({one['tries']} times)" for run, one in sorted(troubles.items()))
    return _check("runs", RoundFailed, words, ok=False)


def _check(name: str, kind: type[FoedusError], detail: str, *, ok: bool = True) -> Check:
    return Check(name=name, ok=ok, detail=detail, exit_code=kind.exit_code)
