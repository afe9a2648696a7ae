"""Runs that were spent on and of which the ledger knows nothing: what a person needs to know to state the spending.

Noted in client.db by `receipts.py`, shown and settled by `foedus client privacy ledger`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from foedus_protocols.accounting import Event

from foedus_client.state import ClientState

_FACT = "unexplained-run:"


@dataclass(frozen=True, kw_only=True)
class Unexplained:
    """One such run.

    Attributes:
        charter: Its charter's digest.
        purpose: The charter's purpose; None where the charter could not be read.
        rounds: How many rounds are known to be spent, at least.
        event: What one of them costs; None in mode `none`, or where the charter could not be read.
        since: When it was first noticed, in Unix seconds.
    """

    run: str
    charter: str
    purpose: str | None
    rounds: int
    event: Event | None
    since: float

    def __str__(self) -> str:
        cost = "" if self.event is None else f" of {self.event.noise_multiplier:g}:{self.event.sampling_prob:g}"
        return f"{self.run} (purpose {self.purpose or 'unknown'}, at least {self.rounds} rounds{cost})"


def note(state: ClientState, one: Unexplained) -> None:
    """Write a run down; what was first noticed earlier stays noticed then."""
    known = state.fact(_FACT + one.run)
    if known is not None:
        one = replace(one, since=_decode(known).since)
    state.remember(_FACT + one.run, json.dumps(asdict(one)))


def explained(state: ClientState, run: str) -> None:
    """Drop a note: the ledger knows the run by now, or a person has stated what it spent."""
    state.forget(_FACT + run)


def unexplained(state: ClientState) -> list[Unexplained]:
    """The runs for which a person has to state what was spent, by name."""
    return [_decode(text) for _, text in sorted(state.facts(_FACT).items())]


def how_to_state(runs: Sequence[Unexplained]) -> str:
    """What a person is told to do."""
    names = "; ".join(map(str, runs)) or "no run is known"
    return (
        "state what was spent with `foedus client privacy ledger state --namespace NAME --event NOISE:PROB:STEPS` "
        f"(or --nothing), for: {names}. Nothing is answered until then"
    )


def _decode(text: str) -> Unexplained:
    value = json.loads(text)
    return Unexplained(**{**value, "event": None if value["event"] is None else Event(**value["event"])})
