"""``foedus client status``: an organisation's own view of itself. It reads files and connects nowhere."""

from __future__ import annotations

import time
from typing import Any

from foedus_protocols.certificates import parse_certificate
from rich.console import Console
from rich.table import Table

from foedus_client import policy
from foedus_client.config import Home
from foedus_client.ledger import Ledger
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
    ledger = Ledger(home.ledger)
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
        return {"charters": [], "left_today": []}
    state = ClientState(home.state)
    try:
        charters = [{"digest": one.digest, "name": one.name, "state": one.state} for one in state.charters()]
        left = [
            {"kind": one.kind, "rule": one.rule, "round": one.round, "bytes": one.bytes, "digest": one.digest}
            for one in state.departures(since=time.time() - _DAY_SECONDS)
        ]
    finally:
        state.close()
    return {"charters": charters, "left_today": left}


def status_table(found: dict[str, Any], console: Console) -> None:
    """The status for people."""
    table = Table(show_header=False, box=None)
    table.add_row("organisation", f"{found['org']} in {found['federation'] or 'no federation yet'}")
    table.add_row("daemon", found["daemon"])
    table.add_row("certificate until", found["certificate_expires"] or "none yet")
    for one in found["budgets"]:
        spent = f"epsilon {one['epsilon_spent']:.4g} of {one['epsilon_cap']:g} spent at delta {one['delta']:g}"
        table.add_row(f"budget {one['namespace']}", f"{spent}, unit {one['unit']}")
    for one in found["charters"]:
        table.add_row(f"charter {one['digest'][:12]}", f"{one['name']}: {one['state']}")
    left = found["left_today"]
    table.add_row("left in 24 hours", f"{len(left)} messages and files, {sum(one['bytes'] for one in left)} bytes")
    console.print(table, markup=False, highlight=False)
