"""What a run is doing at this moment and for whom it waits, from the database alone: what `run show` says.

So it can be told from another process, and while the coordinator is down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from foedus_protocols.envelope import Envelope
from foedus_protocols.messages import TrainAnswer
from sqlalchemy import Connection, select

from foedus_coordinator.presence import AWAY_SECONDS
from foedus_coordinator.storage import RoundRow, RunRow, Storage
from foedus_coordinator.tables import messages

_BUSY = {
    "charter": "deciding on the charter",
    "train": "training",
    "advance": "computing the next adapter",
    "evaluate": "scoring",
    "close": "not told yet",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One look at a run.

    Attributes:
        doing: What the run does, in words.
        waiting_for: Organisations whose answer the run waits for.
        orgs: For each participant, where it stands, in words.
        until: When the wait ends at the latest, in Unix seconds; None where nothing is waited for, or forever.
    """

    doing: str
    waiting_for: list[str]
    orgs: dict[str, str]
    until: float | None


def look(
    storage: Storage,
    row: RunRow,
    *,
    members: set[str],
    seen: Mapping[str, float | None],
    expires: float,
    now: float,
) -> Progress:
    """Look at a run.

    Args:
        storage: The coordinator's database.
        row: The run.
        members: Participants that are members, under the key that the charter names.
        seen: When each organisation was last heard of.
        expires: The charter's end.
        now: Unix seconds.
    """
    rounds = storage.rounds(row.id)
    doing, kind, number, until = _stage(row, rounds, expires)
    orgs: dict[str, str] = {}
    waiting: list[str] = []
    for org, (signature, step) in sorted(storage.signatures(row.id).items()):
        said = _answer(storage, row.id, number, kind, org) if kind else None
        if row.state == "agreeing":
            said = "signed" if signature else None if step is None else f"refused at check {step}"
        if kind is None or said is not None:
            orgs[org] = said or "-"
        elif org not in members:
            orgs[org] = "no longer a member"
        else:
            orgs[org] = _whereabouts(seen.get(org), _BUSY[kind], now)
            waiting.append(org)
    return Progress(doing=doing, waiting_for=waiting, orgs=orgs, until=until if waiting else None)


def _stage(row: RunRow, rounds: list[RoundRow], expires: float) -> tuple[str, str | None, int, float | None]:
    """What the run does, the type and round of the message that it waits for, and until when."""
    if row.state == "finished":
        return f"ended: {row.outcome} ({row.reason})", None, 0, None
    if row.state == "closing":
        if row.variant is None and row.outcome in ("complete", "stopped"):
            return "ending: scoring the last adapter and writing the variant", "evaluate", len(rounds) + 1, None
        return f"ending as {row.outcome}: telling the participants", "close", 0, None
    if row.state == "agreeing":
        return "waiting for signatures", "charter", 0, expires
    if not rounds or rounds[-1].state in ("closed", "failed"):
        if row.wish == "pause":
            return (
                f"paused before round {len(rounds) + 1}; `foedus coordinator run resume` lets it go on",
                None,
                0,
                None,
            )
        return f"about to open round {len(rounds) + 1}", None, 0, None
    last = rounds[-1]
    pausing = ", then pausing" if row.wish == "pause" else ""
    if last.state == "offered":
        again = "" if last.attempt == 1 else f" (attempt {last.attempt})"
        return f"round {last.number}: collecting vectors{again}{pausing}", "train", last.number, last.deadline
    if last.state == "advanced":
        return f"round {last.number}: comparing the next adapter{pausing}", "advance", last.number, None
    return f"round {last.number}: adding up{pausing}", None, 0, None


def _answer(storage: Storage, run: str, number: int, kind: str, org: str) -> str | None:
    """What an organisation has answered to the newest message of a type, in words; None where it has not."""
    if kind == "train" and any(one.org == org and one.verdict == "included" for one in storage.vectors(run, number)):
        return "vector is in"
    with storage.read() as connection:
        answer = _newest_answer(connection, run, number, kind, org)
    if answer is None:
        return None
    if kind == "train":
        step = TrainAnswer.decode(Envelope.decode(answer).body).refused_step
        return "answered without a vector" if step is None else f"refused at check {step}"
    return "answered"


def _newest_answer(connection: Connection, run: str, number: int, kind: str, org: str) -> bytes | None:
    at = (messages.c.run == run, messages.c.round == number, messages.c.type == kind, messages.c.org == org)
    newest = select(messages.c.answer).where(*at).order_by(messages.c.attempt.desc()).limit(1)
    return connection.execute(newest).scalar()


def _whereabouts(seen: float | None, busy: str, now: float) -> str:
    if seen is None:
        return "never seen"
    if now - seen > AWAY_SECONDS:
        return f"not seen since {datetime.fromtimestamp(seen, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return busy
