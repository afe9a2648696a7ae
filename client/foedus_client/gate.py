"""The one door out of an organisation: what may leave, by whitelist (``docs/privacy.md``, "What leaves").

Everything that an organisation sends passes here, after the code that made it and independent of it. An answer leaves
if its type is one of five, and if every field in it equals what the round's own book-keeping says about it; a file
leaves if it is the coded words of a round whose budget is reserved. Anything else is refused, whoever asked for it: a
metric that training code would like to report has no way through. What leaves is written down first.

Not covered: the time at which something leaves (see ``vector_slot_seconds``), and what TLS shows (sizes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from foedus_protocols.canonical import digest_file
from foedus_protocols.errors import PolicyRefused, VerificationError
from foedus_protocols.messages import (
    AdvanceAnswer,
    Body,
    CharterAnswer,
    CloseAnswer,
    EvaluateAnswer,
    Scores,
    TrainAnswer,
)

from foedus_client.state import ClientState, Departure, Receipt

REFUSALS_PER_HOUR = 60
PERSON_DECLINED = 0
"""What leaves instead of a check's number when a person said no."""
LAST_CHECK = 12

B = TypeVar("B", bound=Body)


class Outbound(Protocol):
    """The two ways out that the link has."""

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> Receipt:
        """Send a file and return the coordinator's receipt."""

    def deliver(self, envelope: bytes) -> None:
        """Send the answer to a message."""


@dataclass(frozen=True, kw_only=True)
class Permit:
    """What one message may be answered with, as the round's book-keeping has it. The default permits nothing.

    Attributes:
        charter: The charter that the message belongs to.
        run: Its run.
        round: Its round, 0 outside of rounds.
        words: Digest of this round's coded words, once they are reserved.
        words_bytes: Their length.
        scores: Whether the charter's evaluation term lets scores leave now.
        signature: Our signature of the charter, once the budget is allotted.
        adapter: Digest of the adapter that follows from the published sums.
    """

    charter: str | None = None
    run: str = ""
    round: int = 0
    words: str | None = None
    words_bytes: int | None = None
    scores: bool = False
    signature: str | None = None
    adapter: str | None = None


def check_answer(body: Body, permit: Permit) -> str:
    """Let one answer pass, or refuse it.

    Returns:
        The rule that let it pass, for the log of departures.

    Raises:
        VerificationError: A type, digest, signature or number that the permit does not name.
        PolicyRefused: Scores that the charter's evaluation term does not allow (step 9).

    Guarantees:
        The fields of a passed answer are functions of the permit, of the number of a failed check, and, where the
        charter's evaluation term is ``plain``, of three numbers about held-out units. Subclasses with more fields do
        not pass: the type is compared, not its ancestry.
    """
    rule = _RULES.get(type(body))
    if rule is None:
        raise VerificationError(
            f"expected one of five answers at the gate, got a {type(body).__name__}; nothing was sent"
        )
    return rule(body, permit)


def check_file(path: Path, permit: Permit) -> int:
    """Let a round's coded words pass, or refuse the file.

    Returns:
        Its length in bytes.

    Raises:
        VerificationError: The permit names no words, or the file's bytes are not those words.
    """
    if permit.words is None:
        raise VerificationError("expected a file whose budget is reserved, got one without; nothing was sent")
    size = path.stat().st_size
    if size != permit.words_bytes or digest_file(path) != permit.words:
        raise VerificationError(
            f"expected the {permit.words_bytes} reserved bytes {permit.words[:12]}, got {size} others; nothing was sent"
        )
    return size


