"""How a run ends: what is scored last, which adapter is released, who is told, and what is erased.

Like the steps of `rounds.py`, each finds out from the database what is left to do, so that a coordinator that was
killed in the middle goes on here.
"""

from __future__ import annotations

from foedus_protocols.messages import CloseAnswer, CloseNotice, EvaluateAnswer, EvaluateOrder

from foedus_coordinator import figures
from foedus_coordinator.chain import Chain
from foedus_coordinator.cleanup import erase_published
from foedus_coordinator.run import Outcome, Run

_TELL_SECONDS = 30.0  # The notice lies in the mailbox for whoever is busy or away for longer.


def decide(run: Run, outcome: Outcome, reason: str) -> None:
    """Write down how the run ends, before anything acts on it."""
    run.storage.update_run(run.id, state="closing", outcome=outcome, reason=reason)


def conclude(run: Run) -> None:
    """Score the last adapter where the charter allows it, write the variant, tell everybody, finish."""
    row = run.storage.run(run.id)
    for kind in ("charter", "train", "advance"):
        run.mailbox.withdraw(run.id, only=kind)
    abandon(run, row.outcome or "failed")
    if row.outcome in ("complete", "stopped"):
        chain = run.chain()
        if chain.closed and row.variant is None:
            if run.charter.evaluation.term == "plain":
                evaluate(run, chain)
            if (chosen := _chosen(run, chain.closed)) != chain.closed:
                del chain  # Its vectors need not lie beside the other's.
                chain = run.chain(chosen)
            release(run, chain)
        # Only now: what was withdrawn is not asked again by a coordinator that was killed in between.
        run.mailbox.withdraw(run.id, only="evaluate")
    tell(run, row.outcome or "failed", row.reason or "")
    # Before the run counts as finished: from then on an extension may publish the same history again.
    erase_published(run.storage, run.files, ending=run.id)
    run.storage.update_run(run.id, state="finished", finished=run.clock())
    run.say(f"{run.id}: {row.outcome} ({row.reason})")


def abandon(run: Run, outcome: Outcome) -> None:
    """Fail the round that the run's end cut short, and erase its vectors."""
    reason = "the run was stopped" if outcome == "stopped" else "the run ended"
    for other in run.storage.rounds(run.id):
        if other.state not in ("closed", "failed"):
            run.storage.update_round(run.id, other.number, state="failed", reason=reason)
            run.storage.erase_vectors(run.id, other.number, run.vectors.delete)


def evaluate(run: Run, chain: Chain) -> None:
    """One round of scores without training: what the last adapter is worth. Nobody who is away is waited for."""
    number = len(run.storage.rounds(run.id)) + 1
    with run.timed(number, "evaluate"):
        deadline = run.clock() + run.charter.schedule.round_seconds
        body = EvaluateOrder(
            charter_digest=run.charter.digest,
            agreement_digest=run.agreement(),
            round=number,
            adapter_digest=chain.digest,
            history_digest=run.publish(run.history()),
            deadline=deadline,
        )
        ids = run.ask("evaluate", dict.fromkeys(run.orgs, body), round=number, attempt=1)
        run.wait(lambda: run.all_here(run.answers(ids, EvaluateAnswer), run.orgs), deadline)
        for org, answer in run.answers(ids, EvaluateAnswer).items():
            if answer.scores is not None:
                with run.storage.write() as connection:
                    figures.add_scores(connection, run.id, chain.closed, org, answer.scores)


def release(run: Run, chain: Chain) -> None:
    """Write the variant: the adapter that the chain stands at."""
    folder = run.write_variant(run, chain)
    run.storage.update_run(run.id, variant=str(folder), released_after=chain.closed)


def _chosen(run: Run, closed: int) -> int:
    """After how many rounds the adapter is released that the charter's term names: the last, or the one scored best.

    `best` is the one with the lowest held-out loss, summed over the organisations that scored every one of them; the
    starting adapter is among them. It was selected on these scores, and the card says so. Without any scores it is the
    last.
    """
    if run.charter.release.adapter == "best":
        with run.storage.read() as connection:
            curve = figures.losses(figures.scores_of(connection, run.id))
        if curve:
            return figures.lowest(curve).after
    return closed


def tell(run: Run, outcome: Outcome, reason: str) -> None:
    """Give everybody the end of the run; who is away or busy finds the notice when it is back."""
    body = CloseNotice(charter_digest=run.charter.digest, outcome=outcome, reason=reason)
    ids = run.ask("close", dict.fromkeys(run.orgs, body))
    deadline = run.clock() + min(run.charter.schedule.round_seconds, _TELL_SECONDS)
    run.wait(lambda: run.all_here(run.answers(ids, CloseAnswer), run.orgs), deadline)
