"""What will go wrong, in which order: drawn from a seed before anything starts.

The sequence is reproducible, the instants are not: processes take as long as they take. Kinds come from a deck that is
shuffled and dealt out before it is shuffled again, so that twenty troubles hold each kind at least once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "freeze", "cut", "hold", "torn", "full"]
Part = Literal["coordinator", "daemon", "worker", "everything"]
POINTS = ("fsync", "synced", "part", "commit", "committed")

# Kind, which part of the federation, how many cards of the deck.
_DECK: tuple[tuple[Kind, Part, int], ...] = (
    ("kill", "coordinator", 3),
    ("kill", "daemon", 3),
    ("kill", "worker", 2),
    ("kill", "everything", 1),
    ("freeze", "coordinator", 1),
    ("freeze", "daemon", 1),
    ("freeze", "worker", 1),
    ("cut", "daemon", 1),
    ("hold", "daemon", 1),
    ("torn", "coordinator", 2),
    ("torn", "daemon", 2),
    ("full", "coordinator", 1),
    ("full", "daemon", 1),
)
_CALM = 0.6
"""How often a trouble waits until the one before it is overcome; the others come on top."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One thing that goes wrong.

    Attributes:
        kind: kill -9; SIGSTOP; connections reset; line silent; write cut off by death; disk full for a while.
        part: What it happens to.
        org: Whose daemon, worker or line; empty for the coordinator and for everything.
        seconds: How long it lasts: freeze, cut, hold, full. How long the process stays away: kill.
        fault: What the fault-injecting file layer is told, for torn and full (`faults/sitecustomize.py`).
        calm: Whether the trouble before it is over when it comes.
        pause: Seconds of undisturbed work before it.
    """

    kind: Kind
    part: Part
    org: str
    seconds: float
    fault: str
    calm: bool
    pause: float

    def __str__(self) -> str:
        """One line for the log."""
        detail = self.fault or (f"{self.seconds:.1f} s" if self.seconds else "")
        return " ".join(
            word for word in (self.kind, self.org or self.part, self.part if self.org else "", detail) if word
        )


def draw(seed: int, count: int, orgs: Sequence[str], *, deadline_seconds: float) -> list[Trouble]:
    """The troubles of one session.

    Args:
        seed: Decides everything.
        count: How many.
        orgs: The organisations, in a fixed order.
        deadline_seconds: The charter's `round_seconds`: a freeze lasts longer, so that a deadline passes in it.
    """
    rng = random.Random(f"foedus/chaos/{seed}")
    deck: list[tuple[Kind, Part]] = []
    troubles = []
    for _ in range(count):
        if not deck:
            deck = [(kind, part) for kind, part, cards in _DECK for _ in range(cards)]
            rng.shuffle(deck)
        troubles.append(_trouble(rng, *deck.pop(), orgs, deadline_seconds))
    return troubles


def _trouble(rng: random.Random, kind: Kind, part: Part, orgs: Sequence[str], deadline: float) -> Trouble:
    # Every branch draws alike, so that a change of one kind's numbers does not reshuffle the rest.
    org, share, point, count = rng.choice(orgs), rng.random(), rng.choice(POINTS), rng.randint(1, 40)
    seconds = {
        "kill": 2.0 * share if share > 0.5 else 0.0,
        "freeze": deadline * (1.02 + 0.2 * share),
        "cut": 0.5 + deadline * share,
        "hold": 0.5 + deadline * 1.2 * share,
        "torn": 0.0,
        "full": 1.0 + 4.0 * share,
    }[kind]
    fault = {"torn": f"die:{point}:{count}", "full": f"full:{count}:{seconds:.1f}"}.get(kind, "")
    return Trouble(
        kind=kind,
        part=part,
        org=org if part in ("daemon", "worker") else "",
        seconds=seconds,
        fault=fault,
        calm=rng.random() < _CALM,
        pause=rng.uniform(0.0, 4.0),
    )
