"""What a federation is worth to its members: base, each organisation alone, all data pooled, and the federation.

Every row is measured on the same held-out units of all organisations and of each organisation apart. Nobody trains on
any of them: a unit that one organisation holds out and another trains on is left out, and counted (`overlap.py`).

Whoever trains alone keeps its own terms of the charter: its sampling, its noise, the rounds and the rule. *Pooled* is
one organisation that holds everything, with the sum of all expected units, and noise for the same promise: what nobody
may do, and the bound to come near to.

The environment's switches are obeyed as an organisation's worker obeys them (`foedus_client.loading`).

The rows *alone* and *pooled* are trained here and thrown away. Where noise was added, each of them would cost the same
epsilon once more if anybody released it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from foedus_client.datasets import Dataset, load_dataset
from foedus_client.datasets.harmony import Harmony
from foedus_client.datasets.labels import Questions, read_questions
from foedus_client.datasets.units import is_held_out
from foedus_client.evaluate import Material, Measured, as_dict, measure, report
from foedus_client.intervals import ratio
from foedus_client.loading import load_adapted
from foedus_client.scratch import scratch
from foedus_client.session import Session
from foedus_client.work import Setup, StepTermsTask, TrainTask
from foedus_model.generate import read_variant_manifest
from foedus_protocols import accounting, rules
from foedus_protocols.charter import Charter, less_slack, noise_slack
from foedus_protocols.errors import DataError
from foedus_protocols.layout import Vector
from foedus_protocols.manifest import TOKENIZER_FILE, read_config
from foedus_protocols.peft_folder import check_files, read_peft

from foedus_local.federation import Organisation
from foedus_local.overlap import trained_elsewhere
from foedus_local.plan import power_of_two

BASE, POOLED, FEDERATION = "base", "pooled", "federation"
_POOL = "pool"

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Party:
    """Whoever trains: its units and its constants."""

    org: str
    data: Dataset
    terms: StepTermsTask
    weight: float


def compare(
    charter: Charter,
    organisations: Sequence[Organisation],
    variant: Path,
    base: Path,
    *,
    folder: Path,
    seed: int,
    say: Tell,
) -> dict[str, Any]:
    """Train what the federation is compared with, and measure everything.

    Args:
        charter: The federation's.
        organisations: Its data.
        variant: What it made.
        base: The base model's folder.
        folder: A folder is made in it and removed.
        seed: Of the intervals' draws.
        say: Takes a line of progress.

    Returns:
        `evaluate.report`, with ``by_organisation``: each one's own held-out loss under every row, and
        ``trained_elsewhere``: how many held-out units and questions were left out, since another one trains on them.

    Raises:
        CheckpointError: The variant's files are not its manifest's.
        ConfigError: A switch that cannot be, or that base, adapter or machine cannot follow.
        DataError: No held-out unit is left.
    """
    check_files(variant, read_variant_manifest(variant))
    layout = charter.adapter.layout(read_config(base))
    setup = _setup(charter, base)
    adapter, streaming = load_adapted(setup)
    held = {one.org: _dataset(one, charter, base) for one in organisations}
    material, left_out = _material(charter, organisations, held, base, say)
    parties = [_party(charter, org, data) for org, data in held.items()]
    start = charter.adapter.start(lambda: read_config(base))
    measured: dict[str, Measured] = {}

    def put(name: str, vector: Vector) -> None:
        say(f"measuring {name}")
        adapter.load_vector(vector)
        measured[name] = measure(adapter.model, material)

    with ExitStack() as stack:
        if streaming is not None:
            stack.callback(streaming.close)
        put(BASE, start)
        place = stack.enter_context(scratch(folder))
        for party in [*parties, _pooled(charter, parties)]:
            name = POOLED if party.org == _POOL else f"alone: {party.org}"
            say(f"training {name}, {charter.privacy.rounds} rounds")
            session = Session(setup, adapter, party.data, work=place, streaming=streaming)
            put(name, _train(charter, party, session, start, place=place))
        put(FEDERATION, read_peft(variant, layout).vector)
    return {
        **report(measured, material, seed=seed),
        "trained_elsewhere": left_out,
        "by_organisation": {org: _own(measured, material.of_group(org), seed) for org in held},
        "private": charter.private,
        "epsilon": charter.privacy.epsilon,
    }


def _dataset(one: Organisation, charter: Charter, base: Path) -> Dataset:
    return load_dataset(
        [one.file],
        units=one.unit,
        columns=_columns(one),
        tokenizer_path=base / TOKENIZER_FILE,
        max_tokens=charter.recipe.max_tokens,
        max_records_per_unit=charter.recipe.max_records_per_unit,
        split_key=one.split_key,
    )


def _material(
    charter: Charter, organisations: Sequence[Organisation], held: Mapping[str, Dataset], base: Path, say: Tell
) -> tuple[Material, dict[str, int]]:
    """Held-out units and questions of everybody, at most the charter's number of records of each; and those left out.

    Guarantees:
        No organisation's training units hold a unit of the material.
    """
    most, max_tokens = charter.evaluation.max_records, charter.recipe.max_tokens
    harmony = Harmony.from_file(base / TOKENIZER_FILE)
    material = Material()
    asked: list[tuple[str, Questions]] = []
    shared, left_out = trained_elsewhere(organisations, held), {"units": 0, "questions": 0}
    for one in organisations:
        fair = [unit for unit in held[one.org].heldout if unit.key_hash not in shared[one.org]]
        left_out["units"] += len(held[one.org].heldout) - len(fair)
        material.add_units(one.org, fair, most)
        for found in read_questions([one.file], units=one.unit, columns=_columns(one), split_key=one.split_key):
            out = [question for question in found.asked if is_held_out(question.key_hash)]
            kept = tuple(question for question in out if question.key_hash not in shared[one.org])
            left_out["questions"] += len(out) - len(kept)
            asked.append((one.org, replace(found, asked=kept)))
    for org, found in asked:
        # One set of options for everybody, whichever of them an organisation's own rows happen to have.
        options = sorted({option for _, other in asked if other.field == found.field for option in other.options})
        if found.asked:
            try:
                material.add_questions(org, found, harmony, options=tuple(options), max_tokens=max_tokens, most=most)
            except DataError as error:
                say(f"no question of {found.field} is asked: {error}")
    return material, left_out


def _party(charter: Charter, org: str, data: Dataset) -> Party:
    """An organisation under its own terms."""
    mine = charter.participant(org)
    return Party(
        org=org,
        data=data,
        terms=_terms(charter, mine.noise_multiplier, mine.sampling_prob, mine.expected_units),
        weight=mine.weight,
    )


def _pooled(charter: Charter, parties: Sequence[Party]) -> Party:
    """One organisation with everybody's units, and noise for the charter's promise at its own sampling."""
    privacy = charter.privacy
    most = power_of_two(sum(one.units_at_most for one in charter.participants))
    constants = accounting.party_constants(most, round(sum(one.terms.expected_units for one in parties)))
    noise = 0.0
    if privacy.epsilon is not None and privacy.delta is not None:
        steps = privacy.rounds * privacy.steps_per_round
        slack = noise_slack(length=charter.adapter.length, steps=steps, epsilon=privacy.epsilon)
        noise = accounting.calibrate(
            epsilon=privacy.epsilon,
            delta=less_slack(privacy.delta, slack),
            sampling_prob=constants.sampling_prob,
            steps=steps,
        )
    train = sorted((unit for party in parties for unit in party.data.train), key=lambda unit: unit.key_hash)
    return Party(
        org=_POOL,
        data=Dataset(train=train, heldout=[], report=parties[0].data.report),
        terms=_terms(charter, noise, constants.sampling_prob, constants.expected_units),
        weight=accounting.weight(constants.expected_units, noise),
    )


def _terms(charter: Charter, noise: float, sampling_prob: float, expected_units: float) -> StepTermsTask:
    return StepTermsTask(
        private=charter.private,
        l2_clip_norm=charter.privacy.l2_clip_norm,
        noise_multiplier=noise,
        sampling_prob=sampling_prob,
        expected_units=expected_units,
        seed=charter.seed,
    )


def _train(charter: Charter, party: Party, session: Session, start: Vector, *, place: Path) -> Vector:
    """All rounds of one party: its own vector is the mean, and the charter's rule advances."""
    rule = charter.rule()
    if rule.name == "adambc":  # The variance of this party's noise, not of the federation's sum.
        constants = (party.weight, party.terms.expected_units, party.terms.noise_multiplier)
        rule = replace(rule, noise_variance=rules.noise_variance([constants]))
    vector, state = start, rules.initial_state(rule, start.size)
    read, written = place / "adapter.f32", place / "vector.f32"
    for number in range(1, charter.privacy.rounds + 1):
        vector.astype("<f4", copy=False).tofile(read)
        session.train(TrainTask(terms=party.terms, org=party.org, round=number, adapter=str(read), output=str(written)))
        mean = np.fromfile(written, "<f4").astype(np.float32)  # (d,)
        vector, state = rules.advance(vector, mean, rule=rule, state=state)
    return vector


def _setup(charter: Charter, base: Path) -> Setup:
    """An organisation's setup without its data."""
    adapter, recipe = charter.adapter, charter.recipe
    return Setup(
        base=str(base),
        base_digest=charter.base,
        targets=adapter.targets,
        layers=None if adapter.layers is None else list(adapter.layers),
        train=adapter.trains,
        rank=adapter.rank,
        alpha=adapter.alpha,
        adapter_seed=adapter.seed,
        layout_digest=adapter.layout_digest,
        files=[],
        units={},
        columns={},
        split_key="",
        max_tokens=recipe.max_tokens,
        max_records_per_unit=recipe.max_records_per_unit,
    )


def _own(measured: Mapping[str, Measured], mine: np.ndarray[Any, Any], seed: int) -> dict[str, Any]:
    """An organisation's own held-out loss under every row."""
    return {name: as_dict(ratio(one.nats[mine], one.tokens[mine], seed=seed)) for name, one in measured.items()}


def _columns(one: Organisation) -> dict[str, dict[str, str]]:
    from foedus_client.datasets.readers import stem

    return {stem(one.file): one.columns} if one.columns else {}
