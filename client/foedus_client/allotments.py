"""What a namespace's chain says: which charters hold how much of the budget, and whether one more fits.

Pure functions over entries and events; `ledger.py` calls them inside the transaction that acts on the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.charter import less_slack
from foedus_protocols.errors import BudgetExhausted

from foedus_client.chain import Entry

Accountant = Literal["pld", "rdp", "none"]


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A charter's allotment: our signature, and the epsilon of the namespace at which it was admitted.

    `accountant` is `pld` for the first charter of a namespace (fixed before anything was released), `rdp` (a filter
    over all events) for every later one, `none` where the charter promises nothing.
    """

    charter: str
    epsilon: float
    accountant: Accountant
    signature: str


class Judgement(NamedTuple):
    """The epsilon that a namespace would reach, whose figure it is, and the order of the filter for later charters."""

    epsilon: float
    accountant: Accountant
    filter_order: float | None


@dataclass(kw_only=True)
class Allotment:
    """One charter's share of a namespace, as its entries tell it."""

    admission: Admission
    events: tuple[Event, ...]
    delta_slack: float
    cap: float
    filter_order: float | None
    expires: int
    open: bool = True
    spent: list[Event] = field(default_factory=list)
    reservations: dict[tuple[str, int], Entry] = field(default_factory=dict)
    commits: dict[tuple[str, int], Entry] = field(default_factory=dict)

    def charged(self) -> Sequence[Event]:
        """What counts against the budget: all that was allotted while open, only what was spent afterwards."""
        return self.events if self.open else self.spent


def fold(entries: Iterable[Entry]) -> dict[str, Allotment]:
    """The allotments of a chain by charter, in order of admission."""
    known: dict[str, Allotment] = {}
    for entry in entries:
        if entry.charter is None:
            continue
        if entry.kind == "allot":
            known[entry.charter] = _allotment(entry)
        elif entry.kind == "release":
            known[entry.charter].open = False
        elif entry.run is not None and entry.round is not None:
            key = (entry.run, entry.round)
            if entry.kind == "commit":
                known[entry.charter].commits[key] = entry
            else:
                known[entry.charter].reservations[key] = entry
                if entry.body["event"] is not None:
                    known[entry.charter].spent.append(_event(entry.body["event"]))
    return known


def admission(entry: Entry) -> Admission:
    """The admission that an `allot` entry records."""
    return Admission(
        charter=str(entry.charter),
        epsilon=float(entry.body["epsilon"]),
        accountant=entry.body["accountant"],
        signature=entry.body["signature"],
    )


def merge_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the steps of events with equal noise and sampling; the accountants are faster on fewer."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_prob)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(Event(noise_multiplier=noise, sampling_prob=prob, steps=n) for (noise, prob), n in steps.items())


def judge(
    earlier: Iterable[Allotment], events: Sequence[Event], *, delta: float, delta_slack: float, cap: float
) -> Judgement:
    """What one more charter with these events would bring the namespace to.

    Guarantees:
        The first charter was fixed before anything was released and is judged by PLD, which needs just that. Later ones
        are chosen in the light of earlier results and are judged by a Rényi filter over all events, at the one order
        that the first charter fixed. Slack of the noise tables, all of it at `cap`, is taken off `delta` first.
    """
    if not events:
        return Judgement(0.0, "none", None)
    charged = [one for one in earlier if one.charged()]
    left = less_slack(delta, delta_slack + _slack(charged, cap))
    if charged:
        order = charged[0].filter_order
        everything = [event for one in charged for event in one.charged()]
        return Judgement(accounting.epsilon_rdp([*everything, *events], left, order=order), "rdp", order)
    epsilon = accounting.epsilon(events, left)
    # A charter beyond the cap is refused and fixes no order.
    order = accounting.filter_order(events, epsilon_cap=cap, delta=left) if epsilon <= cap else None
    return Judgement(epsilon, "pld", order)


def epsilon_of_spent(allotments: Iterable[Allotment], delta: float) -> float:
    """The epsilon at `delta` of everything reserved: by PLD for one charter, by the Rényi filter for several."""
    parts = [one for one in allotments if one.spent]
    if not parts:
        return 0.0
    left = less_slack(delta, _slack(parts, max(one.cap for one in parts)))
    if len(parts) == 1:
        return accounting.epsilon(parts[0].spent, left)
    return accounting.epsilon_rdp([event for one in parts for event in one.spent], left, order=parts[0].filter_order)


def require_covered(allotment: Allotment, event: Event | None) -> None:
    """Check that one more event stays within what was allotted. None is right where the charter promises nothing.

    Raises:
        BudgetExhausted: It does not.
    """
    if event is None:
        if allotment.events:
            raise BudgetExhausted(10, "expected this round's event, got none under a charter that promises one")
        return
    left = _steps(allotment.events, event) - _steps(allotment.spent, event)
    if event.steps > left:
        raise BudgetExhausted(
            10,
            f"expected at most {left} more steps with this noise and sampling under charter "
            f"{allotment.admission.charter[:12]}, got {event.steps}: its allotment is spent",
        )


def _slack(allotments: Iterable[Allotment], cap: float) -> float:
    """What the noise tables of some charters cost at one cap; each was admitted at the cap of its day."""
    return sum(one.delta_slack * (1.0 + math.exp(cap)) / (1.0 + math.exp(one.cap)) for one in allotments)


def _steps(events: Iterable[Event], like: Event) -> int:
    kind = (like.noise_multiplier, like.sampling_prob)
    return sum(event.steps for event in events if (event.noise_multiplier, event.sampling_prob) == kind)


def _allotment(entry: Entry) -> Allotment:
    return Allotment(
        admission=admission(entry),
        events=tuple(_event(event) for event in entry.body["events"]),
        delta_slack=float(entry.body["delta_slack"]),
        cap=float(entry.body["cap"]),
        filter_order=entry.body["filter_order"],
        expires=int(entry.body["expires"]),
    )


def _event(value: Mapping[str, Any]) -> Event:
    # Canonical JSON writes 1.0 as 1, so that the types must be restored.
    return Event(
        noise_multiplier=float(value["noise_multiplier"]),
        sampling_prob=float(value["sampling_prob"]),
        steps=int(value["steps"]),
    )
