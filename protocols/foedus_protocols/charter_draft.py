"""From an operator's TOML file to a charter: the derived constants, by one printed rule.

The rule (``docs/privacy.md``, "organisations of unlike size"), for an organisation that declares `units_at_most`::

    sampling_prob    = min(1, target_units / units_at_most)
    expected_units   = sampling_prob x units_at_most
    noise_multiplier = the smallest that keeps rounds x steps_per_round steps within (epsilon, delta)    mode local
    weight           = expected_units / noise_multiplier                                                 mode local
    weight           = expected_units, noise_multiplier = 0                                              mode none
    update_bound     = the largest norm that one weighted vector has, from these constants alone

Nothing of it is a function of anybody's data. Each organisation computes the same constants again before it signs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from foedus_protocols import accounting, layout
from foedus_protocols.charter import (
    Adapter,
    Charter,
    Clip,
    Count,
    Evaluation,
    Masks,
    Optimiser,
    Participant,
    Privacy,
    Recipe,
    Release,
    Schedule,
    Terms,
    Text,
    check_length,
    derived_update_bound,
    less_slack,
    noise_slack,
)
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.layout import Layout, Targets, Train
from foedus_protocols.messages import OrgId
from foedus_protocols.roster import Roster

_DAY_SECONDS = 86_400
_DEFAULT_EPSILON = 8.0
_DEFAULT_DELTA = 1e-5
_DEFAULT_RANK = 16


class DraftParticipant(Terms):
    """What an organisation declared: `foedus client data add` prints these lines."""

    id: OrgId
    unit: str
    units_at_most: int


class DraftAdapter(Terms):
    """The adapter, before its digests are computed.

    `rank` defaults to 16; for ``experts`` to 16 over the experts of a token, so that as many matrices as with one pair
    meet each token. `alpha` defaults to 32; for ``experts`` to twice the rank.
    """

    targets: Targets = "attention"
    rank: int | None = None
    alpha: float | None = None
    seed: str = "foedus"
    layers: list[int] | None = None
    train: Train = "b"


class DraftPrivacy(Terms):
    """The privacy terms, before noise is calibrated.

    `l2_clip_norm` defaults to about a quarter of the median unit norm measured on public text; too low is free, too
    high costs a third of the gain.
    """

    mode: Literal["local", "none"] = "local"
    epsilon: Annotated[FiniteFloat, Field(gt=0, le=100)] | None = None
    delta: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    rounds: int = 10
    l2_clip_norm: Clip = 0.15
    target_units: int = accounting.TARGET_UNITS


class DraftMasks(Terms):
    """Survivors and ring; None takes the default for the number of participants and the mode."""

    enabled: Literal[False] = False
    min_survivors: Count | None = None
    ring_bits: Count | None = None


class DraftRelease(Terms):
    """The release terms; `last` is what a charter that says nothing means, and is left out of it."""

    recipients: Text = Release().recipients
    adapter: Literal["last", "best"] = "last"


class CharterDraft(Terms):
    """The TOML file."""

    name: str
    purpose: str
    domain: str
    valid_days: Annotated[int, Field(ge=1, le=3650)] = 30
    seed: int | None = None
    participants: list[DraftParticipant]
    adapter: DraftAdapter = DraftAdapter()
    recipe: Recipe = Recipe()
    privacy: DraftPrivacy = DraftPrivacy()
    masks: DraftMasks = DraftMasks()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    release: DraftRelease = DraftRelease()


def read_draft(path: Path) -> dict[str, Any]:
    """Read a charter's TOML file.

    Raises:
        ConfigError: No such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a charter in {path}, got: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"expected TOML in {path}, got: {error}") from error


