"""What a namespace's chain says: which charters hold how much of the budget, and whether one more fits.

Pure functions over entries and events; `ledger.py` calls them inside the transaction that acts on the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.charter import less_slack
from foedus_protocols.errors import BudgetExhausted, StateError

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


class Charge(Protocol):
    """Something that counts against a namespace's budget: a charter's allotment, or what a person stated."""

    delta_slack: float
    cap: float
    filter_order: float | None
    spent: list[Event]

    def charged(self) -> Sequence[Event]:
        """What counts against the budget."""


@dataclass(kw_only=True)
class Allotment:
    """One charter's share of a namespace, as its entries tell it.

    Attributes:
        details: Public facts of the charter, as they were written down at admission.
        expired: It was taken to be over because its time has passed, and no entry says so yet.
        abandoned: The ledger was found to be an older copy while this charter was open: words of it may have left that
            no entry tells of. Everything allotted counts until the next order's round was charged.
        restored: How many reservations were written down afterwards, from receipts or as abandoned.
        extends: The charter of the run that this one goes on from; None where it begins one.
        why: How its share was released: the run's outcome, ``expired``, ``left``; None while it is open.
    """

    admission: Admission
    events: tuple[Event, ...]
    delta_slack: float
    cap: float
    filter_order: float | None
    expires: int
    details: Mapping[str, Any]
    extends: str | None = None
    why: str | None = None
    open: bool = True
    expired: bool = False
    abandoned: bool = False
    restored: int = 0
    spent: list[Event] = field(default_factory=list)
    reservations: dict[tuple[str, int], Entry] = field(default_factory=dict)
    commits: dict[tuple[str, int], Entry] = field(default_factory=dict)

    def charged(self) -> Sequence[Event]:
        """All that was allotted while open, only what was spent afterwards."""
        return self.events if self.open else self.spent

    def close(self) -> None:
        """It is over. Where words may have left unseen, all that was allotted stays spent."""
        self.open = False
        if self.abandoned:
            self.spent = list(self.events)

    @property
    def run(self) -> str | None:
        """The run of the reservations; None before the first."""
        return next((run for run, _ in self.reservations), None)


@dataclass(kw_only=True)
class Statement:
    """What a person said that the namespace had spent where no ledger tells it, and the runs that this covers."""

    spent: list[Event]
    delta_slack: float
    cap: float
    filter_order: float | None
    runs: frozenset[str]

    def charged(self) -> Sequence[Event]:
        """All of it, for ever."""
        return self.spent


@dataclass(kw_only=True)
class Account:
    """A namespace, folded from its chain: allotments by charter in order of admission, and statements."""

    unit: str = ""
    allotments: dict[str, Allotment] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list)

    @property
    def stated_runs(self) -> frozenset[str]:
        """The runs that some statement covers."""
        return frozenset[str]().union(*(one.runs for one in self.statements))


def fold(entries: Iterable[Entry]) -> Account:
    """What a chain says."""
    account = Account()
    known = account.allotments
    for entry in entries:
        if entry.kind == "open":
            account.unit = entry.body["unit"]
        elif entry.kind == "state":
            account.statements.append(_statement(entry))
            account.charges.append(account.statements[-1])
        elif entry.charter is not None:
            if entry.kind == "allot":
                # A charter that was left unspent and signed again keeps one share, at its later place.
                account.charges = [one for one in account.charges if one is not known.get(entry.charter)]
                known[entry.charter] = _allotment(entry)
                account.charges.append(known[entry.charter])
            else:
                _apply(entry, known[entry.charter])
    return account


def _apply(entry: Entry, allotment: Allotment) -> None:
    """What a later entry about a charter does to its allotment."""
    if entry.kind == "release":
        allotment.close()
        allotment.why = entry.body["why"]
    elif entry.kind == "abandon":
        allotment.abandoned = True
    elif entry.run is not None and entry.round is not None:
        key = (entry.run, entry.round)
        if entry.kind == "commit":
            allotment.commits[key] = entry
            return
        allotment.reservations[key] = entry
        allotment.restored += bool(entry.body.get("restored"))
        if allotment.abandoned and not allotment.open:
            return  # All of it is spent already.
        if entry.body["words"] is None:
            allotment.abandoned = False
        if entry.body["event"] is not None:
            allotment.spent.append(event_of(entry.body["event"]))


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
    earlier: Iterable[Charge], events: Sequence[Event], *, delta: float, delta_slack: float, cap: float
) -> Judgement:
    """What one more charter with these events would bring the namespace to.

    Guarantees:
        The first charter was fixed before anything was released and is judged by PLD, which needs just that. Later ones
        are chosen in the light of earlier results and are judged by a Rényi filter over all events, at one order: that
        of the first charge that counts. A first charter fixed it before anything was released; a statement by the
        constants of the policy alone (`stated_order`). After a statement of spent events no charter is a first one:
        nobody knows in the light of what it was chosen. Slack of the noise tables, all of it at `cap`, is taken off
        `delta` first.
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


