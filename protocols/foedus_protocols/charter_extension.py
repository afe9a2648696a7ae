"""Going on from an ended run: what an extension may change of the old charter, and what both together cost.

An extension is a charter of its own: signed by everybody, checked in the same twelve steps, run under an id of its own.
It names the ended run (`charter.Extends`), starts from that run's last adapter and optimiser state, and has the same
participants under the same terms; only its number of rounds, its promise, its dates and the roster are new.

Whether to extend is decided after results were seen. So a charter's promise is then the figure of a Rényi filter at an
order that the **first** charter of the chain fixed, over every round spent since its first one and all new ones; the
PLD's figure, which holds for rounds that were fixed beforehand, is printed beside it for comparison and promised to
nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter, Participant, delta_for_accountant, less_slack, noise_slack
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.roster import Roster

# Best at the first charter's epsilon times this: within 0.35 of the best order for 1 to 2 times its rounds (10 to 100
# rounds, epsilon 2 and 8, sampling 1/32 to 1; 2026-11-24).
_ORDER_ROOM = 1.5

_EPSILON_DIGITS = 4  # Of a promise: rounded up, so that two machines' last bits do not matter.

_NEW = frozenset({"roster_digest", "not_before", "expires", "extends"})
_NEW_IN = {"adapter": frozenset({"initial_digest"}), "privacy": frozenset({"rounds", "epsilon"})}


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What came before an extension, as a party recomputed it from files that it verified.

    Attributes:
        charters: Of the ended runs, the first run's first.
        adapter: Digest of the adapter that follows from their sums.
        rounds: How many rounds of them this party knows to have been opened.
    """

    charters: tuple[Charter, ...]
    adapter: str
    rounds: int


class Cost(NamedTuple):
    """Epsilon of everything spent and still to be spent: by the filter (promised), and by PLD (for comparison)."""

    filter: float
    pld: float


def require_same_terms(charter: Charter, old: Charter) -> None:
    """Check that an extension changes nothing but rounds, promise, dates, roster and starting point.

    Raises:
        VerificationError: It does, or it counts no more rounds as spent than the charter that it extends already did.
            The text names fields, never values.
    """
    extends = charter.extends
    if extends is None or extends.charter != old.digest:
        raise VerificationError(f"expected an extension of charter {old.digest[:12]}, got another charter")
    if changed := sorted(_differing(charter, old)):
        raise VerificationError(
            f"expected an extension on the terms of charter {old.digest[:12]}, got another {', '.join(changed)}: "
            "other terms or participants need a run of their own"
        )
    before = 0 if old.extends is None else old.extends.rounds_spent
    if extends.rounds_spent <= before:
        raise VerificationError(
            f"expected more than the {before} rounds spent before charter {old.digest[:12]}, got {extends.rounds_spent}"
        )


def require_follows(charter: Charter, earlier: Earlier) -> None:
    """Check that an extension starts where the ended runs lead, and counts every round of theirs as spent.

    Raises:
        VerificationError: It starts from another adapter, or forgets rounds.
    """
    extends = charter.extends
    if extends is None:
        raise VerificationError("expected an extension, got a charter that extends nothing")
    if extends.adapter != earlier.adapter:
        raise VerificationError(
            f"expected the adapter {earlier.adapter[:12]} that follows from the sums of {extends.run}, got "
            f"{extends.adapter[:12]}"
        )
    if extends.rounds_spent < earlier.rounds:
        raise VerificationError(
            f"expected at least {earlier.rounds} rounds spent before, as we saw them opened, got {extends.rounds_spent}"
        )


def filter_order(first: Charter, participant: Participant) -> float:
    """The Rényi order at which every extension of a first charter is judged, for one participant.

    *Guarantees.* It is a function of the first charter's constants, so it was fixed before anything was released.
    """
    epsilon = first.privacy.epsilon
    if epsilon is None or first.extends is not None:
        raise VerificationError(
            f"expected the private charter that began a chain of runs, got {first.digest[:12]} in mode "
            f"{first.privacy.mode}, which {'begins one' if first.extends is None else 'extends another'}"
        )
    return _order(
        participant.noise_multiplier, participant.sampling_prob, epsilon, delta_for_accountant(first, participant)
    )


def cost(charter: Charter, participant: Participant, *, rounds: int, first: Charter) -> Cost:
    """What one unit of a participant has lost after `rounds` of this charter, with all rounds that it extends.

    Args:
        charter: A private charter; where it extends nothing, both figures are the PLD's.
        participant: One of its participants.
        rounds: How many rounds of this charter count: all of them, or those opened so far.
        first: The charter at the beginning of the chain; the same charter where nothing is extended.

    *Guarantees.* For an extension `Cost.filter` bounds the epsilon, at the charter's delta, of the whole adaptively
    chosen sequence of rounds (`accounting.epsilon_rdp` at an order fixed beforehand), under adding or removing one
    unit. Without one the number of rounds was fixed beforehand, and PLD bounds it.
    """
    spent = 0 if charter.extends is None else charter.extends.rounds_spent
    delta = delta_for_accountant(charter, participant)
    events = [_event(participant, (spent + rounds) * charter.privacy.steps_per_round)]
    pld = accounting.epsilon(events, delta)
    if charter.extends is None:
        return Cost(pld, pld)
    return Cost(accounting.epsilon_rdp(events, delta, order=filter_order(first, participant)), pld)