def draft(
    toml: Mapping[str, Any],
    *,
    federation: str,
    roster: Roster,
    base_digest: str,
    base_config: Mapping[str, Any],
    base_name: str,
    now: int,
) -> Charter:
    """Fill in everything that a charter derives from its few free terms.

    Args:
        toml: The parsed TOML file (`CharterDraft`).
        federation: The federation's name.
        roster: Its current roster; gives the participants' signing keys.
        base_digest: The base's manifest digest.
        base_config: The base's ``config.json``.
        base_name: The base in words, for cards and PEFT's ``base_model_name_or_path``.
        now: Unix seconds; the charter is valid from here for `valid_days`.

    Raises:
        ConfigError: A field is unknown, missing or out of bounds, an organisation is not in the roster, or no noise
            meets the budget. The text names the field.
    """
    try:
        terms = CharterDraft.model_validate(dict(toml))
        check_length(terms.recipe.max_tokens, base_config)
        adapter, described = _adapter(terms.adapter, base_config)
        participants = tuple(_participant(one, terms, roster, described.length) for one in terms.participants)
        charter = Charter(
            version=1,
            federation=federation,
            roster_digest=roster.digest,
            name=terms.name,
            purpose=terms.purpose,
            domain=terms.domain,
            participants=participants,
            base=base_digest,
            base_name=base_name,
            adapter=adapter,
            recipe=terms.recipe,
            privacy=_privacy(terms.privacy),
            masks=_masks(terms, participants, described.length),
            schedule=terms.schedule,
            evaluation=terms.evaluation,
            release=Release(
                recipients=terms.release.recipients,
                adapter="best" if terms.release.adapter == "best" else None,
            ),
            not_before=now,
            expires=now + terms.valid_days * _DAY_SECONDS,
            seed=terms.seed,
        )
        charter.coding()  # Refuses a ring in which the sum could wrap.
        charter.rule()  # Refuses an optimiser setting that the rule cannot run.
    except ValidationError as error:
        found = "; ".join(
            (".".join(map(str, item["loc"])) or "the whole") + ": " + item["msg"] for item in error.errors()
        )
        raise ConfigError(f"expected a charter draft, got: {found}") from None
    except VerificationError as error:
        raise ConfigError(str(error)) from error
    return charter


def _participant(declared: DraftParticipant, terms: CharterDraft, roster: Roster, length: int) -> Participant:
    """The constants of one organisation, for a vector of `length`."""
    constants = accounting.party_constants(declared.units_at_most, terms.privacy.target_units)
    noise = 0.0
    privacy = _privacy(terms.privacy)
    if privacy.epsilon is not None and privacy.delta is not None:
        if privacy.delta * 10 * declared.units_at_most > 1:
            raise ConfigError(
                f"expected delta of at most 1/(10 x {declared.units_at_most}) for {declared.id}, got "
                f"{privacy.delta:g}: lower it"
            )
        steps = privacy.rounds * privacy.steps_per_round
        slack = noise_slack(length=length, steps=steps, epsilon=privacy.epsilon)
        noise = accounting.calibrate(
            epsilon=privacy.epsilon,
            delta=less_slack(privacy.delta, slack),
            sampling_prob=constants.sampling_prob,
            steps=steps,
        )
    return Participant(
        id=declared.id,
        signing_key=roster.member(declared.id).signing_key,
        unit=declared.unit,
        units_at_most=declared.units_at_most,
        sampling_prob=constants.sampling_prob,
        expected_units=constants.expected_units,
        noise_multiplier=noise,
        weight=accounting.weight(constants.expected_units, noise),
    )


def _privacy(terms: DraftPrivacy) -> Privacy:
    """The charter's section; a promise is filled in for mode `local` only."""
    if terms.mode == "none" and not (terms.epsilon is None and terms.delta is None):
        raise ConfigError("expected neither epsilon nor delta in mode none, which promises nothing: remove them")
    private = terms.mode == "local"
    return Privacy(
        mode=terms.mode,
        adjacency="add-remove-one",
        l2_clip_norm=terms.l2_clip_norm,
        epsilon=(terms.epsilon or _DEFAULT_EPSILON) if private else None,
        delta=(terms.delta or _DEFAULT_DELTA) if private else None,
        rounds=terms.rounds,
        steps_per_round=1,
        target_units=terms.target_units,
    )


def _adapter(terms: DraftAdapter, base_config: Mapping[str, Any]) -> tuple[Adapter, Layout]:
    """The charter's section and the layout that it names."""
    rank = default_rank(terms.targets, base_config) if terms.rank is None else terms.rank
    alpha = 2.0 * (rank if terms.targets == "experts" else _DEFAULT_RANK) if terms.alpha is None else terms.alpha
    described = layout.adapter_layout(
        base_config, targets=terms.targets, rank=rank, layers=terms.layers, train=terms.train
    )
    adapter = Adapter(
        targets=terms.targets,
        rank=rank,
        alpha=alpha,
        seed=terms.seed,
        layout_digest=described.digest,
        length=described.length,
        initial_digest=layout.initial_digest(described, terms.seed),
        layers=described.layers,
        train="both" if terms.train == "both" else None,
    )
    return adapter, described


def default_rank(targets: str, base_config: Mapping[str, Any]) -> int:
    """The rank of an adapter whose draft names none.

    Raises:
        ConfigError: The base does not say how many experts a token has.
    """
    return max(1, _DEFAULT_RANK // _experts_per_token(base_config)) if targets == "experts" else _DEFAULT_RANK


def _experts_per_token(base_config: Mapping[str, Any]) -> int:
    count = base_config.get("num_experts_per_tok")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"expected num_experts_per_tok in the base's config.json, got {count!r}: give adapter.rank")
    return count