def stated_order(cap: float, delta: float) -> float:
    """The Rényi order at which a namespace whose first spending was stated is judged from then on.

    The best order for a plain Gaussian mechanism that costs exactly (cap, delta): with RDP rho x order its epsilon at
    an order is rho x order + log(1/delta) / (order - 1), least at 1 + sqrt(log(1/delta) / rho).

    Guarantees:
        A function of the policy's two constants and of nothing that was released, stated or chosen later, which is what
        the filter asks of its order (`accounting.epsilon_rdp`). Which order it is can only cost budget, never privacy.
    """
    log = math.log(1.0 / delta)
    return 1.0 + math.sqrt(log) / (math.sqrt(log + cap) - math.sqrt(log))


def epsilon_of_spent(charges: Iterable[Charge], delta: float) -> float:
    """The epsilon at `delta` of everything spent: by PLD for one charter alone, by the Rényi filter otherwise."""
    parts = [one for one in charges if one.spent]
    if not parts:
        return 0.0
    left = less_slack(delta, _slack(parts, max(one.cap for one in parts)))
    if len(parts) == 1 and isinstance(parts[0], Allotment):
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


def require_not_stated(accounts: Iterable[Account], run: str) -> None:
    """Check that no person's statement covers a run, in whatever namespace: its spending may be stated in another one.

    Raises:
        StateError: One does.
    """
    if any(run in account.stated_runs for account in accounts):
        raise StateError(f"expected a run that goes on, {run!r} is covered by a statement and over for us")


def _slack(allotments: Iterable[Charge], cap: float) -> float:
    """What the noise tables of some charters cost at one cap; each was admitted at the cap of its day."""
    return sum(one.delta_slack * (1.0 + math.exp(cap)) / (1.0 + math.exp(one.cap)) for one in allotments)


def _steps(events: Iterable[Event], like: Event) -> int:
    kind = (like.noise_multiplier, like.sampling_prob)
    return sum(event.steps for event in events if (event.noise_multiplier, event.sampling_prob) == kind)


def _allotment(entry: Entry) -> Allotment:
    return Allotment(
        admission=admission(entry),
        events=tuple(event_of(event) for event in entry.body["events"]),
        delta_slack=float(entry.body["delta_slack"]),
        cap=float(entry.body["cap"]),
        filter_order=entry.body["filter_order"],
        expires=int(entry.body["expires"]),
        details=entry.body["details"],
        extends=entry.body.get("extends"),
    )


def _statement(entry: Entry) -> Statement:
    return Statement(
        spent=[event_of(event) for event in entry.body["events"]],
        delta_slack=float(entry.body["delta_slack"]),
        cap=float(entry.body["cap"]),
        filter_order=float(entry.body["filter_order"]),
        runs=frozenset(entry.body["runs"]),
    )


def event_of(value: Mapping[str, Any]) -> Event:
    """An event as an entry holds it. Canonical JSON writes 1.0 as 1, so that the types must be restored."""
    return Event(
        noise_multiplier=float(value["noise_multiplier"]),
        sampling_prob=float(value["sampling_prob"]),
        steps=int(value["steps"]),
    )
