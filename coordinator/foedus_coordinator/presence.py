"""Who of a run's participants is a member, and here; and whether this process itself was.

A wait for somebody who was removed, or has not been heard of for a while, would hold everybody else up for nothing. And
a coordinator that was stopped, or whose machine slept, past a deadline must not hold that against the organisations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from foedus_protocols.charter import Charter

from foedus_coordinator.members import Members

AWAY_SECONDS = 60.0
"""An organisation polls at least every 15 s, and every 10 s while it trains; who is silent for so long is away."""
_GAP_SECONDS = 5.0  # A process that waits looks around every second; a longer gap means that it did not run.


class Presence:
    """The participants of one run, as far as the coordinator knows where they are.

    Attributes:
        since: Since when, in Unix seconds, this process has been there without a gap.
    """

    def __init__(self, charter: Charter, *, members: Members, clock: Callable[[], float]) -> None:
        self._keys = {participant.id: participant.signing_key for participant in charter.participants}
        self._members = members
        self._clock = clock
        self._lock = threading.Lock()
        self._gone: tuple[int, list[str]] | None = None
        self.since = self._last = clock()

    def look(self) -> None:
        """Note that this process is there; called at least once a second while it waits."""
        now = self._clock()
        if abs(now - self._last) > _GAP_SECONDS:
            self.since = now
        self._last = now

    def gone(self) -> list[str]:
        """Participants that are no members any more, or whose signing key was replaced, in ascending order."""
        version = self._members.version()
        with self._lock:
            if self._gone is None or self._gone[0] != version:
                current = {member.id: member.signing_key for member in self._members.roster().members}
                self._gone = version, sorted(org for org, key in self._keys.items() if current.get(org) != key)
            return self._gone[1]

    def here(self) -> set[str]:
        """Participants that are members and were heard of lately; after a start everybody is given time to dial in."""
        horizon = self._clock() - AWAY_SECONDS
        seen = self._members.last_seen()
        return {org for org in self._keys.keys() - set(self.gone()) if max(seen.get(org) or 0.0, self.since) > horizon}
