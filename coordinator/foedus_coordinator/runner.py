"""One run's thread: it goes on after an error by itself, and gives up by name where going on cannot help.

A full disk, a locked database or a machine short of memory passes: the thread tries again, with growing pauses, for as
long as it takes. An error that comes back in the same words, time after time, is one that trying does not mend: the run
is closed as failed with it as the reason, so that nobody waits for a run that will never go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from foedus_protocols.backoff import Backoff
from foedus_protocols.errors import FoedusError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.logs import frames_of
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from foedus_coordinator.run import Interrupted
from foedus_coordinator.storage import Storage

_LOG = logging.getLogger("foedus.coordinator")

SAME_ERROR_TRIES = 8
"""Pauses of 1, 2, 4, 8, 16, 32 and 60 s lie between these: some two minutes, in which a person may mend it."""
_WELL_SECONDS = 600.0  # After a try that went well for so long an error counts as a new one.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_PASSING = (OSError, SQLAlchemyError, MemoryError, DiskTrouble)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a run's thread waits: the error, how often it came in a row, and when it tries again (Unix seconds)."""

    error: str
    tries: int
    since: float
    again_at: float


def keep_going(
    run: str,
    play: Callable[[], None],
    *,
    storage: Storage,
    stop: threading.Event,
    say: Callable[[str], None],
    report: Callable[[Trouble | None], None],
) -> None:
    """Call `play` until the run has ended or the coordinator shuts down.

    Args:
        run: The run's id.
        play: Puts the run together and executes it; starts from the database each time.
        storage: Where a run that cannot go on is given up.
        stop: Set when the coordinator shuts down.
        say: Takes one line of progress.
        report: Takes the trouble that the run is in, and None when the run has ended. That it goes well again is for
            `play` to report.
    """
    backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE, spread=0.25)
    last, tries, since = "", 0, 0.0
    while not stop.is_set():
        begun = time.monotonic()
        try:
            play()
            report(None)
            return
        except Interrupted:
            say(f"{run}: interrupted, goes on at the next start")
            return
        except Exception as error:  # Whatever it is, the other runs and the ports go on, and so does this one.
            found = words(error)
            if found != last or time.monotonic() - begun > _WELL_SECONDS:
                last, tries, since = found, 0, time.time()
                backoff.reset()
            tries += 1
            passing = isinstance(error, _PASSING)
            if not passing and not isinstance(error, FoedusError):
                _LOG.error("%s: %s", run, frames_of(error))
        if tries >= SAME_ERROR_TRIES and not passing and (state := _give_up(run, last, storage, say)) is not None:
            if state == "finished":
                report(None)
                return
            last, tries = "", 0
            continue
        seconds = backoff.pause()
        say(f"{run}: {last} (time {tries}); tries again in {seconds:.0f} s")
        report(Trouble(error=last, tries=tries, since=since, again_at=time.time() + seconds))
        stop.wait(seconds)


def _give_up(
    run: str, error: str, storage: Storage, say: Callable[[str], None]
) -> Literal["closing", "finished"] | None:
    """Close a run that cannot go on; one that cannot even be closed is finished without telling anybody.

    Returns:
        The state that the run was put into; None where that could not be written.
    """
    reason = f"gave up after {SAME_ERROR_TRIES} tries: {error}"
    try:
        row = storage.run(run)
        if row.state == "closing" and row.outcome == "failed":
            storage.update_run(run, state="finished", finished=time.time())
            say(f"{run}: finished without a notice to its participants")
            return "finished"
        storage.update_run(run, state="closing", outcome="failed", reason=reason)
    except (FoedusError, SQLAlchemyError) as other:
        _LOG.warning("%s cannot be given up now: %s", run, words(other))
        return None
    say(f"{run}: {reason}")
    return "closing"


def words(error: Exception) -> str:
    """What is said of an error. The text of one that is not ours may quote what it choked on, so it is not repeated."""
    if isinstance(error, FoedusError):
        return str(error)
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or 'no reason given'}"
    if isinstance(error, DBAPIError):
        return f"the database: {error.orig}"
    return f"an unexpected {type(error).__name__}; the coordinator's log says where"
