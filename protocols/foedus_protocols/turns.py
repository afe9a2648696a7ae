"""How much of the link one member may hold, so that it cannot starve the others.

Two limits: a few calls at once, beyond which a call is refused and may come again; and, of the slots for large
transfers, one for each member, for which a second transfer of the same member waits its turn.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from foedus_protocols.channel import Busy

CALLS_AT_ONCE = 4
"""A daemon has one call open, two while it trains; a command beside it one more; the rest are broken ones that the
coordinator has not noticed yet."""


class Turns:
    """Who is being served. Safe to use from many threads."""

    def __init__(self, slots: int, *, calls_at_once: int = CALLS_AT_ONCE) -> None:
        self._calls_at_once = calls_at_once
        self._changed = threading.Condition()
        self._calls: Counter[str] = Counter()
        self._free = slots
        self._transferring: set[str] = set()

    @contextmanager
    def call(self, org: str) -> Iterator[None]:
        """Count a call of a member while it lasts.

        Raises:
            Busy: The member has as many calls open as it may.
        """
        with self._changed:
            if self._calls[org] >= self._calls_at_once:
                raise Busy(
                    f"expected at most {self._calls_at_once} calls of {org} at once, got one more; "
                    "does a second daemon run with the same identity?"
                )
            self._calls[org] += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls[org] -= 1
                if not self._calls[org]:
                    del self._calls[org]

    def take_slot(self, org: str, timeout: float) -> bool:
        """Wait for a slot for a large transfer of a member that has none; returns whether it got one."""
        with self._changed:
            free = self._changed.wait_for(lambda: self._free > 0 and org not in self._transferring, timeout)
            if free:
                self._free -= 1
                self._transferring.add(org)
            return free

    def give_slot_back(self, org: str) -> None:
        """End a transfer that `take_slot` began."""
        with self._changed:
            self._free += 1
            self._transferring.discard(org)
            self._changed.notify_all()
