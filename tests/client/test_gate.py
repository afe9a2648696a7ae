"""The gate lets through what is on its list, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from foedus_client.gate import REFUSALS_PER_HOUR, Gate, Permit, check_answer, check_file
from foedus_client.state import ClientState
from foedus_protocols.canonical import digest
from foedus_protocols.errors import PolicyRefused, VerificationError
from foedus_protocols.messages import (
    AdvanceAnswer,
    Agreement,
    Body,
    CharterAnswer,
    CloseAnswer,
    EvaluateAnswer,
    History,
    Scores,
    TrainAnswer,
    TrainOrder,
)

pytestmark = pytest.mark.unit

WORDS, OTHER = "1" * 64, "2" * 64
SIGNATURE, FORGED = "a" * 128, "b" * 128
SCORES = Scores(loss_sum=1.5, tokens=3, units=1)
PERMIT = Permit(
    charter="c" * 64, run="run-1", round=2, words=WORDS, words_bytes=8, scores=True, signature=SIGNATURE, adapter=WORDS
)


class Chatty(TrainAnswer):
    """An answer with one thing more than the protocol has."""

    median_loss: float


@pytest.mark.parametrize(
    "answer",
    [
        CharterAnswer(signature=SIGNATURE),
        CharterAnswer(refused_step=10),
        TrainAnswer(vector_digest=WORDS, vector_bytes=8, scores=SCORES),
        TrainAnswer(),
        TrainAnswer(refused_step=8),
        AdvanceAnswer(adapter_digest=WORDS),
        EvaluateAnswer(scores=SCORES),
        EvaluateAnswer(),
        CloseAnswer(),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_what_is_on_the_list_passes(answer: Body) -> None:
    assert check_answer(answer, PERMIT)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Chatty(median_loss=2.0), id="a field more"),
        pytest.param(History(charter_digest=WORDS, rounds=[]), id="a history"),
        pytest.param(Agreement(charter_digest=WORDS, operator_signature=SIGNATURE, signatures={}), id="an agreement"),
        pytest.param(SCORES, id="bare scores"),
        pytest.param(CharterAnswer(signature=FORGED), id="a signature that nothing was allotted for"),
        pytest.param(CharterAnswer(signature=SIGNATURE, refused_step=1), id="signature and refusal"),
        pytest.param(CharterAnswer(), id="neither"),
        pytest.param(TrainAnswer(vector_digest=OTHER, vector_bytes=8), id="another vector"),
        pytest.param(TrainAnswer(vector_digest=WORDS, vector_bytes=9), id="another length"),
        pytest.param(TrainAnswer(vector_bytes=8), id="a length alone"),
        pytest.param(TrainAnswer(refused_step=1234567), id="a number as a message"),
        pytest.param(EvaluateAnswer(refused_step=-5), id="a negative number as a message"),
        pytest.param(AdvanceAnswer(adapter_digest=OTHER), id="another adapter"),
        pytest.param(EvaluateAnswer(scores=Scores(loss_sum=math.nan, tokens=1, units=1)), id="not finite"),
        pytest.param(EvaluateAnswer(scores=Scores(loss_sum=1.0, tokens=-1, units=1)), id="negative tokens"),
    ],
)
def test_anything_else_is_refused(answer: Body) -> None:
    with pytest.raises(VerificationError):
        check_answer(answer, PERMIT)


@pytest.mark.parametrize("answer", [TrainAnswer(scores=SCORES), EvaluateAnswer(scores=SCORES)])
def test_scores_need_the_charters_term(answer: Body) -> None:
    with pytest.raises(PolicyRefused) as refusal:
        check_answer(answer, Permit(words=WORDS, words_bytes=8))
    assert refusal.value.step == 9


def test_the_default_permit_lets_only_refusals_and_empty_answers_out() -> None:
    for answer in (TrainAnswer(vector_digest=WORDS, vector_bytes=8), AdvanceAnswer(adapter_digest=WORDS)):
        with pytest.raises(VerificationError):
            check_answer(answer, Permit())
    assert check_answer(TrainAnswer(refused_step=8), Permit())


def test_a_file_leaves_only_as_the_reserved_words(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_bytes(b"12345678")
    permit = Permit(words=digest(b"12345678"), words_bytes=8)
    assert check_file(file, permit) == 8
    with pytest.raises(VerificationError, match="reserved"):
        check_file(file, Permit())
    file.write_bytes(b"87654321")
    with pytest.raises(VerificationError, match="reserved bytes"):
        check_file(file, permit)


class Line:
    """A link that counts what it is given."""

    def __init__(self) -> None:
        self.pushed = 0

    def push(self, path: Path, digest: str, context: dict[str, Any]) -> dict[str, Any]:
        self.pushed += 1
        return {}

    def deliver(self, envelope: bytes) -> None:
        raise AssertionError("nothing is delivered here")


def test_departures_are_written_down_before_they_happen(tmp_path: Path) -> None:
    state, line = ClientState(tmp_path / "client.db"), Line()
    gate = Gate(line, state, clock=lambda: 50.0)
    file = tmp_path / "words"
    file.write_bytes(b"12345678")
    with pytest.raises(VerificationError):
        gate.push(file, permit=Permit(words=OTHER, words_bytes=8))
    assert (line.pushed, state.departures()) == (0, [])
    gate.push(file, permit=Permit(charter="c", round=3, words=digest(b"12345678"), words_bytes=8))
    gate.approve(EvaluateAnswer(scores=SCORES), permit=PERMIT)
    kinds = [(one.kind, one.round, one.rule) for one in state.departures()]
    assert kinds == [("vector", 3, "reserved words"), ("answer", 2, "evaluate answer")]


def test_refusals_are_limited(tmp_path: Path) -> None:
    now = 1000.0
    gate = Gate(Line(), ClientState(tmp_path / "client.db"), clock=lambda: now)
    for _ in range(REFUSALS_PER_HOUR):
        gate.approve(TrainAnswer(refused_step=9), permit=PERMIT)
    with pytest.raises(VerificationError, match="refusals an hour"):
        gate.approve(TrainAnswer(refused_step=9), permit=PERMIT)
    gate.approve(TrainAnswer(), permit=PERMIT)
    now += 3601.0
    gate.approve(TrainAnswer(refused_step=9), permit=PERMIT)


def test_an_order_is_no_answer() -> None:
    order = TrainOrder(
        charter_digest=WORDS,
        agreement_digest=WORDS,
        round=1,
        attempt=1,
        adapter_digest=WORDS,
        history_digest=WORDS,
        deadline=1.0,
        evaluate=False,
    )
    with pytest.raises(VerificationError):
        check_answer(order, PERMIT)