class Gate:
    """The whitelist with the link behind it and the log of departures beside it."""

    def __init__(self, link: Outbound, state: ClientState, *, clock: Callable[[], float] = time.time) -> None:
        self._link = link
        self._state = state
        self._clock = clock

    def push(self, path: Path, *, permit: Permit) -> Receipt:
        """Send a round's coded words."""
        size = check_file(path, permit)
        words = permit.words or ""
        self._note("vector", permit, words, size, "reserved words")
        context = {"charter": permit.charter, "run": permit.run, "round": permit.round}
        return self._link.push(path, words, context)

    def approve(self, body: Body, *, permit: Permit) -> None:
        """Check an answer and write down that it leaves. The caller seals it and calls `send`."""
        rule = check_answer(body, permit)
        kind = "answer"
        if getattr(body, "refused_step", None) is not None:
            kind = "refusal"
            recent = self._state.departures(kind="refusal", since=self._clock() - 3600.0)
            if len(recent) >= REFUSALS_PER_HOUR:
                raise VerificationError(
                    f"expected at most {REFUSALS_PER_HOUR} refusals an hour, the next is held back: "
                    "somebody is probing this organisation's policy"
                )
        self._note(kind, permit, None, len(body.encode()), rule)

    def send(self, envelope: bytes) -> None:
        """Send a sealed answer that was approved and stored before."""
        self._link.deliver(envelope)

    def _note(self, kind: str, permit: Permit, digest: str | None, size: int, rule: str) -> None:
        self._state.note_departure(
            Departure(
                at=self._clock(),
                kind=kind,
                charter=permit.charter,
                round=permit.round or None,
                digest=digest,
                bytes=size,
                rule=rule,
            )
        )


def _charter_answer(body: Body, permit: Permit) -> str:
    answer = _typed(body, CharterAnswer)
    _step(answer.refused_step)
    if (answer.signature is None) == (answer.refused_step is None):
        raise VerificationError("expected a signature or a refusal, got both or neither; nothing was sent")
    if answer.signature is not None and answer.signature != permit.signature:
        raise VerificationError("expected the signature that the ledger allotted a budget for; nothing was sent")
    return "charter answer"


def _train_answer(body: Body, permit: Permit) -> str:
    answer = _typed(body, TrainAnswer)
    _step(answer.refused_step)
    _scores(answer.scores, permit)
    if answer.vector_digest is not None and (
        answer.vector_digest != permit.words or answer.vector_bytes != permit.words_bytes
    ):
        raise VerificationError("expected the digest of the reserved words in a train answer; nothing was sent")
    if answer.vector_digest is None and answer.vector_bytes is not None:
        raise VerificationError("expected no length without a vector; nothing was sent")
    return "train answer"


def _advance_answer(body: Body, permit: Permit) -> str:
    if _typed(body, AdvanceAnswer).adapter_digest != permit.adapter:
        raise VerificationError("expected the digest of the adapter that follows from the sums; nothing was sent")
    return "advance answer"


def _evaluate_answer(body: Body, permit: Permit) -> str:
    answer = _typed(body, EvaluateAnswer)
    _step(answer.refused_step)
    _scores(answer.scores, permit)
    return "evaluate answer"


def _close_answer(body: Body, permit: Permit) -> str:
    _typed(body, CloseAnswer)
    return "close answer"


_RULES: dict[type[Body], Callable[[Body, Permit], str]] = {
    CharterAnswer: _charter_answer,
    TrainAnswer: _train_answer,
    AdvanceAnswer: _advance_answer,
    EvaluateAnswer: _evaluate_answer,
    CloseAnswer: _close_answer,
}


def _typed(body: Body, kind: type[B]) -> B:
    if type(body) is not kind:
        raise VerificationError(f"expected a {kind.__name__} at the gate, got a {type(body).__name__}")
    return body


def _step(step: int | None) -> None:
    if step is not None and not PERSON_DECLINED <= step <= LAST_CHECK:
        raise VerificationError(f"expected a check's number up to {LAST_CHECK}, got {step}; nothing was sent")


def _scores(scores: Scores | None, permit: Permit) -> None:
    if scores is None:
        return
    if not permit.scores:
        raise PolicyRefused(9, "the charter's evaluation term lets no scores leave now; nothing was sent")
    if type(scores) is not Scores or not math.isfinite(scores.loss_sum) or scores.tokens < 0 or scores.units < 0:
        raise VerificationError("expected finite scores of the plain kind at the gate; nothing was sent")
