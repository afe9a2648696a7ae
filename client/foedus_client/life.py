"""What a person tells a running daemon, and what the daemon says of itself: facts in ``client.db``.

The command line and the daemon are two processes; this is all that they say to each other, besides decisions on
charters. Nothing of it is sent to the coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from foedus_protocols.errors import PolicyRefused
from foedus_protocols.files import DiskTrouble

from foedus_client.ledger import Ledger
from foedus_client.state import CharterRecord, ClientState

_PAUSED = "paused"
_LIFE = "life:"
_CONTACT_SECONDS = 15.0
SENDING = "sending"
"""A word in `Life.doing` that stands for a transfer; the link itself watches over its progress."""
LEFT = 3
"""What leaves when an order comes for a run that a person has left: the number of the check on validity in time."""


# What a person says.


def pause(state: ClientState, reason: str) -> None:
    """Take part in no further round until somebody resumes."""
    state.remember(_PAUSED, reason)


def resume(state: ClientState) -> bool:
    """Take part again; returns whether it was paused."""
    was = state.fact(_PAUSED) is not None
    state.forget(_PAUSED)
    return was


def paused(state: ClientState) -> str | None:
    """Why the daemon is paused, None where it is not."""
    return state.fact(_PAUSED)


def leave(state: ClientState, ledger: Ledger, charter: str, reason: str) -> CharterRecord:
    """Leave a run for good: what its charter did not spend is free, and no round of it is trained again.

    The ledger comes first: a kill in between leaves a charter that can reserve nothing.
    """
    ledger.release_allotment(charter, why="left")
    state.mark_left(charter, reason)
    return state.charter(charter)


def require_not_left(state: ClientState, charter: str) -> None:
    """Refuse to go on with a run that a person has left: in the middle of a round, after its end, or extended.

    Raises:
        PolicyRefused: It was left (step 3).
    """
    if state.was_left(charter):
        raise PolicyRefused(LEFT, "expected a run that we take part in, a person here has left it")


# What the daemon says of itself.


@dataclass(frozen=True, kw_only=True)
class Life:
    """How a daemon was when it last wrote.

    Attributes:
        started_at: Unix seconds of its start.
        connected_at: Unix seconds since when the link is up, None while it is not.
        last_contact: When the coordinator last answered.
        doing: One line of what it does now, and `doing_since`.
        last_error: Its last trouble in one line, and `last_error_at`; None where there was none since its start.
    """

    started_at: float | None = None
    connected_at: float | None = None
    last_contact: float | None = None
    doing: str | None = None
    doing_since: float | None = None
    last_error: str | None = None
    last_error_at: float | None = None

    @property
    def sending(self) -> bool:
        """Whether a vector is on its way, which may take longer than any silence that means trouble."""
        return self.doing is not None and SENDING in self.doing


def life_of(state: ClientState) -> Life:
    """What the daemon last wrote of itself."""
    found = state.facts(_LIFE)

    def moment(name: str) -> float | None:
        return float(found[name]) if found.get(name) else None

    return Life(
        started_at=moment("started_at"),
        connected_at=moment("connected_at"),
        last_contact=moment("last_contact"),
        doing=found.get("doing") or None,
        doing_since=moment("doing_since"),
        last_error=found.get("last_error") or None,
        last_error_at=moment("last_error_at"),
    )


class Heartbeat:
    """The daemon's end: it writes what changes, and contact every few seconds.

    A disk that takes no status line is reported where it matters, and not here.
    """

    def __init__(self, state: ClientState, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._clock = clock
        self._contact = 0.0
        self._doing: str | None = None

    def started(self) -> None:
        """A new daemon: nothing of the one before is true any more."""
        blank = dict.fromkeys(("connected_at", "last_contact", "last_error", "last_error_at"), "")
        self._write(blank | {"started_at": str(self._clock())} | self._now_doing("starting"))

    def connected(self) -> None:
        """The link is up."""
        self._contact = self._clock()
        self._write({"connected_at": str(self._contact), "last_contact": str(self._contact)})

    def disconnected(self) -> None:
        """The link is down."""
        self._write({"connected_at": ""} | self._now_doing("not connected, dialling again"))

    def contact(self) -> None:
        """The coordinator answered."""
        if self._clock() - self._contact >= _CONTACT_SECONDS:
            self._contact = self._clock()
            self._write({"last_contact": str(self._contact)})

    def doing(self, what: str) -> None:
        """What is done from now on."""
        if what != self._doing:
            self._write(self._now_doing(what))

    def trouble(self, what: str) -> None:
        """Something went wrong."""
        self._write({"last_error": what, "last_error_at": str(self._clock())})

    def _now_doing(self, what: str) -> dict[str, str]:
        self._doing = what
        return {"doing": what, "doing_since": str(self._clock())}

    def _write(self, values: dict[str, str]) -> None:
        try:
            self._state.note({_LIFE + name: value for name, value in values.items()})
        except DiskTrouble:
            return
