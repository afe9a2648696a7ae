"""The twelve checks of a charter (``docs/protocol.md`` section 2), as an organisation makes them.

Before it signs: 1 to 7, 8, 9 to 11. Before each round: 1 to 12. The first failure refuses, and its number is all that
leaves.

     1  the bytes are canonical and match the digest
     2  the operator signed it
     3  it is in force
     4  it is of our federation; its roster is an ancestor of ours, and nobody whom it names was removed since
     5  it names us, by our key
     6  it names enough other members, each confirmed by us
     7  the base is one that we hold
     8  adapter description and initial adapter are as we compute them; an extension's is the one that we replayed
     9  purpose, recipe and evaluation keep our policy's bounds, and records the base's
    10  the privacy budget, by our own accountant
    11  members, survivors, ring, range and an optimiser that can run
    12  everyone signed

The adapter of a later round is not in the charter: the round compares it with the one that it replayed from the sums.
That replay begins with the ended run's where the charter extends one, so the round does that part of 8 again.
No ground for refusing is computed from the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from foedus_protocols import accounting, layout
from foedus_protocols.canonical import digest
from foedus_protocols.charter import (
    Charter,
    Participant,
    check_length,
    derived_update_bound,
    verify_agreement,
    verify_charter_signature,
)
from foedus_protocols.charter_extension import Earlier, cost, require_follows
from foedus_protocols.errors import ConfigError, PolicyRefused, StateError, VerificationError
from foedus_protocols.identity import key_fingerprint
from foedus_protocols.messages import Agreement
from foedus_protocols.roster import Roster, check_chain, stayed_since

Stage = Literal["sign", "round"]

CLOCK_TOLERANCE_SECONDS = 300.0
MAX_PARAMETERS = 1 << 27
"""What a policy without `bounds.max_parameters` allows: 512 MiB of fp32; attention of gpt-oss-120b at rank 64 is 74."""


@dataclass(frozen=True, kw_only=True)
class UnitNamespace:
    """A population of privacy units and the budget that belongs to it, from the organisation's policy."""

    name: str
    unit: str
    units_at_most: int
    epsilon_cap: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an organisation's policy allows, as plain values.

    Attributes:
        coordinators: Operator keys whose charters may be signed.
        minimum_members: How many **other** members a charter names at least.
        peers: Organisation id to the fingerprint of its signing key that a person confirmed.
        namespaces: Allowed purpose to the namespace of the data set that serves it.
        evaluation: Evaluation terms that may be agreed to.
        max_parameters: Trained coordinates. A step holds some six arrays of so many.
    """

    coordinators: frozenset[str]
    minimum_members: int
    peers: Mapping[str, str]
    namespaces: Mapping[str, UnitNamespace]
    allow_unprotected: bool
    evaluation: frozenset[str]
    max_tokens: int
    max_records_per_unit: int
    max_rounds: int
    max_rate: float
    max_rank: int
    min_survivors: int
    max_parameters: int = MAX_PARAMETERS


def replay_nothing(charter: Charter) -> Earlier:
    """Refuse an extension where nothing can be fetched and replayed.

    Raises:
        VerificationError: Always.
    """
    raise VerificationError(f"expected to replay the run that charter {charter.digest[:12]} extends, cannot here")


@dataclass(frozen=True, kw_only=True)
class OrgView:
    """What an organisation knows, against which a charter is checked.

    Attributes:
        org: Our id.
        signing_key: Our public signing key.
        federation: The federation that we joined.
        operator_key: The operator's key as pinned at enrolment.
        rosters: The roster chain, oldest first, signatures checked.
        limits: What our policy allows.
        base_configs: Manifest digest to ``config.json`` of the bases that we hold and allow.
        budget: Raises `BudgetExhausted` or `StateError` where the ledger does not cover the charter: at signing, where
            its events do not fit beside all that is spent and allotted; before a round, where its allotment does not
            cover one more.
        earlier: Replays what a charter extends, before it is signed; raises VerificationError where one of its charters
            was not signed here or a sum is not what the history says. Anything else that it raises is no refusal.
        now: Unix seconds, by the coordinator's clock as measured in Hello.
    """

    org: str
    signing_key: str
    federation: str
    operator_key: str
    rosters: Sequence[Roster]
    limits: Limits
    base_configs: Mapping[str, Mapping[str, Any]]
    budget: Callable[[Charter, Participant], None]
    now: float
    earlier: Callable[[Charter], Earlier] = replay_nothing


def check_charter(
    charter_bytes: bytes,
    charter_digest: str,
    operator_signature: str,
    view: OrgView,
    *,
    stage: Stage,
    agreement: Agreement | None = None,
) -> Charter:
    """Check a charter before signing it, or before a round under it.

    Args:
        charter_bytes: The file that the coordinator names.
        charter_digest: Its digest as the message says.
        operator_signature: The operator's signature over the digest.
        view: What this organisation knows.
        stage: `sign` makes checks 1 to 11, `round` all twelve.
        agreement: Everyone's signatures; needed before a round.

    Returns:
        The charter, every check passed.

    Raises:
        PolicyRefused: With the number of the first failed check; the later ones were not tried.
        BudgetExhausted: The same where it is the ledger that refuses, in check 10.
    """
    with _step(1):
        charter = _decoded(charter_bytes, charter_digest)
    with _step(2):
        _operator_signed(charter_digest, operator_signature, view)
    with _step(3):
        _in_force(charter, view.now, stage)
    with _step(4):
        _of_our_federation(charter, view)
    with _step(5):
        mine = _names_us(charter, view)
    with _step(6):
        _enough_confirmed_members(charter, view)
    with _step(7):
        config = _base_held(charter, view)
    with _step(8):
        computed = _layout_as_computed(charter, config)
    earlier = _extension_as_replayed(charter, view) if stage == "sign" else None
    with _step(9):
        _within_bounds(charter, view.limits)
        check_length(charter.recipe.max_tokens, config)
    with _step(8):  # Makes the whole adapter, so only once its size is within our bounds.
        _starts_as_computed(charter, computed)
    with _step(10):
        _within_budget(charter, mine, view, stage, earlier)
    with _step(11):
        _members_and_ring(charter, view.limits)
    if stage == "round":
        with _step(12):
            _everyone_signed(charter, agreement, view)
    return charter


@contextmanager
def _step(number: int) -> Iterator[None]:
    """Turn whatever a check raises into a refusal with its number."""
    try:
        yield
    except (VerificationError, ConfigError, StateError) as error:
        raise PolicyRefused(number, str(error)) from error


def _decoded(charter_bytes: bytes, charter_digest: str) -> Charter:
    """Check 1."""
    if (found := digest(charter_bytes)) != charter_digest:
        raise VerificationError(f"expected the charter {charter_digest[:12]}, got bytes of digest {found[:12]}")
    return Charter.parse(charter_bytes)


def _operator_signed(charter_digest: str, operator_signature: str, view: OrgView) -> None:
    """Check 2: by the key that we pinned, which our policy must name."""
    if view.operator_key not in view.limits.coordinators:
        raise VerificationError(
            f"expected an operator that our policy names, got the key {view.operator_key[:12]}: add it to "
            "`coordinators` in policy.toml"
        )
    verify_charter_signature(view.operator_key, charter_digest, operator_signature)


def _in_force(charter: Charter, now: float, stage: Stage) -> None:
    """Check 3. A charter may be signed before it starts."""
    if now >= charter.expires:
        raise VerificationError(f"expected a charter in force, got one that expired {now - charter.expires:.0f} s ago")
    if stage == "round" and now < charter.not_before - CLOCK_TOLERANCE_SECONDS:
        raise VerificationError(f"expected a charter in force, got one that starts in {charter.not_before - now:.0f} s")


def _of_our_federation(charter: Charter, view: OrgView) -> None:
    """Check 4: nobody whom the charter names was removed, or came back with another key, since its roster."""
    if charter.federation != view.federation:
        raise VerificationError(f"expected federation {view.federation!r}, got {charter.federation!r}")
    check_chain(view.rosters)
    stayed = stayed_since(view.rosters, charter.roster_digest)
    keys = {member.id: member.signing_key for member in view.rosters[-1].members}
    for participant in charter.participants:
        if participant.id not in stayed:
            raise VerificationError(
                f"expected a member since the charter's roster, got {participant.id!r}, which is not"
            )
        if keys[participant.id] != participant.signing_key:
            raise VerificationError(f"expected the roster's signing key of {participant.id!r}, got another")


def _names_us(charter: Charter, view: OrgView) -> Participant:
    """Check 5."""
    mine = charter.participant(view.org)
    if mine.signing_key != view.signing_key:
        raise VerificationError(f"expected our signing key under {view.org!r}, got another")
    return mine


def _enough_confirmed_members(charter: Charter, view: OrgView) -> None:
    """Check 6."""
    others = [participant for participant in charter.participants if participant.id != view.org]
    if len(others) < view.limits.minimum_members:
        raise VerificationError(
            f"expected at least {view.limits.minimum_members} other members, got {len(others)}: see "
            "`minimum_members` in policy.toml"
        )
    for participant in others:
        confirmed = view.limits.peers.get(participant.id)
        if confirmed is None:
            raise VerificationError(
                f"expected members that a person here confirmed, {participant.id!r} is not: compare fingerprints, then "
                f"`foedus client peers --confirm {participant.id}`"
            )
        if confirmed != key_fingerprint(participant.signing_key):
            raise VerificationError(f"expected the key of {participant.id!r} that was confirmed here, got another one")


def _base_held(charter: Charter, view: OrgView) -> Mapping[str, Any]:
    """Check 7."""
    if charter.base not in view.base_configs:
        raise VerificationError(
            f"expected a base that we hold and allow, got {charter.base_name!r} ({charter.base[:12]}): add it to "
            "`bases` in policy.toml"
        )
    return view.base_configs[charter.base]


def _layout_as_computed(charter: Charter, config: Mapping[str, Any]) -> layout.Layout:
    """Check 8, the shape."""
    computed = charter.adapter.layout(config)
    if (charter.adapter.layout_digest, charter.adapter.length) != (computed.digest, computed.length):
        raise VerificationError(
            f"expected the layout {computed.digest[:12]} of {computed.length} coordinates for this base, got "
            f"{charter.adapter.layout_digest[:12]} of {charter.adapter.length}"
        )
    return computed


def _starts_as_computed(charter: Charter, computed: layout.Layout) -> None:
    """Check 8, the values."""
    if charter.extends is not None:
        return
    initial = layout.initial_digest(computed, charter.adapter.seed)
    if charter.adapter.initial_digest != initial:
        raise VerificationError(
            f"expected the initial adapter {initial[:12]}, got {charter.adapter.initial_digest[:12]}"
        )


def _extension_as_replayed(charter: Charter, view: OrgView) -> Earlier | None:
    """Check 8 for an extension: the old run is one that we signed, and leads to where this one starts.

    A line that breaks or a disk that fills while the old sums are fetched is no ground for refusing, so only what the
    coordinator got wrong gets the check's number.
    """
    if charter.extends is None:
        return None
    try:
        earlier = view.earlier(charter)
        require_follows(charter, earlier)
    except VerificationError as error:
        raise PolicyRefused(8, str(error)) from error
    return earlier


def _within_bounds(charter: Charter, limits: Limits) -> None:
    """Check 9."""
    if charter.purpose not in limits.namespaces:
        raise ConfigError(
            f"expected a purpose that our policy allows and a data set serves, got {charter.purpose!r}: "
            "see `purposes` and `datasets` in policy.toml"
        )
    if charter.evaluation.term not in limits.evaluation:
        allowed = ", ".join(sorted(limits.evaluation)) or "nothing"
        raise ConfigError(f"expected an evaluation term among {allowed}, got {charter.evaluation.term!r}")
    spent = 0 if charter.extends is None else charter.extends.rounds_spent
    bounded: list[tuple[str, float, float]] = [
        ("max_tokens", charter.recipe.max_tokens, limits.max_tokens),
        ("max_records_per_unit", charter.recipe.max_records_per_unit, limits.max_records_per_unit),
        ("rounds", spent + charter.privacy.rounds, limits.max_rounds),
        ("rate", charter.recipe.optimiser.rate, limits.max_rate),
        ("rank", charter.adapter.rank, limits.max_rank),
        ("parameters", charter.adapter.length, limits.max_parameters),
    ]
    for name, found, bound in bounded:
        if found > bound:
            raise ConfigError(f"expected {name} of at most {bound:g}, got {found:g}: see `bounds` in policy.toml")


def _within_budget(charter: Charter, mine: Participant, view: OrgView, stage: Stage, earlier: Earlier | None) -> None:
    """Check 10: the declared constants, the rule, the promise by our own accountant, and the ledger."""
    namespace = view.limits.namespaces[charter.purpose]
    if (mine.unit, mine.units_at_most) != (namespace.unit, namespace.units_at_most):
        raise ConfigError(
            f"expected at most {namespace.units_at_most} units of {namespace.unit!r} as registered, got "
            f"{mine.units_at_most} of {mine.unit!r}"
        )
    for participant in charter.participants:
        _constants_follow(participant, charter)
    if not charter.private:
        if not view.limits.allow_unprotected:
            raise ConfigError("expected a private mode, got mode none: see `allow_unprotected` in policy.toml")
    else:
        _promise_holds(charter, mine, namespace, stage, earlier)
    view.budget(charter, mine)


def _constants_follow(participant: Participant, charter: Charter) -> None:
    """The constants of one organisation are those of the printed rule (`charter_draft.py`)."""
    constants = accounting.party_constants(participant.units_at_most, charter.privacy.target_units)
    rule = (*constants, accounting.weight(constants.expected_units, participant.noise_multiplier))
    found = (participant.sampling_prob, participant.expected_units, participant.weight)
    if not all(math.isclose(ours, theirs, rel_tol=1e-12) for ours, theirs in zip(rule, found, strict=True)):
        raise ConfigError(
            f"expected sampling_prob, expected_units and weight {rule} for {participant.id!r}, got {found}"
        )


def _promise_holds(
    charter: Charter, mine: Participant, namespace: UnitNamespace, stage: Stage, earlier: Earlier | None
) -> None:
    """Epsilon and delta are no worse than what policy and charter say; once signed, the charter cannot change.

    What an extension promises covers the rounds before it (`charter_extension.cost`).
    """
    delta, epsilon = charter.privacy.delta, charter.privacy.epsilon
    if delta is None or epsilon is None:
        raise ConfigError("expected epsilon and delta in a private mode, got none")
    if delta * 10 * mine.units_at_most > 1 or delta > namespace.delta:
        raise ConfigError(
            f"expected delta of at most 1/(10 x {mine.units_at_most}) and {namespace.delta:g}, got {delta:g}"
        )
    if stage == "sign":
        first = charter if earlier is None else earlier.charters[0]
        ours = cost(charter, mine, rounds=charter.privacy.rounds, first=first).filter
        if ours > epsilon:
            raise ConfigError(f"expected epsilon of at most {epsilon:g} as the charter promises, got {ours:.6g}")


def _members_and_ring(charter: Charter, limits: Limits) -> None:
    """Check 11, for charters without masks: n, u_min, a ring that cannot wrap, an optimiser that can run."""
    members = len(charter.participants)
    if members < 2:
        raise ConfigError(f"expected at least 2 participants, got {members}")
    survivors = charter.masks.min_survivors
    if not limits.min_survivors <= survivors <= members:
        raise ConfigError(f"expected min_survivors from {limits.min_survivors} to {members}, got {survivors}")
    bound = derived_update_bound(charter.participants, charter.adapter.length)
    if not math.isclose(charter.masks.update_bound, bound, rel_tol=1e-12):
        raise ConfigError(f"expected the update_bound {bound:.6g}, got {charter.masks.update_bound:.6g}")
    charter.coding()
    charter.rule()


def _everyone_signed(charter: Charter, agreement: Agreement | None, view: OrgView) -> None:
    """Check 12."""
    if agreement is None:
        raise VerificationError("expected everyone's signatures before a round, got none")
    verify_agreement(charter, agreement, view.operator_key)
