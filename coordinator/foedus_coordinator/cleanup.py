"""What ended runs and broken transfers leave behind is erased: at a coordinator's start, and whenever a run ends.

Vectors go when their round is closed (`rounds.py`); here go those that came later and those that a kill left lying,
parts that nobody goes on with, and of ended runs the histories and agreements. Charters and sums stay: an extension
replays them. Who signed stays too, in the database.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from foedus_protocols.store import FileStore
from sqlalchemy import Connection, select

from foedus_coordinator.storage import Storage
from foedus_coordinator.tables import published, rounds, runs, vectors


def sweep(storage: Storage, *, files: FileStore, pushed: FileStore) -> None:
    """Erase what no run needs any more. Safe at any time, and to be killed at any instant.

    Guarantees:
        A vector that an open round of a run counts on is never touched: it is in the database, not yet erased.
    """
    going_on = [row.created for row in storage.runs() if row.state != "finished"]
    # Nothing of a run is older than the run; a clock that jumps cannot reach what the database knows of.
    before = min([*going_on, time.time()])
    for run, number in _rounds_with_vectors(storage):
        storage.erase_vectors(run, number, pushed.delete)
    erase_published(storage, files)
    for store in (files, pushed):
        store.drop_parts(older_than_seconds=time.time() - before)
    _erase_strangers(storage, pushed, before)
    for row in storage.runs():
        if row.state == "finished":
            for left in files.root.glob(f"sum-{row.id}-*.part"):
                left.unlink(missing_ok=True)


def _rounds_with_vectors(storage: Storage) -> list[tuple[str, int]]:
    """Ended rounds whose vectors are still on the disk."""
    at = (rounds.c.run == vectors.c.run) & (rounds.c.number == vectors.c.round)
    found = (
        select(vectors.c.run, vectors.c.round)
        .join(rounds, at)
        .where(vectors.c.erased == 0, rounds.c.state.in_(("closed", "failed")))
        .distinct()
    )
    with storage.read() as connection:
        return [(row.run, row.round) for row in connection.execute(found)]


def erase_published(storage: Storage, files: FileStore, *, ending: str = "") -> None:
    """Erase what was published only for runs that have ended or are `ending`; charters and sums stay."""
    with storage.write() as connection:
        ended = select(runs.c.id).where((runs.c.state == "finished") | (runs.c.id == ending))
        mine = published.c.run.in_(ended)
        candidates = set(connection.execute(select(published.c.digest).where(mine)).scalars())
        candidates -= _kept(connection, files)
        for digest in sorted(candidates):
            connection.execute(published.delete().where(published.c.digest == digest, mine))
            if connection.execute(select(published.c.run).where(published.c.digest == digest)).first() is None:
                files.delete(digest)


def _kept(connection: Connection, files: FileStore) -> set[str]:
    """Charters, sums, and the histories from which extensions start."""
    keep = {digest for digest in connection.execute(select(rounds.c.sum_digest)).scalars() if digest is not None}
    for row in connection.execute(select(runs.c.charter_digest, runs.c.extends)):
        keep.add(row.charter_digest)
        if row.extends is not None:
            terms = json.loads(files.path(row.charter_digest).read_bytes())
            keep.add(terms["extends"]["history"])
    return keep


def _erase_strangers(storage: Storage, store: FileStore, before: float) -> None:
    """Erase whole files that came in for a run that has ended since, and were never acknowledged."""
    for path in [path for path in store.root.glob("??/*") if _older(path, before)]:
        with storage.write() as connection:
            known = select(vectors.c.digest).where(vectors.c.digest == path.name, vectors.c.erased == 0)
            if connection.execute(known).first() is None:
                path.unlink(missing_ok=True)


def _older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime <= before
    except FileNotFoundError:
        return False  # Erased by somebody else meanwhile.
