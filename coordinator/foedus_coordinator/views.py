"""A coordinator's state as plain JSON values: what the commands print, and what programs read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from foedus_protocols.charter import Charter
from foedus_protocols.manifest import MANIFEST_FILE

from foedus_coordinator import figures, progress, pulse
from foedus_coordinator.chain import first_charter
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
        "extends": row.extends,
        "wish": row.wish if row.state != "finished" else None,
    }


def run_detail(home: Home, row: RunRow) -> dict[str, Any]:
    """Everything about one run: what it is doing, who signed, each round with its seconds by phase, losses, epsilon.

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
        **_now(home, row, terms),
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
        "loss_after": figures.loss_at(curve, row.released_after),
        "released_after": row.released_after,
        "bytes_up": up,
        "bytes_down": down,
        "created": row.created,
        "finished": row.finished,
    }


def _now(home: Home, row: RunRow, terms: dict[str, Any]) -> dict[str, Any]:
    """What the run is doing, for whom it waits, and what troubles its thread."""
    keys = {member.id: member.signing_key for member in home.members.roster().members}
    now = time.time()
    found = progress.look(
        home.storage,
        row,
        members={one["id"] for one in terms["participants"] if keys.get(one["id"]) == one["signing_key"]},
        seen=home.members.last_seen(),
        expires=terms["expires"],
        now=now,
    )
    running = home.is_locked()
    trouble = pulse.read(home.root).get("troubles", {}).get(row.id) if running else None
    return {
        "doing": found.doing,
        "waiting_for": found.waiting_for,
        "waiting_until": found.until,
        "organisations": found.orgs,
        "trouble": trouble,
        "coordinator_running": running,
        "time": now,
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
        "ca_fingerprint": home.shown_ca,
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

    charter = Charter.parse(home.files.path(row.charter_digest).read_bytes())
    return epsilon_after(charter, rounds, first=first_charter(charter, home.files))


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
