"""The bodies of control messages: what a coordinator asks and what an organisation answers.

Each body is a frozen model with nothing optional by accident: an unknown field, a missing one or a wrong type is
refused. On the wire a body is canonical JSON inside a signed envelope (`envelope.py`), at most 64 KiB; vectors,
charters and adapters travel beside it, named by digest.

The message types, and who answers what::

    charter    CharterOffer  -> CharterAnswer     will you sign these terms?
    train      TrainOrder    -> TrainAnswer       one clipped, noised and coded vector, please
    advance    AdvanceOrder  -> AdvanceAnswer     here is the sum; what adapter do you get?
    evaluate   EvaluateOrder -> EvaluateAnswer    held-out scores, where the charter's evaluation term allows them
    close      CloseNotice   -> CloseAnswer       the run is over; free what was not spent
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.errors import VerificationError

MAX_BODY_BYTES = 64 * 1024
MAX_HISTORY_BYTES = 64 << 20

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
OrgId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Body(BaseModel):
    """Base of every message body, and of the two files that are written like one."""

    max_bytes: ClassVar[int] = MAX_BODY_BYTES

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def encode(self) -> bytes:
        """Canonical JSON of the body."""
        return canonical_bytes(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse and check a body.

        Raises:
            VerificationError: Too long, not canonical, or not of this shape. The text names fields, never values.
        """
        if len(data) > cls.max_bytes:
            raise VerificationError(f"expected a {cls.__name__} of at most {cls.max_bytes} bytes, got {len(data)}")
        value = parse_canonical(data)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, item["loc"])) or "(body)" for item in error.errors())
            raise VerificationError(f"expected a {cls.__name__}, got wrong or missing fields: {fields}") from None


class CharterOffer(Body):
    """The terms of a run, to be signed or refused. The charter itself is the file `charter_digest`."""

    charter_digest: Digest
    operator_signature: Signature


class CharterAnswer(Body):
    """An organisation's signature, or the number of the check that failed, and nothing else."""

    signature: Signature | None = None
    refused_step: int | None = None


class TrainOrder(Body):
    """One round's offer to one organisation.

    `agreement_digest` names the file with everyone's signatures; `history_digest` the file of closed rounds, which a
    member that missed some replays; `deadline` is in Unix seconds of the coordinator's clock.
    """

    charter_digest: Digest
    agreement_digest: Digest
    round: int
    attempt: int
    adapter_digest: Digest
    history_digest: Digest
    deadline: float
    evaluate: bool


class Scores(Body):
    """Held-out scores: the sum of token losses in nats, and the number of tokens and units they stand for."""

    loss_sum: float
    tokens: int
    units: int


class TrainAnswer(Body):
    """The digest of the vector that was pushed, and held-out scores of the round's starting adapter if allowed."""

    vector_digest: Digest | None = None
    vector_bytes: int | None = None
    scores: Scores | None = None
    refused_step: int | None = None


class AdvanceOrder(Body):
    """The sum of a round is published: replay it."""

    charter_digest: Digest
    round: int
    history_digest: Digest


class AdvanceAnswer(Body):
    """The adapter that the organisation computed from the sums."""

    adapter_digest: Digest


class EvaluateOrder(Body):
    """Score the adapter that follows from the history, without training. Refused unless the charter allows it."""

    charter_digest: Digest
    agreement_digest: Digest
    round: int
    adapter_digest: Digest
    history_digest: Digest
    deadline: float


class EvaluateAnswer(Body):
    """Held-out scores, absent where the organisation holds out nothing."""

    scores: Scores | None = None
    refused_step: int | None = None


class CloseNotice(Body):
    """The run is over for everybody."""

    charter_digest: Digest
    outcome: Literal["complete", "failed", "refused", "stopped"]
    reason: str


class CloseAnswer(Body):
    """Noted; what was allotted and not spent is free again."""


class ClosedRound(Body):
    """One entry of a run's history: whose vectors are in the sum, and where it leads."""

    round: int
    attempt: int
    survivors: list[OrgId]
    sum_digest: Digest
    adapter_digest: Digest


class History(Body):
    """The closed rounds of a run, oldest first. Failed rounds leave no entry: they change no adapter.

    It grows with the run and is always a file, never the body of an envelope: 2000 rounds of 100 survivors are 3 MB.
    """

    max_bytes: ClassVar[int] = MAX_HISTORY_BYTES

    charter_digest: Digest
    rounds: list[ClosedRound]


class Agreement(Body):
    """A charter with the signatures of its operator and of every organisation that it names."""

    charter_digest: Digest
    operator_signature: Signature
    signatures: dict[OrgId, Signature]
