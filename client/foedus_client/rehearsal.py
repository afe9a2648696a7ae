"""How to choose learning rate and clip without spending budget: rehearse the run on a public proxy file.

A proxy is public or invented text of the kind that the private records are: same language, same form, about as long.
The charter's recipe runs on it here, as one organisation alone, without a coordinator, a ledger or anything sent. No
statistic of the private records enters, so nothing is spent; tuning on the private records themselves would be a query
of them, and would have to be paid for.

The rehearsal adds the charter's own noise, since a rate that is best without noise is too high with it. One
organisation alone has more noise than a federation's sum: what works here works there. The clip's usual start is a
quarter of the median unit norm, which is measured here on the proxy's units.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from foedus_protocols import rules
from foedus_protocols.charter import Charter
from foedus_protocols.errors import DataError

from foedus_client.scratch import scratch
from foedus_client.session import Session
from foedus_client.work import EvaluateTask, Setup, StepTermsTask, TrainTask

NORM_UNITS = 64


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """One pair of settings on the proxy: held-out loss in nats a token, before and after all rounds."""

    rate: float
    l2_clip_norm: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the proxy says.

    Attributes:
        units: Units of the proxy that train; `heldout` of them measure.
        median_norm: L2 norm of one unit's gradient before clipping, the median over some units.
        suggested_clip: A quarter of it.
        results: Best first.
    """

    units: int
    heldout: int
    median_norm: float
    suggested_clip: float
    results: tuple[Rehearsed, ...]


def rehearse(
    charter: Charter,
    setup: Setup,
    terms: StepTermsTask,
    *,
    rates: Sequence[float],
    clips: Sequence[float],
    folder: Path,
    say: Callable[[str], None],
) -> Rehearsal:
    """Run the charter's rounds on a proxy for each rate and clip.

    Args:
        charter: The terms; everything but rate and clip is taken from it.
        setup: The worker's setup, with the proxy's files in place of the organisation's.
        terms: Our step's constants under the charter.
        rates: Learning rates; the charter's own where empty.
        clips: Bounds on one unit's gradient; the charter's own where empty.
        folder: A folder is made in it and removed.
        say: Takes a line of progress.

    Raises:
        DataError: The proxy holds too few units to train on some and measure on others.
    """
    with scratch(folder) as place, closing(Session.load(setup, work=place)) as session:
        found = session.describe()
        if not found.train_units or not found.heldout_units:
            raise DataError(
                f"expected a proxy with units to train on and units to measure, got {found.train_units} and "
                f"{found.heldout_units}: give a file with more units"
            )
        median = statistics.median(session.unit_norms(NORM_UNITS))
        results = []
        for rate in rates or (charter.recipe.optimiser.rate,):
            for clip in clips or (charter.privacy.l2_clip_norm,):
                say(f"rate {rate:g}, clip {clip:g}: {charter.privacy.rounds} rounds on the proxy")
                tried = terms.model_copy(update={"l2_clip_norm": clip})
                results.append(_play(charter, session, tried, rate=rate, place=place))
    return Rehearsal(
        units=found.train_units,
        heldout=found.heldout_units,
        median_norm=median,
        suggested_clip=median / 4,
        results=tuple(sorted(results, key=lambda one: one.loss_after)),
    )


def _play(charter: Charter, session: Session, terms: StepTermsTask, *, rate: float, place: Path) -> Rehearsed:
    """All rounds with one organisation: train, advance, and the loss at both ends."""
    rule = replace(charter.rule(), rate=rate)
    adapter = session.initial_vector()  # (d,)
    state = rules.initial_state(rule, adapter.size)
    before = _loss(session, charter, adapter, place)
    output = place / "vector.f32"
    for number in range(1, charter.privacy.rounds + 1):
        path = _write(adapter, place)
        session.train(TrainTask(terms=terms, org="proxy", round=number, adapter=str(path), output=str(output)))
        mean = np.fromfile(output, "<f4").astype(np.float32)  # (d,)
        adapter, state = rules.advance(adapter, mean, rule=rule, state=state)
    after = _loss(session, charter, adapter, place)
    return Rehearsed(rate=rate, l2_clip_norm=terms.l2_clip_norm, loss_before=before, loss_after=after)


def _loss(session: Session, charter: Charter, adapter: npt.NDArray[np.float32], place: Path) -> float:
    """Held-out loss of the proxy, in nats a token."""
    task = EvaluateTask(adapter=str(_write(adapter, place)), max_records=charter.evaluation.max_records)
    scores = session.evaluate(task).scores
    if scores is None or not scores.tokens:
        raise DataError("expected held-out answers in the proxy, got none: give a file with more units")
    return scores.loss_sum / scores.tokens


def _write(adapter: npt.NDArray[np.float32], place: Path) -> Path:
    path = place / "adapter.f32"
    adapter.astype("<f4", copy=False).tofile(path)
    return path
