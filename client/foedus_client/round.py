"""One round as the organisation lives it: plain functions, in the order in which they happen.

    check     everyone's signatures, validity, membership, base, adapter, recipe, budget (steps 1 to 12)
    catch up  replay the sums that were missed; the adapter must be the announced one
    score     held-out scores of that adapter, where the charter's evaluation term allows them
    train     the worker writes one clipped and noised vector
    code      into the words of the ring: drawn once, on disk before anything is reserved
    reserve   one ledger transaction spends the round's event on exactly these words
    hold      until the next slot, where the charter names slots
    push      through the gate, to the coordinator's disk
    commit    the signed receipt goes into the ledger

A kill before `reserve` has released nothing and spent nothing; a kill after it sends those same words when the order
comes again, in whatever attempt. Nothing here knows of sockets, Flower or torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from foedus_protocols import codec
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import round_event
from foedus_protocols.errors import BudgetExhausted, PolicyRefused, RoundFailed, StateError
from foedus_protocols.files import disk_errors
from foedus_protocols.messages import (
    MAX_BODY_BYTES,
    AdvanceAnswer,
    AdvanceOrder,
    Agreement,
    CloseAnswer,
    CloseNotice,
    EvaluateAnswer,
    EvaluateOrder,
    Scores,
    TrainAnswer,
    TrainOrder,
)
from foedus_protocols.packing import pack
from foedus_protocols.receipt import open_receipt

from foedus_client import receipts
from foedus_client.gate import Permit
from foedus_client.ledger import Entry
from foedus_client.life import SENDING, paused, require_not_left
from foedus_client.replay import AdapterDiffers, Position, catch_up, forget
from foedus_client.seat import Ports, Seat
from foedus_client.slots import wait_for_slot
from foedus_client.state import RoundRecord
from foedus_client.work import EvaluateTask, TrainTask

_LOG = logging.getLogger("foedus.client")

CHECK_SECONDS = 1800.0
"""What the checks before a run's first step may take beyond the deadline: they pass once, for every later order."""

Vector = npt.NDArray[np.float32]


def take_part(order: TrainOrder, seat: Seat, ports: Ports) -> tuple[TrainAnswer, Permit]:
    """Take part in one round.

    Returns:
        The answer, and what the gate may let out of it. Without a vector where the deadline has passed and nothing was
        reserved: a late vector would be spent for nothing.

    Raises:
        Held: The words wait for their slot.
        RoundFailed: Nothing is reserved, and the deadline passed in the middle of the work or a person paused.
        PolicyRefused: A numbered check failed.
        VerificationError: History, sum, receipt or agreement are not what they should be.
        ConnectError: The link broke; the same order will come again.

    Guarantees:
        At most one set of words is ever sent for a (charter, run, round), whatever is repeated or killed, and none
        before the ledger holds a reservation with its digest.
    """
    # What is reserved already is spent already: a last round's words still leave after a kill.
    spends = ports.ledger.reservation(seat.digest, seat.run, order.round) is None
    check(order.agreement_digest, seat, ports, spends=spends)
    position = _follow(order.history_digest, seat, ports)
    _require_adapter(order.adapter_digest, position)
    _require_round(order.round, seat, ports)
    if ports.state.last_scored(seat.digest) is not None:
        raise PolicyRefused(9, "the round of scores that closes the run was answered, no training follows it")
    if receipts.abandoned(seat, order.round, ports):
        return TrainAnswer(), permit_of(seat, order.round)
    made = ports.state.round(seat.digest, order.round)
    if made is None and ports.clock() > order.deadline:
        _LOG.warning("round %d: its deadline has passed, nothing is trained", order.round)
        return TrainAnswer(), permit_of(seat, order.round)
    working = ports if made is not None else _interruptible(order.deadline, seat, ports)
    scores = score(position, seat, working, last=False) if order.evaluate else None
    if made is None:
        check_mechanism(seat, _interruptible(order.deadline + CHECK_SECONDS, seat, ports))
        vector = train(order, position, seat, working)
        made = code(vector, order.round, seat, ports)
    entry = reserve(made, seat, ports)
    wait_for_slot(made, order.deadline, seat, ports)
    permit = permit_of(seat, order.round, words=made, scores=order.evaluate)
    push(made, entry, permit, seat, ports)
    return TrainAnswer(vector_digest=made.words, vector_bytes=made.words_bytes, scores=scores), permit


