"""How long to wait before something is tried again: twice as long each time up to a limit, and never quite the same."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from foedus_protocols.files import DiskFull

_FIRST_START, _LONGEST_START = 1.0, 60.0
_random = secrets.SystemRandom()


class Backoff:
    """The pauses of one thing that is tried again and again.

    Many parties meet the same trouble at once. Each pause is spread around its length so that they do not come back at
    once too.
    """

    def __init__(self, first: float, longest: float, *, spread: float = 0.5) -> None:
        """Begin with a pause of `first` seconds.

        Args:
            first: Seconds of the first pause.
            longest: What doubling stops at.
            spread: A pause lasts up to this part of its length more or less.
        """
        self._first = self._next = first
        self._longest = longest
        self._spread = spread

    def reset(self) -> None:
        """It went well: what comes now is new trouble."""
        self._next = self._first

    def at_least(self, seconds: float) -> None:
        """Make the next pause no shorter than this."""
        self._next = max(self._next, seconds)

    def pause(self, longest: float | None = None) -> float:
        """Seconds to wait now.

        Args:
            longest: Another limit for the pauses that follow.
        """
        seconds = self._next * _random.uniform(1 - self._spread, 1 + self._spread)
        self._next = min(self._next * 2, self._longest if longest is None else longest)
        return seconds


def start_when_there_is_space(serve: Callable[[], None], *, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Run a process's body; where a full disk ends it, say so and begin again with growing pauses.

    A machine that restarts at night beside a full disk is to come back by itself. Trouble that a person has to mend (a
    disk that is read-only, a damaged database) ends the start with its error.

    Args:
        serve: The whole of the process, from opening its files on; returns when it was asked to stop.
        stop: Set where the process is to end.
        say: Takes a line for the log.
    """
    backoff = Backoff(_FIRST_START, _LONGEST_START)
    while not stop.is_set():
        try:
            serve()
            return
        except DiskFull as error:
            pause = backoff.pause()
            say(f"{error}; starting again in {pause:.0f} s")
            stop.wait(pause)
