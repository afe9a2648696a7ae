"""The terms of a run: one frozen value, its canonical bytes, its digest and its signatures.

A charter is what every party signs before anything trains (``docs/protocol.md`` section 2). It is written as TOML
(`charter_draft.py`), travels as RFC 8785 JSON, is named by the SHA-256 of those bytes, and is checked by each
organisation in twelve numbered steps (`charter_checks.py`). Everything here is public among the participants:
constants, no statistic of anybody's data.

Left out in this version: masks (`Masks.enabled` is always false), noise shared between organisations, several private
steps a round. A charter that asks for one of them does not parse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from foedus_protocols import accounting, codec, identity, rules
from foedus_protocols.canonical import canonical_bytes, digest, parse_canonical
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.layout import Layout, Targets, Train, Vector, adapter_layout, initial_vector
from foedus_protocols.messages import Agreement, Digest, OrgId

_SHOWN_ERRORS = 8  # Of a charter that does not parse: the text goes to a log and a database.
_SHOWN_NAME = 100
SIGNATURE_CONTEXT = "foedus/charter/1"
MAX_CHARTER_BYTES = 1 << 20

# Total variation distance of one drawn coordinate from the ideal rounded Gaussian, at most. The table of
# `foedus_client.noise` has at most 2^24 entries, each off by at most 2^-128, and leaves out a tail of 2^-140: below
# 2^-103. 2^-100 is charged.
NOISE_TABLE_DELTA_SLACK = 2.0**-100

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Noise = Annotated[FiniteFloat, Field(ge=0, le=1e4)]  # No accountant overflows on it; `calibrate` stops there too.
Clip = Annotated[FiniteFloat, Field(ge=1e-6, le=1e6)]  # Every square and quotient of it on the way is a finite float.
Moment = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
UnixSeconds = Annotated[int, Field(ge=0, le=2**40)]


class Terms(BaseModel):
    """Base of every part of a charter: frozen, strict, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Participant(Terms):
    """One organisation, and the constants that follow from its declared `units_at_most` (`charter_draft.py`)."""

    id: OrgId
    signing_key: PublicKey
    unit: Annotated[str, Field(min_length=1, max_length=100)]
    units_at_most: Count
    sampling_prob: Annotated[FiniteFloat, Field(gt=0, le=1)]
    expected_units: Positive
    noise_multiplier: Noise
    weight: Positive


class Adapter(Terms):
    """Which matrices are trained, and the digests that every party computes for itself (`layout.py`).

    Attributes:
        layers: The adapted layers, ascending; absent for all of the base.
        train: ``both`` where A trains beside B, which takes mode `none`; absent where every A stays as seeded.
    """

    targets: Targets
    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Positive
    seed: Annotated[str, Field(min_length=1, max_length=200)]
    layout_digest: Digest
    length: Count
    initial_digest: Digest
    layers: Annotated[tuple[Annotated[int, Field(ge=0, lt=4096)], ...], Field(min_length=1, max_length=4096)] | None = (
        None
    )
    train: Literal["both"] | None = None

    @property
    def trains(self) -> Train:
        """Which factors train, as `layout.adapter_layout` calls them."""
        return self.train or "b"

    def layout(self, base_config: Mapping[str, Any]) -> Layout:
        """The matrices on a base.

        Raises:
            ConfigError: The base has not the layers that are named, or its configuration misses a width.
        """
        return adapter_layout(base_config, targets=self.targets, rank=self.rank, layers=self.layers, train=self.trains)

    def start(self, base_config: Callable[[], Mapping[str, Any]]) -> Vector:
        """The trained matrices before round 1 of a run that extends nothing: zeros, and a trained A from the seed.

        Args:
            base_config: Gives the base's ``config.json``; asked only where A trains.
        """
        if self.train is None:
            return np.zeros(self.length, dtype=np.float32)  # (d,)
        return initial_vector(self.layout(base_config()), self.seed)


class Optimiser(Terms):
    """What turns the sum into the next adapter (`rules.py`). A rule ignores the fields that it does not use."""

    name: Literal["adam", "sgd", "adambc"] = "adam"
    rate: Positive = 0.02
    beta1: Moment = 0.0
    beta2: Moment = 0.99
    epsilon: Positive = 1e-8
    momentum: Moment = 0.0


class Recipe(Terms):
    """What one organisation computes from its units."""

    max_tokens: Count = 256
    max_records_per_unit: Count = 4
    optimiser: Optimiser = Optimiser()


