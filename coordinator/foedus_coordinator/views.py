"""A coordinator's state as plain JSON values: what the commands print, and what programs read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from foedus_protocols.charter import Charter
from foedus_protocols.manifest import MANIFEST_FILE

from foedus_coordinator import figures
from foedus_coordinator.config import Home, at
from foedus_coordinator.storage import RoundRow, RunRow
from foedus_coordinator.variant import epsilon_after


def run_line(home: Home, row: RunRow) -> dict[str, Any]:
    """One run in a list."""
    terms = _terms(home, row)
    rounds = home.storage.rounds(row.id)
    return {
        "run": row.id,
        "state": row.state,
        "outcome": row.outcome,
        "reason": row.reason,
        "rounds_closed": sum(one.state == "closed" for one in rounds),
        "rounds": terms["privacy"]["rounds"],
        "participants": [participant["id"] for participant in terms["participants"]],
        "variant": row.variant,
    }


def run_detail(home: Home, row: RunRow) -> dict[str, Any]:
    """Everything about one run: who signed, each round with its seconds by phase, losses, epsilon, bytes.

    ``epsilon`` is filled in once the run has ended; until then only ``epsilon_agreed``, which it cannot pass.
    """
    terms = _terms(home, row)
    rounds = home.storage.rounds(row.id)
    with home.storage.read() as connection:
        seconds = figures.seconds_of(connection, row.id)
        curve = figures.losses(figures.scores_of(connection, row.id))
        up, down = figures.bytes_of(connection, row.id)
    answers = home.storage.signatures(row.id)
    return {
        **run_line(home, row),
        "charter": row.charter_digest,
        "purpose": terms["purpose"],
        "private": terms["privacy"]["mode"] != "none",
        "delta": terms["privacy"].get("delta"),
        "epsilon_agreed": terms["privacy"].get("epsilon"),
        "epsilon": _epsilon(home, row, len(rounds)),
        "answers": {
            org: "signed" if signed else "waiting" if step is None else f"refused at check {step}"
            for org, (signed, step) in answers.items()
        },
        "round_list": [_round(one, set(answers), seconds.get(one.number, {})) for one in rounds],
        "evaluate_seconds": seconds.get(len(rounds) + 1, {}).get("evaluate"),
        "losses": [vars(point) for point in curve],
        "loss_before": curve[0].loss if curve else None,
        "loss_after": curve[-1].loss if curve else None,
        "bytes_up": up,
        "bytes_down": down,
        "created": row.created,
        "finished": row.finished,
    }


def status(home: Home) -> dict[str, Any]:
    """The federation at a glance."""
    roster = home.members.roster()
    seen = home.members.last_seen()
    return {
        "federation": home.config.federation,
        "home": str(home.root),
        "link": at(home.config.address, home.config.link_port),
        "enrolment": at(home.config.address, home.config.enrolment_port),
        "ca_fingerprint": home.authority.fingerprint,
        "running": home.is_locked(),
        "roster_version": roster.version,
        "members": [
            {"org": member.id, "fingerprint": member.fingerprint, "last_seen": seen.get(member.id)}
            for member in roster.members
        ],
        "requests": [
            {"org": request.org, "fingerprint": request.fingerprint, "created": request.created}
            for request in home.members.requests()
            if request.state == "pending"
        ],
        "runs": [run_line(home, row) for row in home.storage.runs()],
        "secure_aggregation": False,
        "time": time.time(),
    }


def _terms(home: Home, row: RunRow) -> dict[str, Any]:
    """A run's charter as plain JSON: it was checked when it was signed, and `Charter` would load the accountant."""
    terms: dict[str, Any] = json.loads(home.files.path(row.charter_digest).read_bytes())
    return terms


def _epsilon(home: Home, row: RunRow, rounds: int) -> float | None:
    """What an ended run has spent: as its variant says, else as the accountant does."""
    if row.state != "finished":
        return None
    if row.variant is not None and (Path(row.variant) / MANIFEST_FILE).exists():
        signed = json.loads((Path(row.variant) / MANIFEST_FILE).read_bytes())
        spent: float | None = signed["manifest"]["privacy"]["epsilon"]
        return spent

    return epsilon_after(Charter.parse(home.files.path(row.charter_digest).read_bytes()), rounds)


def _round(row: RoundRow, orgs: set[str], seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "round": row.number,
        "state": row.state,
        "attempt": row.attempt,
        "survivors": list(row.survivors),
        "missing": sorted(orgs - set(row.survivors)) if row.state != "offered" else [],
        "reason": row.reason,
        "adapter": row.adapter_digest,
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
    }