def _masks(terms: CharterDraft, participants: tuple[Participant, ...], length: int) -> Masks:
    members = len(participants)
    # Under noise 16 bits add less than 1e-5 of its variance; without noise rounding is all the error there is.
    bits = terms.masks.ring_bits or (16 if terms.privacy.mode == "local" else 24)
    survivors = terms.masks.min_survivors or min(members, 2 * members // 3 + 1)
    return Masks.model_validate(
        {
            "enabled": False,
            "min_survivors": survivors,
            "ring_bits": bits,
            "update_bound": derived_update_bound(participants, length),
        }
    )


def charter_template() -> str:
    """A commented TOML file to start from. A `#` with no space behind it switches off a default, or an example."""
    optimiser, recipe, privacy, adapter = Optimiser(), Recipe(), DraftPrivacy(), DraftAdapter()
    schedule, evaluation, release = Schedule(), Evaluation(), DraftRelease()
    return f"""\
# The terms of one run. Every organisation reads and signs them; nothing trains before all have.

name = "first-run"              # small letters, digits and hyphens
purpose = "care-research"       # each organisation maps a purpose to its data
domain = "medical"              # in words, for the card
#valid_days = 30                # from the moment of drafting
#seed = 1                       # mode "none" only: makes the run repeatable

# One block for each organisation. `foedus client data add` prints it at the organisation.
[[participants]]
id = "hospital-a"
unit = "patient"                # what one unit of privacy is
units_at_most = 1024            # a declared bound, a power of two; never a count of the data

[[participants]]
id = "hospital-b"
unit = "patient"
units_at_most = 512

[adapter]
#targets = "{adapter.targets}"          # attention | experts-shared: one pair for a layer's experts | experts: one each
#layers = [0, 1]                # default: all of the base
#rank = {_DEFAULT_RANK}                      # inner dimension; default for experts: 16 over the experts of a token
#alpha = {2.0 * _DEFAULT_RANK}                   # the adapter is scaled by alpha / rank; default for experts: 2 x rank
#seed = "{adapter.seed}"                # public: the frozen half of the adapter follows from it
#train = "{adapter.train}"                    # b: A stays as seeded | both: A trains, too, in mode none only

[recipe]
#max_tokens = {recipe.max_tokens}               # of one record
#max_records_per_unit = {recipe.max_records_per_unit}       # of one unit, at most, in one round

[recipe.optimiser]              # runs on the sum, at every party
#name = "{optimiser.name}"                  # adam | sgd | adambc
#rate = {optimiser.rate}                    # length of a step
#beta1 = {optimiser.beta1}                    # adam and adambc: decay of the first moment
#beta2 = {optimiser.beta2}                   # adam and adambc: decay of the second moment
#epsilon = {optimiser.epsilon}                # adam only: added to the root of the second moment
#momentum = {optimiser.momentum}                 # sgd only

[privacy]
#mode = "{privacy.mode}"                 # local: each organisation's own noise protects its units | none: NOT PRIVATE
#epsilon = {_DEFAULT_EPSILON}                  # what one unit may lose in this run, at most
#delta = {_DEFAULT_DELTA}                  # at most 1/(10 x units_at_most) of every organisation
#rounds = {privacy.rounds}                    # one noised sum of each organisation a round
#l2_clip_norm = {privacy.l2_clip_norm}            # bound on one unit's gradient: a quarter of its median on public text
#target_units = {privacy.target_units}              # expected units of one organisation in one round

[masks]
#enabled = false                # this version has no secure aggregation: the coordinator sees each noised vector
#min_survivors = 2              # default: two thirds of the participants, plus one
#ring_bits = 16                 # default: 16 in mode local, 24 in mode none

[schedule]
#round_seconds = {schedule.round_seconds}         # every deadline of a round
#vector_slot_seconds = {schedule.vector_slot_seconds:g}        # vectors wait for a multiple; 0: they do not
#on_short_round = "{schedule.on_short_round}"        # wait | skip | end, when fewer than min_survivors vectors came

[evaluation]
#term = "{evaluation.term}"                  # none | plain: held-out scores leave; epsilon does not cover those units
#every = {evaluation.every}                      # rounds
#max_records = {evaluation.max_records}              # held-out records of one organisation

[release]
#recipients = "{release.recipients}"  # who may have the variant, in words
#adapter = "{release.adapter}"               # last | best: of the lowest held-out loss, where evaluation is plain
"""