class Privacy(Terms):
    """Mode, clip and length of the run; in mode `local` also the promise (`epsilon`, `delta`) to one privacy unit.

    `target_units` is the constant of the rule for `sampling_prob` and `expected_units`.
    """

    mode: Literal["local", "none"]
    adjacency: Literal["add-remove-one"]
    l2_clip_norm: Clip
    epsilon: Annotated[FiniteFloat, Field(gt=0, le=100)] | None = None
    delta: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    steps_per_round: Literal[1]
    target_units: Count


class Masks(Terms):
    """Secure aggregation (absent in this version) and the ring in which vectors are added."""

    enabled: Literal[False]
    min_survivors: Count
    ring_bits: Literal[12, 16, 20, 24, 32]
    update_bound: Positive


class Schedule(Terms):
    """One setting for every deadline, and what happens when too few vectors came.

    `vector_slot_seconds`: a finished vector leaves at the next multiple of it since the Unix epoch, by the
    coordinator's clock, so that its arrival says nothing of the size of the sample. 0: it leaves when it is ready.
    """

    round_seconds: Positive = 3600.0
    vector_slot_seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    on_short_round: Literal["wait", "skip", "end"] = "wait"


class Evaluation(Terms):
    """Whether held-out scores leave, and how often. `plain` ones carry no noise: epsilon does not cover them."""

    term: Literal["none", "plain"] = "none"
    every: Count = 1
    max_records: Count = 100


class Release(Terms):
    """Who may have the variant, in words, and which adapter it is.

    `adapter`: absent for the last one; `best` for the one with the lowest held-out loss among those that were scored.
    """

    recipients: Text = "the participants of this charter"
    adapter: Literal["best"] | None = None


class Extends(Terms):
    """The ended run that this one goes on from: its last adapter, its optimiser's state, and what it has spent.

    Attributes:
        run: The ended run's id; part of its coding keys.
        charter: Digest of its charter, which every participant has signed.
        history: Digest of its closed rounds (`messages.History`); replaying them gives the adapter and the state.
        adapter: Digest of the adapter that follows from them, where this charter starts.
        rounds_spent: Rounds that the ended run, those that it extends, and extensions of them that failed, opened.
            Closed or failed, each is spent.
    """

    run: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    charter: Digest
    history: Digest
    adapter: Digest
    rounds_spent: Annotated[int, Field(ge=1, le=2**31)]


