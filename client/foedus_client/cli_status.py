"""``foedus client status``: an organisation's own view of itself. It reads files and connects nowhere."""

from __future__ import annotations

import time
from typing import Any

from foedus_protocols.certificates import parse_certificate
from foedus_protocols.console import printable
from rich.console import Console
from rich.table import Table

from foedus_client import policy
from foedus_client.config import Home
from foedus_client.ledger import Ledger
from foedus_client.life import Life, life_of, paused
from foedus_client.lock import HomeLock
from foedus_client.state import ClientState

_DAY_SECONDS = 86_400.0


def status_of(home: Home) -> dict[str, Any]:
    """Certificate, daemon, budgets, charters, departures of the last day.

    Raises:
        StateError: Nobody has joined from this home.
    """
    config = home.load()
    joined = config.federation is not None
    expires = None
    if home.tls.certificate.exists():
        expires = parse_certificate(home.tls.certificate.read_bytes()).not_valid_after_utc.isoformat()
    return {
        "org": config.org,
        "federation": config.federation,
        "joined": joined,
        "certificate_expires": expires,
        "daemon": "running" if HomeLock.held(home.lock) else "stopped",
        "budgets": _budgets(home),
        **_memory(home),
    }


def _budgets(home: Home) -> list[dict[str, Any]]:
    """Each namespace's epsilon, recomputed from the ledger's events."""
    namespaces = policy.load(home.policy).namespaces
    if not home.ledger.exists():
        return []
    ledger = Ledger(home.ledger, read_only=True)
    ledger.verify_chain()
    opened = set(ledger.namespaces())
    return [
        {
            "namespace": name,
            "unit": terms.unit,
            "epsilon_spent": ledger.epsilon_spent(name, terms.delta) if name in opened else 0.0,
            "epsilon_cap": terms.epsilon_cap,
            "delta": terms.delta,
        }
        for name, terms in namespaces.items()
    ]


def _memory(home: Home) -> dict[str, Any]:
    if not home.state.exists():
        return {"paused": None, "life": vars(Life()), "charters": [], "left_today": []}
    with ClientState(home.state) as state:
        life, why = life_of(state), paused(state)
        charters = [{"digest": one.digest, "name": one.name, "state": one.state} for one in state.charters()]
        left = [
            {"kind": one.kind, "rule": one.rule, "round": one.round, "bytes": one.bytes, "digest": one.digest}
            for one in state.departures(since=time.time() - _DAY_SECONDS)
        ]
    return {"paused": why, "life": vars(life), "charters": charters, "left_today": left}


def status_table(found: dict[str, Any], console: Console) -> None:
    """The status for people."""
    table = Table(show_header=False, box=None)
    table.add_row("organisation", f"{found['org']} in {found['federation'] or 'no federation yet'}")
    table.add_row("daemon", found["daemon"] + (" (paused)" if found["paused"] is not None else ""))
    for name, text in _life_lines(found["life"], found["daemon"] == "running"):
        table.add_row(name, printable(text))
    table.add_row("certificate until", found["certificate_expires"] or "none yet")
    for one in found["budgets"]:
        spent = f"epsilon {one['epsilon_spent']:.4g} of {one['epsilon_cap']:g} spent at delta {one['delta']:g}"
        table.add_row(f"budget {one['namespace']}", f"{spent}, unit {one['unit']}")
    for one in found["charters"]:
        table.add_row(f"charter {one['digest'][:12]}", f"{one['name']}: {one['state']}")
    left = found["left_today"]
    table.add_row("left in 24 hours", f"{len(left)} messages and files, {sum(one['bytes'] for one in left)} bytes")
    console.print(table, markup=False, highlight=False)


def _life_lines(life: dict[str, Any], runs: bool) -> list[tuple[str, str]]:
    """What the daemon said of itself, and how long ago; what one that has ended said last is no news."""
    lines = []
    if runs and life["doing"]:
        lines.append(("now", f"{life['doing']} ({_ago(life['doing_since'])})"))
    if runs:
        contact = f"answered {_ago(life['last_contact'])} ago" if life["last_contact"] else "has not answered yet"
        lines.append(("coordinator", contact if life["connected_at"] else f"not connected, {contact}"))
    if life["last_error"]:
        lines.append(("last trouble", f"{life['last_error']} ({_ago(life['last_error_at'])} ago)"))
    return lines


def _ago(moment: float | None) -> str:
    seconds = 0.0 if moment is None else max(0.0, time.time() - moment)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