def advance(order: AdvanceOrder, seat: Seat, ports: Ports) -> tuple[AdvanceAnswer, Permit]:
    """Replay the published sum and say which adapter follows, also where it is not the announced one."""
    try:
        ours = _follow(order.history_digest, seat, ports).digest
    except AdapterDiffers as error:
        _LOG.error("%s", error)
        ours = error.ours
    else:
        _erase_words(seat, ports)
    return AdvanceAnswer(adapter_digest=ours), Permit(
        charter=seat.digest, run=seat.run, round=order.round, adapter=ours
    )


def evaluate(order: EvaluateOrder, seat: Seat, ports: Ports) -> tuple[EvaluateAnswer, Permit]:
    """Score the run's last adapter without training.

    Raises:
        PolicyRefused: The charter's evaluation term allows no scores (step 9), or another check failed.

    Guarantees:
        It is asked once a run: after it neither another adapter is scored in this way, nor anything trained.
    """
    check(order.agreement_digest, seat, ports, spends=False)
    position = _follow(order.history_digest, seat, ports)
    _require_adapter(order.adapter_digest, position)
    scores = score(position, seat, _interruptible(order.deadline, seat, ports), last=True)
    return EvaluateAnswer(scores=scores), permit_of(seat, order.round, scores=True)


def close(notice: CloseNotice, run: str, ports: Ports) -> tuple[CloseAnswer, Permit]:
    """The run is over: free what was allotted and not spent, erase words, sums, positions and signed agreements.

    The charter's own file stays: it says what the organisation signed. It needs no seat: a charter that this
    organisation refused, or whose data it no longer has, is closed alike.
    """
    charter = notice.charter_digest
    ports.ledger.release_allotment(charter, why=notice.outcome)
    agreement, history = ports.state.charter(charter).agreement, ports.state.fact(_history_fact(charter))
    for digest in (agreement, history):
        if digest is not None:
            ports.store.delete(digest)
    ports.state.forget(_history_fact(charter))
    for made in ports.state.rounds(charter):
        ports.store.delete(made.words)
    for entry in ports.state.history(charter):
        ports.store.delete(entry.sum_digest)
    forget(charter, ports.work)
    ports.state.mark_closed(charter, f"{notice.outcome}: {notice.reason}")
    return CloseAnswer(), Permit(charter=charter, run=run)


# The steps.


def check(agreement_digest: str, seat: Seat, ports: Ports, *, spends: bool) -> None:
    """Steps 1 to 12 of ``docs/protocol.md`` section 2, everyone's signatures included.

    Args:
        agreement_digest: The file with the signatures.
        spends: Whether the allotment has to cover one more round; scores and words that are reserved need none.

    Raises:
        PolicyRefused: The first step that failed.
    """
    seat.check(Agreement.decode(ports.pull(agreement_digest, MAX_BODY_BYTES).read_bytes()), spends)
    ports.state.mark_agreed(seat.digest, agreement_digest)


def check_mechanism(seat: Seat, ports: Ports) -> None:
    """Before the first step of a run: coverage and gradients of every matrix; where private, sensitivity and noise.

    All on synthetic records of the run's shapes, so that a stop says nothing of the data.

    Raises:
        PrivacyCheckFailed: One of them failed; nothing was released.
    """
    if ports.state.charter(seat.digest).checked:
        return
    ports.doing(f"run {seat.run}: checking the mechanism before the first step")
    reply = ports.worker.check(seat.setup, seat.check_task(), ports.tick)
    ports.state.mark_checked(seat.digest)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(reply.figures.items()))
    kind = "privacy" if seat.charter.private else "gradient"
    _LOG.info("%s checks passed: %s", kind, figures or "no figures")