class Charter(Terms):
    """The signed terms of a run."""

    version: Literal[1]
    federation: Annotated[str, Field(min_length=1, max_length=200)]
    roster_digest: Digest
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    purpose: Text
    domain: Text
    participants: Annotated[tuple[Participant, ...], Field(min_length=1, max_length=1000)]
    base: Digest
    base_name: Annotated[str, Field(min_length=1, max_length=200)]
    adapter: Adapter
    recipe: Recipe
    privacy: Privacy
    masks: Masks
    schedule: Schedule
    evaluation: Evaluation
    release: Release
    not_before: UnixSeconds
    expires: UnixSeconds
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    extends: Extends | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what in ("id", "signing_key"):
            values = [getattr(participant, what) for participant in self.participants]
            if len(set(values)) != len(values):
                raise ValueError(f"two participants have the same {what}")
        if self.expires <= self.not_before:
            raise ValueError("expires must be later than not_before")
        if self.schedule.vector_slot_seconds >= self.schedule.round_seconds:
            raise ValueError(
                "vector_slot_seconds must be shorter than round_seconds: no slot may lie past the deadline"
            )
        if self.release.adapter == "best" and self.evaluation.term != "plain":
            raise ValueError('release.adapter "best" needs held-out scores to choose by: set evaluation.term "plain"')
        if self.extends is not None and self.extends.adapter != self.adapter.initial_digest:
            raise ValueError("an extension starts from extends.adapter, so adapter.initial_digest must be the same")
        promised = self.privacy.epsilon is not None and self.privacy.delta is not None
        silent = self.privacy.epsilon is None and self.privacy.delta is None
        noises = [participant.noise_multiplier for participant in self.participants]
        noised = min(noises) >= accounting.SMALLEST_NOISE
        if self.privacy.mode == "local" and not (promised and noised and self.seed is None):
            raise ValueError("mode local needs epsilon, delta and noise for every participant, and takes no seed")
        if self.privacy.mode != "none" and self.adapter.train is not None:
            raise ValueError(
                'adapter.train "both" takes mode none: under noise every A stays as the seed gives it, so that no '
                "product of two noises trains"
            )
        if self.privacy.mode == "none" and not (silent and max(noises) == 0):
            raise ValueError("mode none has neither epsilon, delta nor noise")
        return self

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode a charter that must be in canonical form.

        Raises:
            VerificationError: Too long, not canonical, or not of this shape. The text names fields, never values.
        """
        if len(data) > MAX_CHARTER_BYTES:
            raise VerificationError(f"expected a charter of at most {MAX_CHARTER_BYTES} bytes, got {len(data)}")
        parse_canonical(data)
        try:
            charter = cls.model_validate_json(data)
        except ValidationError as error:
            items = error.errors(include_url=False, include_context=False, include_input=False)
            found = "; ".join(
                (".".join(map(str, item["loc"])) or "the whole")[:_SHOWN_NAME] + ": " + item["msg"]
                for item in items[:_SHOWN_ERRORS]
            ) + ("" if len(items) <= _SHOWN_ERRORS else f"; and {len(items) - _SHOWN_ERRORS} more")
            raise VerificationError(
                f"expected a charter of version 1, got: {found}. "
                "Where a newer version of Foedus wrote it, update this one"
            ) from None
        if charter.canonical() != data:
            raise VerificationError("expected a charter with every field written out, got one that leans on defaults")
        return charter

    def canonical(self) -> bytes:
        """The bytes that are signed: RFC 8785 JSON, absent values left out."""
        return canonical_bytes(self.model_dump(mode="json", exclude_none=True))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes: the charter's name everywhere."""
        return digest(self.canonical())

    @property
    def private(self) -> bool:
        """Whether the mode promises anything to a privacy unit."""
        return self.privacy.mode != "none"

    def participant(self, org: str) -> Participant:
        """The terms of one organisation.

        Raises:
            VerificationError: The charter does not name it.
        """
        for participant in self.participants:
            if participant.id == org:
                return participant
        raise VerificationError(f"expected a participant of charter {self.digest[:12]}, got {org!r}")

    def relative_weight(self, org: str) -> float:
        """w_i / max w, in (0, 1]: what a vector is multiplied by before it is coded."""
        return self.participant(org).weight / max(participant.weight for participant in self.participants)

    def coding(self) -> codec.Coding:
        """The ring of this charter's vectors (``docs/protocol.md`` section 4)."""
        return codec.Coding(
            length=self.adapter.length,
            ring_bits=self.masks.ring_bits,
            update_bound=self.masks.update_bound,
            members=len(self.participants),
        )

    def coding_key(self, run: str, round_number: int) -> bytes:
        """The public key of a round's permutation and signs.

        In mode `none` with a seed it follows from the seed, as every other draw there: a run repeated elsewhere, under
        other keys and dates, gives the same bits.
        """
        if self.seed is not None:
            return codec.coding_key(f"seed-{self.seed}", "", self.draw_number(round_number))
        return codec.coding_key(self.digest, run, round_number)

    def draw_number(self, round_number: int) -> int:
        """The number that seeded draws of a round take: counted from the first run's first round, so that an extension
        in mode `none` does not repeat what the run before it drew.
        """
        return round_number + (0 if self.extends is None else self.extends.rounds_spent)

    def rule(self) -> rules.Rule:
        """The server optimiser, as `rules.py` takes it; AdamBC also gets the variance of the noise in its input."""
        optimiser = self.recipe.optimiser
        known = rules.noise_variance(_constants(self.participants)) if optimiser.name == "adambc" else 0.0
        return rules.Rule(**optimiser.model_dump(), noise_variance=known)


def check_length(max_tokens: int, base_config: Mapping[str, Any]) -> None:
    """Accept the length of the longest record. Beyond its positions a model computes on, and means nothing by it.

    Raises:
        ConfigError: It is longer than the base's longest text.
    """
    longest = base_config.get("max_position_embeddings")
    if isinstance(longest, int) and max_tokens > longest:
        raise ConfigError(f"expected max_tokens up to {longest}, the base's longest text, got {max_tokens}: lower it")


def derived_update_bound(participants: tuple[Participant, ...], length: int) -> float:
    """`update_bound` as every party computes it from the constants of all participants."""
    return codec.update_bound(_constants(participants), length)


def _constants(participants: tuple[Participant, ...]) -> list[tuple[float, float, float]]:
    """(weight, expected_units, noise_multiplier) of each."""
    return [(one.weight, one.expected_units, one.noise_multiplier) for one in participants]