def draft_extension(
    old: Charter,
    *,
    first: Charter,
    run: str,
    history: str,
    adapter: str,
    opened: int,
    rounds: int,
    roster: Roster,
    now: int,
    valid_seconds: int,
) -> tuple[Charter, dict[str, Cost]]:
    """The terms of going on with an ended run for more rounds.

    Args:
        old: The ended run's charter.
        first: The charter at the beginning of its chain.
        run: The ended run's id.
        history: Digest of the file with its closed rounds.
        adapter: Digest of its last adapter.
        opened: How many rounds it opened, closed or failed.
        rounds: How many more.
        roster: The federation's current one; every participant must be in it, under the same key.
        now: Unix seconds; the extension is valid from here for `valid_seconds`.
        valid_seconds: How long.

    Returns:
        The charter, and what it costs each participant by the end; nothing is said of costs in mode `none`.

    Raises:
        ConfigError: A participant left or has another key, or no promise of at most 100 fits.
    """
    for participant in old.participants:
        key = {member.id: member.signing_key for member in roster.members}.get(participant.id)
        if key != participant.signing_key:
            raise ConfigError(
                f"expected {participant.id!r} to be a member under the key of charter {old.digest[:12]}, "
                f"it {'is not' if key is None else 'has another key'}: an extension needs every participant; "
                "start a run of its own instead"
            )
    before = 0 if old.extends is None else old.extends.rounds_spent
    terms = old.model_dump(mode="json", exclude_none=True)
    terms |= {"roster_digest": roster.digest, "not_before": now, "expires": now + valid_seconds}
    terms["adapter"] |= {"initial_digest": adapter}
    terms["privacy"] |= {"rounds": rounds}
    terms["extends"] = {
        "run": run, "charter": old.digest, "history": history, "adapter": adapter, "rounds_spent": before + opened,
    }  # fmt: skip
    if not old.private:
        return _charter(terms), {}
    epsilon = _promise(old, first, spent=before + opened, rounds=rounds)
    terms["privacy"] |= {"epsilon": epsilon}
    charter = _charter(terms)
    return charter, {one.id: cost(charter, one, rounds=rounds, first=first) for one in charter.participants}


def _charter(terms: Mapping[str, Any]) -> Charter:
    try:
        return Charter.model_validate_json(canonical_bytes(dict(terms)))
    except ValidationError as error:
        found = "; ".join(
            (".".join(map(str, item["loc"])) or "the whole") + ": " + item["msg"] for item in error.errors()
        )
        raise ConfigError(f"expected an extension that is a charter, got: {found}") from None


def _promise(old: Charter, first: Charter, *, spent: int, rounds: int) -> float:
    """The smallest promise, on four decimals, that the filter keeps for every participant.

    The noise table's slack grows with the promise, so the promise is raised until it is enough at its own slack.
    """
    delta = old.privacy.delta
    if delta is None:
        raise VerificationError(f"expected a private charter, got {old.name!r} in mode {old.privacy.mode}")
    steps = (spent + rounds) * old.privacy.steps_per_round
    epsilon = 0.0
    while True:
        left = less_slack(delta, noise_slack(length=old.adapter.length, steps=steps, epsilon=epsilon))
        needed = max(
            accounting.epsilon_rdp([_event(one, steps)], left, order=filter_order(first, one))
            for one in old.participants
        )
        if not needed < 100.0:
            raise ConfigError(
                f"expected at most epsilon 100 after {spent + rounds} rounds, got {needed:.4g}: extend by fewer rounds"
            )
        if needed <= epsilon:
            return epsilon
        epsilon = math.ceil(needed * 10**_EPSILON_DIGITS + 1) / 10**_EPSILON_DIGITS


def _event(participant: Participant, steps: int) -> Event:
    return Event(noise_multiplier=participant.noise_multiplier, sampling_prob=participant.sampling_prob, steps=steps)


@lru_cache(maxsize=256)
def _order(noise_multiplier: float, sampling_prob: float, epsilon: float, delta: float) -> float:
    one = Event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=1)
    return accounting.filter_order([one], epsilon_cap=_ORDER_ROOM * epsilon, delta=delta)


def _differing(charter: Charter, old: Charter) -> set[str]:
    """Names of the terms that an extension may not change and that differ."""
    ours, theirs = (one.model_dump(mode="json", exclude=set(_NEW)) for one in (charter, old))
    found = set()
    for name, value in ours.items():
        fixed = _NEW_IN.get(name)
        if fixed is None:
            found |= {name} if value != theirs[name] else set()
        else:
            found |= {f"{name}.{key}" for key in value if key not in fixed and value[key] != theirs[name][key]}
    return found