def score(position: Position, seat: Seat, ports: Ports, *, last: bool) -> Scores | None:
    """Held-out scores of an adapter, once: a repeated order gets the stored ones.

    Args:
        last: Whether this is the evaluate-only round that closes the run.

    Raises:
        PolicyRefused: The charter's evaluation term does not allow them (step 9).
    """
    allowed = seat.scores_allowed(position.after, last=last)
    if not allowed or (last and ports.state.mark_last_scored(seat.digest, position.after) != position.after):
        raise PolicyRefused(9, "the charter's evaluation term does not let scores of this adapter leave")
    known, scores = ports.state.scores(seat.digest, position.after)
    if known:
        return scores
    adapter = _adapter_file(position, ports)
    task = EvaluateTask(adapter=str(adapter), max_records=seat.charter.evaluation.max_records)
    ports.doing(f"run {seat.run}: scoring the adapter after {position.after} rounds on held-out units")
    scores = ports.worker.evaluate(seat.setup, task, ports.tick).scores
    ports.state.save_scores(seat.digest, position.after, scores)
    return scores


def train(order: TrainOrder, position: Position, seat: Seat, ports: Ports) -> Vector:
    """Have the worker make one vector: clipped, noised, divided by the charter's constants.

    Raises:
        RoundFailed: The worker wrote something else than d finite numbers.
    """
    output = ports.work / "vector.f32"
    output.unlink(missing_ok=True)
    task = TrainTask(
        terms=seat.terms,
        org=seat.org,
        round=seat.charter.draw_number(order.round),
        adapter=str(_adapter_file(position, ports)),
        output=str(output),
    )
    ports.doing(f"round {order.round} of {seat.run}: training")
    reply = ports.worker.train(seat.setup, task, ports.tick)
    _LOG.info("round %d: trained (%s)", order.round, _figures(reply.figures))
    vector = np.fromfile(output, dtype="<f4") if output.is_file() else np.empty(0, np.float32)
    output.unlink(missing_ok=True)
    if vector.size != seat.charter.adapter.length or not np.isfinite(vector).all():
        raise RoundFailed(
            f"expected {seat.charter.adapter.length} finite numbers of the worker, got {vector.size}; see worker.log"
        )
    return vector.astype(np.float32, copy=False)


def code(vector: Vector, number: int, seat: Seat, ports: Ports) -> RoundRecord:
    """Weight, rotate, round and pack the vector, which is used up; the words are on disk when this returns.

    Guarantees:
        In private modes the stochastic rounding draws from the operating system. Clamping and scaling are
        post-processing of an already noised vector and cost no privacy.
    """
    vector *= np.float32(seat.charter.relative_weight(seat.org))  # In place: a copy is as long as the adapter.
    key = seat.charter.coding_key(seat.run, number)
    encoded = codec.encode(vector, coding=seat.coding, key=key, uniform=_uniform(number, seat), clamp=True)
    if encoded.clamped:
        _LOG.warning("round %d: %d coordinates were clamped to the coding range", number, encoded.clamped)
    data = pack(encoded.words, seat.charter.masks.ring_bits)
    digest = ports.store.put_bytes(data)
    ports.state.save_words(seat.digest, number, digest=digest, size=len(data))
    made = ports.state.round(seat.digest, number)
    if made is None:
        raise StateError(f"expected the words of round {number} in client.db right after they were saved")
    return made


def reserve(made: RoundRecord, seat: Seat, ports: Ports) -> Entry:
    """Spend the round's event on these words; the same words again spend nothing.

    Raises:
        BudgetExhausted: The words are gone and their budget is spent, or the allotment does not cover the round.
    """
    if not ports.store.has(made.words):
        raise BudgetExhausted(10, f"the words of round {made.round} are no longer in files/, their budget stays spent")
    event = round_event(seat.charter, seat.me)
    entry = ports.ledger.reserve(seat.namespace, seat.digest, seat.run, made.round, event, made.words)
    receipts.remember_heads(ports.ledger, ports.state)
    return entry


