"""A coordinator's state as plain JSON values: what the commands print, and what programs read."""

from __future__ import annotations

import time
from typing import Any

from foedus_protocols.charter import Charter

from foedus_coordinator import figures
from foedus_coordinator.config import Home
from foedus_coordinator.storage import RoundRow, RunRow
from foedus_coordinator.variant import epsilon_after, losses


def run_line(home: Home, row: RunRow) -> dict[str, Any]:
    """One run in a list."""
    charter = charter_of(home, row)
    rounds = home.storage.rounds(row.id)
    return {
        "run": row.id,
        "state": row.state,
        "outcome": row.outcome,
        "reason": row.reason,
        "rounds_closed": sum(one.state == "closed" for one in rounds),
        "rounds": charter.privacy.rounds,
        "participants": [participant.id for participant in charter.participants],
        "variant": row.variant,
    }


def run_detail(home: Home, row: RunRow) -> dict[str, Any]:
    """Everything about one run: who signed, each round with its seconds by phase, losses, epsilon, bytes."""
    charter = charter_of(home, row)
    rounds = home.storage.rounds(row.id)
    with home.storage.read() as connection:
        seconds = figures.seconds_of(connection, row.id)
        curve = losses(figures.scores_of(connection, row.id))
        up, down = figures.bytes_of(connection, row.id)
    answers = home.storage.signatures(row.id)
    return {
        **run_line(home, row),
        "charter": row.charter_digest,
        "purpose": charter.purpose,
        "private": charter.private,
        "delta": charter.privacy.delta,
        "epsilon_agreed": charter.privacy.epsilon,
        "epsilon": epsilon_after(charter, len(rounds)) if rounds else (0.0 if charter.private else None),
        "answers": {
            org: "signed" if signed else "waiting" if step is None else f"refused at check {step}"
            for org, (signed, step) in answers.items()
        },
        "round_list": [_round(charter, one, seconds.get(one.number, {})) for one in rounds],
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
        "link": f"{home.config.address}:{home.config.link_port}",
        "enrolment": f"{home.config.address}:{home.config.enrolment_port}",
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


def charter_of(home: Home, row: RunRow) -> Charter:
    """A run's charter."""
    return Charter.parse(home.files.path(row.charter_digest).read_bytes())


def _round(charter: Charter, row: RoundRow, seconds: dict[str, float]) -> dict[str, Any]:
    orgs = {participant.id for participant in charter.participants}
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
