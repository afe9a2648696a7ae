"""A run as the coordinator lives it: agree, round after round, close (`closing.py`). Read it from `execute` down.

Every step reads where the run is from the database, does its part, and writes down that it did before anyone acts on
it. A step that finds its work done returns at once. So a coordinator that was killed runs `execute` again and goes on,
with the same survivors, the same sum and no vector lost. Every wait of a round ends by the
charter's one setting, `schedule.round_seconds`; signatures and a pause are waited for until the charter expires.

Without masks the steps `keys`, `shares`, `survivors` and `unmask` of ``docs/protocol.md`` section 5 are absent, and the
coordinator sees each organisation's noised vector.
"""

from __future__ import annotations

from foedus_protocols import codec
from foedus_protocols.charter import verify_charter_signature
from foedus_protocols.errors import VerificationError
from foedus_protocols.messages import (
    AdvanceAnswer,
    AdvanceOrder,
    Agreement,
    CharterAnswer,
    CharterOffer,
    TrainAnswer,
    TrainOrder,
)

from foedus_coordinator import figures
from foedus_coordinator.chain import Chain
from foedus_coordinator.closing import conclude, decide
from foedus_coordinator.run import Run, RunEnded
from foedus_coordinator.storage import RoundRow


def execute(run: Run) -> None:
    """Bring a run from wherever it is to its end.

    Raises:
        Interrupted: The coordinator shuts down; call again after the next start.
    """
    state = run.storage.run(run.id).state
    for row in run.storage.rounds(run.id):
        if row.state in ("closed", "failed"):
            # A kill between a round's end and the erasing of its vectors leaves them lying.
            run.storage.erase_vectors(run.id, row.number, run.vectors.delete)
    try:
        if state == "agreeing":
            agree(run)
        if state in ("agreeing", "running"):
            closed = play_rounds(run)
            decide(run, "complete" if closed else "failed", _tally(run))
    except RunEnded as end:
        decide(run, end.outcome, end.reason)
    if state != "finished":
        conclude(run)


def play_rounds(run: Run) -> int:
    """All rounds that are left; returns how many are closed. The adapter's vectors end here, before `conclude`'s."""
    chain = run.chain()
    while (number := next_round(run)) is not None:
        play_round(run, number, chain)
    return chain.closed


def play_round(run: Run, number: int, chain: Chain) -> None:
    """One round, step by step."""
    offer(run, number, chain)
    collect(run, number)
    add(run, number)
    advance(run, number, chain)
    confirm(run, number)
    close_round(run, number)


# Before the first round


def agree(run: Run) -> None:
    """Offer the charter to every participant, and keep the file with all signatures once they are there.

    Raises:
        RunEnded: Somebody refused, signed something else, the charter expired first, or the run was stopped.
    """
    expires = run.charter.expires
    run.wait(lambda: run.clock() >= run.charter.not_before, expires, heeding=True)
    signature = run.storage.run(run.id).operator_signature
    body = CharterOffer(charter_digest=run.charter.digest, operator_signature=signature)
    ids = run.ask("charter", dict.fromkeys(run.orgs, body))

    def everyone_answered() -> bool:
        answers = run.answers(ids, CharterAnswer)
        signed = {org for org, (signature, _) in run.storage.signatures(run.id).items() if signature is not None}
        for org in sorted(answers.keys() - signed):
            _record_signature(run, org, answers[org])
        return len(answers) == len(run.orgs)

    if not run.wait(everyone_answered, expires, heeding=True):
        missing = [org for org, (signed, _) in run.storage.signatures(run.id).items() if signed is None]
        raise RunEnded("failed", f"the charter expired before {', '.join(missing)} answered")
    signatures = {org: signed for org, (signed, _) in run.storage.signatures(run.id).items() if signed is not None}
    agreement = Agreement(charter_digest=run.charter.digest, operator_signature=signature, signatures=signatures)
    digest = run.publish(agreement)
    run.storage.update_run(run.id, state="running", agreement_digest=digest)
    run.say(f"{run.id}: all {len(run.orgs)} organisations signed")


def next_round(run: Run) -> int | None:
    """The round that is open, else the next one, or None after the charter's last.

    Raises:
        RunEnded: The charter has expired, a short round ended the run, or the run was stopped.
    """
    rounds = run.storage.rounds(run.id)
    if rounds and rounds[-1].state not in ("closed", "failed"):
        return rounds[-1].number
    run.heed()
    if rounds and rounds[-1].state == "failed" and run.charter.schedule.on_short_round == "end":
        raise RunEnded("stopped", rounds[-1].reason or "a round was short")
    if len(rounds) >= run.charter.privacy.rounds:
        return None
    run.wait(lambda: run.storage.run(run.id).wish != "pause", run.charter.expires, heeding=True)
    if run.clock() > run.charter.expires:
        raise RunEnded("stopped", f"the charter expired after round {len(rounds)}")
    return len(rounds) + 1


