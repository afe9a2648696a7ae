"""Messages that are put aside until a moment, so that others are answered meanwhile.

Two kinds of message wait: one whose vector has to leave at its slot, and one that could not be answered. The second
kind waits longer each time it fails, and the daemon learns how often it has failed so far, since a message that fails
again and again (a poison message) must not hold up the rest for ever.

Nothing here is durable: the coordinator keeps each message until it is answered, and hands it out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 300.0
_REMEMBERED = 1000  # Messages that failed and never came again; the oldest are forgotten.


@dataclass
class _Waiting:
    """One message: when it is due, whether its bytes are at hand, and how often it failed."""

    due: float = 0.0
    at_hand: bool = False
    failures: int = 0


class Later:
    """What is put aside, by the message's bytes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[bytes, _Waiting] = {}

    def put_aside(self, message: bytes, seconds: float) -> None:
        """Do not look at a message for so long."""
        entry = self._entry(message)
        entry.due, entry.at_hand = self._clock() + seconds, True

    def failed(self, message: bytes) -> int:
        """Put a message aside that could not be answered, each time for twice as long; returns how often it failed."""
        entry = self._entry(message)
        entry.failures += 1
        self.put_aside(message, min(_FIRST_SECONDS * 2.0 ** (entry.failures - 1), _LONGEST_SECONDS))
        return entry.failures

    def waits(self, message: bytes) -> bool:
        """Whether a message that came (again) is not due yet."""
        entry = self._waiting.get(message)
        if entry is None or entry.due <= self._clock():
            return False
        entry.at_hand = True
        return True

    def due(self) -> bytes | None:
        """A message that is due now; it is handed out once."""
        now = self._clock()
        ready = [(entry.due, message) for message, entry in self._waiting.items() if entry.at_hand and entry.due <= now]
        if not ready:
            return None
        message = min(ready)[1]
        self._waiting[message].at_hand = False
        return message

    def soonest(self) -> float | None:
        """In how many seconds the next message is due; None where none is at hand."""
        moments = [entry.due for entry in self._waiting.values() if entry.at_hand]
        return None if not moments else max(0.0, min(moments) - self._clock())

    def done(self, message: bytes) -> None:
        """A message was answered."""
        self._waiting.pop(message, None)

    def let_go(self) -> None:
        """Drop the bytes that are at hand, and keep when they are due: the coordinator hands them out again."""
        for entry in self._waiting.values():
            entry.at_hand = False

    def _entry(self, message: bytes) -> _Waiting:
        while len(self._waiting) >= _REMEMBERED and message not in self._waiting:
            del self._waiting[next(iter(self._waiting))]
        return self._waiting.setdefault(message, _Waiting())