def push(made: RoundRecord, entry: Entry, permit: Permit, seat: Seat, ports: Ports) -> None:
    """Send the words, check the receipt, and commit."""
    ports.doing(f"round {made.round} of {seat.run}: {SENDING} {made.words_bytes} bytes")
    receipt = ports.gate.push(ports.store.path(made.words), permit=permit)
    checked = open_receipt(
        canonical_bytes(receipt),
        operator_key=seat.operator_key,
        federation=seat.federation,
        run=seat.run,
        round=made.round,
        org=seat.org,
        digest=made.words,
        size=made.words_bytes,
    )
    ports.state.save_receipt(seat.digest, made.round, checked.model_dump(mode="json"))
    ports.ledger.commit(entry, checked.model_dump(mode="json"))
    _LOG.info("round %d: %d bytes sent, receipt says %s", made.round, made.words_bytes, checked.verdict)


def permit_of(seat: Seat, number: int, *, words: RoundRecord | None = None, scores: bool = False) -> Permit:
    """What may leave in answer to an order of this seat."""
    return Permit(
        charter=seat.digest,
        run=seat.run,
        round=number,
        words=None if words is None else words.words,
        words_bytes=None if words is None else words.words_bytes,
        scores=scores and seat.charter.evaluation.term == "plain",
    )


def _follow(history_digest: str, seat: Seat, ports: Ports) -> Position:
    """Catch up, and erase the history file that the one just read continues."""
    ports.doing(f"run {seat.run}: following the published sums")
    position = catch_up(history_digest, seat, ports)
    name = _history_fact(seat.digest)
    older = ports.state.fact(name)
    if older != history_digest:
        ports.state.remember(name, history_digest)
        if older is not None:
            ports.store.delete(older)
    return position


def _history_fact(charter_digest: str) -> str:
    return f"history-file:{charter_digest}"


def _interruptible(deadline: float, seat: Seat, ports: Ports) -> Ports:
    """Ports whose worker is given up when its result would be of no use any more, a frozen one included.

    Nothing is reserved while they are used, so that giving up costs no budget.
    """

    def tick() -> None:
        ports.tick()
        require_not_left(ports.state, seat.digest)
        if (reason := paused(ports.state)) is not None:
            raise RoundFailed(f"expected to take part, this daemon is paused ({reason}): `foedus client resume`")
        if ports.clock() > deadline:
            raise RoundFailed("expected the worker to be done before the deadline, it was not: see worker.log")

    tick()
    return replace(ports, tick=tick)


def _require_adapter(announced: str, position: Position) -> None:
    if announced != position.digest:
        raise PolicyRefused(
            8,
            f"expected the adapter {position.digest[:12]} that follows from the published sums, "
            f"got {announced[:12]} from the coordinator",
        )


def _require_round(number: int, seat: Seat, ports: Ports) -> None:
    """The charter has this round, and it comes after every closed one."""
    closed = ports.state.history(seat.digest)
    first = closed[-1].round + 1 if closed else 1
    if not first <= number <= seat.charter.privacy.rounds:
        raise PolicyRefused(9, f"expected a round from {first} to {seat.charter.privacy.rounds}, got {number}")


def _adapter_file(position: Position, ports: Ports) -> Path:
    """The adapter for the worker, which reads it at once: it need not outlive a power cut."""
    path = ports.work / "adapter.f32"
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(position.adapter.astype("<f4", copy=False).data)
    return path


def _erase_words(seat: Seat, ports: Ports) -> None:
    """No words up to the newest closed round will be asked for again."""
    closed = ports.state.history(seat.digest)
    for made in ports.state.rounds(seat.digest):
        if closed and made.round <= closed[-1].round:
            ports.store.delete(made.words)


def _uniform(number: int, seat: Seat) -> codec.Uniform:
    if seat.charter.private or seat.charter.seed is None:
        return codec.secure_uniform()
    label = f"foedus/rounding/1|{seat.charter.seed}|{seat.org}|{seat.charter.draw_number(number)}"
    return codec.seeded_uniform(hashlib.sha256(label.encode()).digest())


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items())) or "done"