# The steps of a round


def offer(run: Run, number: int, chain: Chain) -> None:
    """Open the round, and ask every organisation for its vector."""
    with run.timed(number, "offer"):
        run.mailbox.withdraw(run.id, before_round=number)
        run.storage.add_round(
            run.id,
            number,
            deadline=run.clock() + run.charter.schedule.round_seconds,
            start_digest=chain.digest,
            history_digest=run.publish(run.history()),
        )
        _order(run, run.storage.round(run.id, number))


def collect(run: Run, number: int) -> None:
    """Wait for the vectors, then freeze whose are in: stored before anything is added, and never changed.

    Raises:
        RunEnded: So many refused that `min_survivors` cannot be reached, or the run was stopped.
    """
    with run.timed(number, "train"):
        while run.storage.round(run.id, number).state == "offered":
            row = run.storage.round(run.id, number)
            if _slept(run, row) or not _collect_attempt(run, row):
                _reopen(run, row)


def add(run: Run, number: int) -> None:
    """Add the survivors' words, chunk by chunk, and publish the sum packed in the ring's bits."""
    row = run.storage.round(run.id, number)
    if row.state != "frozen":
        return
    with run.timed(number, "sum"):
        digests = {vector.org: vector.digest for vector in run.storage.vectors(run.id, number)}
        part = run.files.root / f"sum-{run.id}-{number}.part"
        part.unlink(missing_ok=True)
        paths = [run.vectors.path(digests[org]) for org in row.survivors]
        digest = codec.add_packed_files(paths, coding=run.charter.coding(), out=part)
        run.files.adopt(part, digest)
        run.allow(digest)
        run.storage.update_round(run.id, number, state="summed", sum_digest=digest)


def advance(run: Run, number: int, chain: Chain) -> None:
    """Compute the adapter that follows, and write it into the history."""
    row = run.storage.round(run.id, number)
    if row.state not in ("summed", "advanced") or row.sum_digest is None:
        return
    with run.timed(number, "advance"):
        digest = chain.advance(number=number, survivors=row.survivors, sum_digest=row.sum_digest)
        run.storage.update_round(run.id, number, state="advanced", adapter_digest=digest)


def confirm(run: Run, number: int) -> None:
    """Tell everybody the sum, and compare the adapter that each computed from it.

    Survivors that are here are waited for, until the round's deadline passes once more; a member that is away compares
    when it is back, before it trains again.

    Raises:
        RunEnded: Somebody computed another adapter.
    """
    row = run.storage.round(run.id, number)
    if row.state != "advanced":
        return
    with run.timed(number, "confirm"):
        body = AdvanceOrder(charter_digest=run.charter.digest, round=number, history_digest=run.publish(run.history()))
        ids = run.ask("advance", dict.fromkeys(run.orgs, body), round=number, attempt=row.attempt)

        def survivors_answered() -> bool:
            answers = run.answers(ids, AdvanceAnswer)
            others = sorted(org for org, answer in answers.items() if answer.adapter_digest != row.adapter_digest)
            if others:
                raise RunEnded(
                    "failed", f"after round {number} {', '.join(others)} computed another adapter than the coordinator"
                )
            stopped = run.storage.run(run.id).wish == "stop"
            return stopped or run.all_here(answers, row.survivors)

        run.wait(survivors_answered, run.clock() + run.charter.schedule.round_seconds)
        run.storage.update_round(run.id, number, state="closed")


def close_round(run: Run, number: int) -> None:
    """Erase the vectors; the sum stays."""
    with run.timed(number, "close"):
        run.storage.erase_vectors(run.id, number, run.vectors.delete)
        row = run.storage.round(run.id, number)
        done = ", ".join(row.survivors) if row.state == "closed" else row.reason
        run.say(f"{run.id}: round {number} of {run.charter.privacy.rounds} {row.state} ({done})")


# How a round's vectors are waited for


def _order(run: Run, row: RoundRow) -> None:
    """Queue this attempt's order for everybody whose vector is not in."""
    body = TrainOrder(
        charter_digest=run.charter.digest,
        agreement_digest=run.agreement(),
        round=row.number,
        attempt=row.attempt,
        adapter_digest=row.start_digest,
        history_digest=row.history_digest,
        deadline=row.deadline,
        evaluate=run.charter.evaluation.term == "plain" and _closed(run) % run.charter.evaluation.every == 0,
    )
    missing = set(run.orgs) - _included(run, row.number)
    run.ask("train", dict.fromkeys(sorted(missing), body), round=row.number, attempt=row.attempt)