# --- Accounting ------------------------------------------------------------------------------------------------------


def round_event(charter: Charter, participant: Participant) -> accounting.Event | None:
    """What one round releases about one unit, as the accountant counts it; None in mode `none`."""
    if not charter.private:
        return None
    return accounting.Event(
        noise_multiplier=participant.noise_multiplier,
        sampling_prob=participant.sampling_prob,
        steps=charter.privacy.steps_per_round,
    )


def charter_events(charter: Charter, participant: Participant) -> tuple[accounting.Event, ...]:
    """All events of the charter for one organisation: what is allotted when it signs."""
    if not charter.private:
        return ()
    return (
        accounting.Event(
            noise_multiplier=participant.noise_multiplier,
            sampling_prob=participant.sampling_prob,
            steps=charter.privacy.steps_per_round * charter.privacy.rounds,
        ),
    )


def noise_slack(*, length: int, steps: int, epsilon: float) -> float:
    """The delta that the noise table costs.

    Guarantees:
        A mechanism within total variation tau of an (epsilon, delta) one is (epsilon, delta + (1 + e^epsilon) tau).
        Here tau = length x steps x `NOISE_TABLE_DELTA_SLACK`, a union bound over every coordinate ever drawn.
    """
    return (1.0 + math.exp(epsilon)) * length * steps * NOISE_TABLE_DELTA_SLACK


def less_slack(delta: float, slack: float) -> float:
    """delta - slack, rounded towards zero, so that a float never gives away what the subtraction took.

    Raises:
        VerificationError: Nothing is left of delta.
    """
    left = math.nextafter(delta - slack, 0.0)
    if not left > 0.0:
        raise VerificationError(
            f"expected delta above the noise table's slack {slack:.3g}, got {delta:.3g}: raise delta, or lower epsilon "
            "(in a policy, epsilon_cap), with whose exponential the slack grows"
        )
    return left


def delta_for_accountant(charter: Charter, participant: Participant) -> float:
    """The delta at which the accountant is asked: the charter's, less what the noise table costs this participant.

    An extension's covers the rounds that were spent before it too.

    Raises:
        VerificationError: The charter is of mode `none`, or its delta is smaller than the slack.
    """
    if charter.privacy.epsilon is None or charter.privacy.delta is None:
        raise VerificationError(f"expected a private charter, got {charter.name!r} in mode {charter.privacy.mode}")
    spent = 0 if charter.extends is None else charter.extends.rounds_spent
    steps = charter.privacy.steps_per_round * (spent + charter.privacy.rounds)
    slack = noise_slack(length=charter.adapter.length, steps=steps, epsilon=charter.privacy.epsilon)
    return less_slack(charter.privacy.delta, slack)


# --- Signatures ------------------------------------------------------------------------------------------------------


def sign_charter(key: Ed25519PrivateKey, charter_digest: str) -> str:
    """A party's signature over a charter's digest."""
    return identity.sign(key, SIGNATURE_CONTEXT, bytes.fromhex(charter_digest))


def verify_charter_signature(public_key: str, charter_digest: str, signature: str) -> None:
    """Check one signature over a charter's digest.

    Raises:
        VerificationError: The key did not sign this digest.
    """
    identity.verify(public_key, SIGNATURE_CONTEXT, bytes.fromhex(charter_digest), signature)


def verify_agreement(charter: Charter, agreement: Agreement, operator_key: str) -> None:
    """Check that the operator and every named organisation, and nobody else, signed this very charter.

    Raises:
        VerificationError: Another charter, a missing, superfluous or wrong signature.
    """
    if agreement.charter_digest != charter.digest:
        raise VerificationError(
            f"expected signatures of charter {charter.digest[:12]}, got those of {agreement.charter_digest[:12]}"
        )
    verify_charter_signature(operator_key, charter.digest, agreement.operator_signature)
    named = {participant.id: participant.signing_key for participant in charter.participants}
    if missing := sorted(named.keys() - agreement.signatures.keys()):
        raise VerificationError(f"expected the signature of every participant, got none of {', '.join(missing)}")
    if strangers := sorted(agreement.signatures.keys() - named.keys()):
        raise VerificationError(f"expected signatures of participants only, got one of {', '.join(strangers)}")
    for org, public_key in named.items():
        try:
            verify_charter_signature(public_key, charter.digest, agreement.signatures[org])
        except VerificationError as error:
            raise VerificationError(f"expected {org}'s signature of charter {charter.digest[:12]}: {error}") from None
