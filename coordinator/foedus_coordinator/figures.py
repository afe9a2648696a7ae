"""What a run's card and table are made of: scores, seconds, bytes; and which files may be pulled by whom.

Plain functions on an open transaction of `storage.Storage`, so that a caller decides what is committed together.
"""

from __future__ import annotations

from dataclasses import dataclass

from foedus_protocols.messages import Scores
from sqlalchemy import Connection, func, select

from foedus_coordinator.tables import participants, published, scores, timings, traffic


def publish(connection: Connection, digest: str, run: str = "") -> None:
    """Let the participants of a run, or without one every member, pull a file."""
    at = (published.c.digest == digest, published.c.run == run)
    if connection.execute(select(published.c.digest).where(*at)).first() is None:
        connection.execute(published.insert().values(digest=digest, run=run))


def run_of_file(connection: Connection, digest: str, org: str) -> str | None:
    """The run for which an organisation may pull a file ("" for every member's), or None where it may not."""
    mine = select(participants.c.run).where(participants.c.org == org)
    allowed = select(published.c.run).where(
        published.c.digest == digest, (published.c.run == "") | published.c.run.in_(mine)
    )
    return connection.execute(allowed).scalars().first()


def add_scores(connection: Connection, run: str, after: int, org: str, value: Scores) -> None:
    """Keep what an organisation reported about the adapter after `after` closed rounds; the first report stands."""
    at = (scores.c.run == run, scores.c.after == after, scores.c.org == org)
    if connection.execute(select(scores.c.org).where(*at)).first() is None:
        connection.execute(scores.insert().values(run=run, after=after, org=org, **value.model_dump()))


def scores_of(connection: Connection, run: str) -> dict[int, dict[str, Scores]]:
    """Scores by closed rounds and organisation."""
    out: dict[int, dict[str, Scores]] = {}
    for row in connection.execute(select(scores).where(scores.c.run == run).order_by(scores.c.after, scores.c.org)):
        value = Scores(loss_sum=row.loss_sum, tokens=row.tokens, units=row.units)
        out.setdefault(row.after, {})[row.org] = value
    return out


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Held-out loss in nats a token after some closed rounds, over the same organisations at every point of a run."""

    after: int
    loss: float
    tokens: int


def losses(scores: dict[int, dict[str, Scores]]) -> list[Loss]:
    """The curve of a run: token losses summed over the organisations that reported at every point.

    Args:
        scores: By closed rounds and organisation (`scores_of`).

    Returns:
        One point for each number of closed rounds; empty where no organisation reported at all of them.
    """
    if not scores:
        return []
    common = set.intersection(*(set(by_org) for by_org in scores.values()))
    points = []
    for after, by_org in sorted(scores.items()):
        tokens = sum(by_org[org].tokens for org in common)
        if tokens > 0:
            total = sum(by_org[org].loss_sum for org in common)
            points.append(Loss(after=after, loss=total / tokens, tokens=tokens))
    return points


def lowest(curve: list[Loss]) -> Loss:
    """The point with the lowest loss; of equals the latest, which was trained on most."""
    return min(reversed(curve), key=lambda point: point.loss)


def loss_at(curve: list[Loss], after: int | None) -> float | None:
    """The loss after so many closed rounds, where it was measured; without a number the newest one."""
    if after is None:
        return curve[-1].loss if curve else None
    return next((point.loss for point in curve if point.after == after), None)


def add_seconds(connection: Connection, run: str, number: int, phase: str, seconds: float) -> None:
    """Add to what a phase of a round took; a resumed phase adds up."""
    at = (timings.c.run == run, timings.c.round == number, timings.c.phase == phase)
    done = connection.execute(timings.update().where(*at).values(seconds=timings.c.seconds + seconds))
    if done.rowcount == 0:
        connection.execute(timings.insert().values(run=run, round=number, phase=phase, seconds=seconds))


def seconds_of(connection: Connection, run: str) -> dict[int, dict[str, float]]:
    """Seconds by round and phase."""
    out: dict[int, dict[str, float]] = {}
    for row in connection.execute(select(timings).where(timings.c.run == run).order_by(timings.c.round)):
        out.setdefault(row.round, {})[row.phase] = row.seconds
    return out


def count_bytes(connection: Connection, run: str, org: str, *, up: int = 0, down: int = 0) -> None:
    """Add to a run's traffic with one organisation."""
    at = (traffic.c.run == run, traffic.c.org == org)
    more = {"bytes_up": traffic.c.bytes_up + up, "bytes_down": traffic.c.bytes_down + down}
    if connection.execute(traffic.update().where(*at).values(**more)).rowcount == 0:
        connection.execute(traffic.insert().values(run=run, org=org, bytes_up=up, bytes_down=down))


def bytes_of(connection: Connection, run: str) -> tuple[int, int]:
    """Bytes up and down of a run, all organisations together."""
    total = select(func.sum(traffic.c.bytes_up), func.sum(traffic.c.bytes_down)).where(traffic.c.run == run)
    up, down = connection.execute(total).one()
    return int(up or 0), int(down or 0)