def _collect_attempt(run: Run, row: RoundRow) -> bool:
    """Wait for one attempt; True once the round is frozen or failed, False where it is to be offered again."""
    enough = run.charter.masks.min_survivors
    _order(run, row)
    ids = run.mailbox.latest(run.id, row.number, "train")

    def everyone_answered() -> bool:
        answers = run.answers(ids, TrainAnswer)
        refused = {org: answer.refused_step for org, answer in answers.items() if answer.refused_step is not None}
        if len(run.orgs) - len(refused) < enough:
            steps = ", ".join(f"{org} at check {step}" for org, step in sorted(refused.items()))
            raise RunEnded("refused", f"round {row.number} was refused by {steps}")
        return len(answers) == len(run.orgs)

    # A clock that was set back since the offer does not prolong the round.
    deadline = min(row.deadline, run.clock() + run.charter.schedule.round_seconds)
    everyone = run.wait(everyone_answered, deadline, heeding=True)
    _keep_scores(run, row, ids)
    again = run.charter.schedule.on_short_round == "wait" or _slept(run, row)
    short = None if again else _missing(run, row.number)
    if run.storage.freeze(run.id, row.number, at_least=enough, short=short):
        run.mailbox.withdraw(run.id, only="train")
        return True
    if everyone:
        # Everybody has answered and too few sent a vector: asking again at once would only go round in circles.
        run.wait(lambda: False, deadline, heeding=True)
    return False


def _slept(run: Run, row: RoundRow) -> bool:
    """Whether too few vectors came, but the deadline passed while this coordinator was down, stopped or asleep.

    That is not held against the organisations: the round is offered again, whatever the charter says of short ones.
    """
    run.presence.look()  # It may have been stopped since the last look, right before the deadline was compared.
    return row.deadline < run.presence.since and len(_included(run, row.number)) < run.charter.masks.min_survivors


def _reopen(run: Run, row: RoundRow) -> None:
    """Offer a short round again to whoever is missing; the vectors that are there stay valid.

    Raises:
        RunEnded: The charter has expired.
    """
    if run.clock() > run.charter.expires:
        raise RunEnded("stopped", f"the charter expired in round {row.number}: {_missing(run, row.number)}")
    missing = set(run.orgs) - _included(run, row.number)
    run.mailbox.withdraw(run.id, only="train", orgs=missing)
    deadline = run.clock() + run.charter.schedule.round_seconds
    run.storage.update_round(run.id, row.number, attempt=row.attempt + 1, deadline=deadline)
    run.say(f"{run.id}: round {row.number} is offered again, {_missing(run, row.number)}")


def _included(run: Run, number: int) -> set[str]:
    return {vector.org for vector in run.storage.vectors(run.id, number) if vector.verdict == "included"}


def _tally(run: Run) -> str:
    """How a run that went to its end came out, with what went wrong last."""
    rows = run.storage.rounds(run.id)
    failed = [f"; round {row.number} failed: {row.reason}" for row in rows if row.state == "failed"]
    return f"{_closed(run)} of {run.charter.privacy.rounds} rounds closed" + (failed[-1] if failed else "")


def _missing(run: Run, number: int) -> str:
    missing = sorted(set(run.orgs) - _included(run, number))
    return f"no vector from {', '.join(missing)}" if missing else "no vector is missing"


def _keep_scores(run: Run, row: RoundRow, ids: dict[str, str]) -> None:
    closed = _closed(run)
    with run.storage.write() as connection:
        for org, answer in run.answers(ids, TrainAnswer).items():
            if answer.scores is not None and run.charter.evaluation.term == "plain":
                figures.add_scores(connection, run.id, closed, org, answer.scores)


def _closed(run: Run) -> int:
    """How many rounds the current adapter stands on."""
    return sum(other.state == "closed" for other in run.storage.rounds(run.id))


def _record_signature(run: Run, org: str, answer: CharterAnswer) -> None:
    if answer.refused_step is not None or answer.signature is None:
        step = answer.refused_step or 0
        run.storage.record_signature(run.id, org, signature=None, refused_step=step)
        raise RunEnded("refused", f"{org} refused the charter at check {step}")
    try:
        verify_charter_signature(run.charter.participant(org).signing_key, run.charter.digest, answer.signature)
    except VerificationError as error:
        raise RunEnded("failed", f"{org} answered with a signature that does not fit the charter") from error
    run.storage.record_signature(run.id, org, signature=answer.signature, refused_step=None)
