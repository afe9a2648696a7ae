"""The unit's gradient against the library, autograd and Opacus; the step's refusals; scores."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foedus_client import training
from foedus_client.noise import rounded_gaussian
from foedus_client.privacy import SeededBytes, StepTerms
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from foedus_protocols.errors import ConfigError, PrivacyCheckFailed
from opacus import GradSampleModule

TERMS = StepTerms(
    l2_clip_norm=0.05, noise_multiplier=0.8, sampling_prob=1.0, expected_units=16.0, max_records_per_unit=4
)
OPEN = replace(TERMS, noise_multiplier=0.0)


def library_loss(model, records) -> torch.Tensor:
    """Mean over records of the mean loss of answer tokens: each record in a forward of its own, all logits made."""
    losses = []
    for record in records:
        tokens = torch.from_numpy(record.tokens.astype(np.int64))
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        token_losses = F.cross_entropy(logits, tokens[1:], reduction="none")
        losses.append(token_losses[torch.from_numpy(record.loss_mask[1:])].mean())
    return torch.stack(losses).mean()


def reference_gradient(adapter, records) -> np.ndarray:
    adapter.model.zero_grad(set_to_none=True)
    library_loss(adapter.model, records).backward()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in adapter.trained]).numpy()
    adapter.model.zero_grad(set_to_none=True)
    return gradient


def test_unit_gradient_equals_autograd_on_the_librarys_own_forward(stand_in, units) -> None:
    for unit in units:
        expected = reference_gradient(stand_in, unit.records)
        found = training.unit_gradient(stand_in, unit.records)
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_unit_gradient_equals_opacus(stand_in, units) -> None:
    """Hooks over a padded batch of four single-record units; Opacus is the reference, equal to 2.5e-7 as measured."""
    records = units[4].records
    expected = [training.unit_gradient(stand_in, [record]) for record in records]
    wrapped = GradSampleModule(stand_in.model, loss_reduction="sum")
    tokens = torch.stack([torch.from_numpy(record.tokens.astype(np.int64)) for record in records])
    logits = wrapped(input_ids=tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    mask = torch.from_numpy(np.stack([record.loss_mask[1:] for record in records]))
    ((losses * mask).sum(1) / mask.sum(1)).sum().backward()
    found = torch.cat([parameter.grad_sample.flatten(1) for parameter in stand_in.trained], dim=1).numpy()
    for row, gradient in zip(found, expected, strict=True):
        assert np.linalg.norm(row - gradient) <= 1e-6 * np.linalg.norm(gradient)


def test_a_units_gradient_has_the_same_bits_whoever_else_is_there(stand_in, units) -> None:
    alone = training.unit_gradient(stand_in, units[1].records)
    training.unit_gradient(stand_in, units[0].records)
    assert np.array_equal(alone, training.unit_gradient(stand_in, units[1].records))


def test_records_without_answers_count_for_nothing(stand_in, units) -> None:
    silent = SyntheticRecord(tokens=np.arange(9, dtype=np.int32), loss_mask=np.zeros(9, np.bool_))
    first_only = SyntheticRecord(tokens=np.array([5], np.int32), loss_mask=np.array([True]))
    empty = SyntheticRecord(tokens=np.zeros(0, np.int32), loss_mask=np.zeros(0, np.bool_))
    records = units[2].records
    expected = training.unit_gradient(stand_in, records)
    found = training.unit_gradient(stand_in, [*records, silent, first_only, empty])
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    for nothing in ([silent], [first_only], [silent, empty], [empty], []):
        assert not training.unit_gradient(stand_in, nothing).any()


def test_a_unit_that_is_not_finite_counts_as_zero_and_stops_nothing(stand_in, units, monkeypatch) -> None:
    kept = [units[1], units[2]]
    expected = training.private_vector(stand_in, kept, terms=OPEN, rng=os.urandom, noise=None)
    true_gradient = training.unit_gradient

    def poisoned(adapter, records):
        gradient = true_gradient(adapter, records)
        if len(records) == 3:
            gradient[17] = np.nan
        return gradient

    monkeypatch.setattr(training, "unit_gradient", poisoned)
    found = training.private_vector(stand_in, units[:3], terms=OPEN, rng=os.urandom, noise=None)
    assert np.array_equal(found.vector, expected.vector)
    assert (found.sampled_units, found.dropped_units) == (3, 1)


def test_at_most_so_many_records_of_a_unit_enter(stand_in, units) -> None:
    terms = replace(OPEN, max_records_per_unit=1, l2_clip_norm=100.0)
    unit = units[0]

    def vector_of(one: SyntheticUnit) -> np.ndarray:
        return training.private_vector(stand_in, [one], terms=terms, rng=os.urandom, noise=None).vector

    singles = [vector_of(SyntheticUnit(records=[record])) for record in unit.records]
    seen = set()
    for _ in range(40):  # Each record is missed in all 40 draws once in 10^7 runs.
        vector = vector_of(unit)
        matches = [i for i, single in enumerate(singles) if np.allclose(vector, single, atol=1e-6)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == {0, 1, 2}


def test_an_empty_sample_is_a_step_of_noise(stand_in) -> None:
    length = training.vector_length(stand_in)
    noise = training.noise_table(TERMS, length)
    result = training.private_vector(stand_in, [], terms=TERMS, rng=os.urandom, noise=noise)
    assert result.vector.shape == (length,)
    assert result.vector.dtype == np.float32
    assert np.count_nonzero(result.vector) > 0.99 * length


def test_open_steps_are_functions_of_seed_org_and_round(stand_in, units) -> None:
    terms = replace(OPEN, sampling_prob=0.5, max_records_per_unit=1)

    def step(seed: int, round_number: int) -> np.ndarray:
        rng = SeededBytes(seed=seed, org="a", round_number=round_number)
        return training.private_vector(stand_in, units, terms=terms, rng=rng, noise=None).vector

    assert np.array_equal(step(1, 1), step(1, 1))
    assert len({step(1, n).tobytes() for n in range(1, 9)}) > 1


def test_a_private_step_refuses_a_seed_another_noise_and_none(stand_in, units) -> None:
    length = training.vector_length(stand_in)
    noise = training.noise_table(TERMS, length)
    seeded = SeededBytes(seed=1, org="a", round_number=1)
    refused = [
        (TERMS, seeded, noise, PrivacyCheckFailed),
        (TERMS, np.random.default_rng(1).bytes, noise, PrivacyCheckFailed),
        (TERMS, os.urandom, None, PrivacyCheckFailed),
        (TERMS, os.urandom, rounded_gaussian(noise.stddev / 2 + 1024), PrivacyCheckFailed),
        (OPEN, os.urandom, noise, ConfigError),
    ]
    for terms, rng, table, error in refused:
        with pytest.raises(error):
            training.private_vector(stand_in, units, terms=terms, rng=rng, noise=table)


def test_coverage_names_what_is_outside(stand_in) -> None:
    training.coverage_check(stand_in)
    stand_in.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(PrivacyCheckFailed, match=r"lm_head\.weight"):
        training.coverage_check(stand_in)


def test_coverage_refuses_couplings_and_detached_tensors(stand_in) -> None:
    stand_in.model.train()
    with pytest.raises(PrivacyCheckFailed, match="evaluation mode"):
        training.coverage_check(stand_in)
    stand_in.model.eval()
    stand_in.model.config.output_router_logits = True
    with pytest.raises(PrivacyCheckFailed, match="output_router_logits"):
        training.coverage_check(stand_in)
    stand_in.model.config.output_router_logits = False
    stand_in.trained.append(stand_in.trained[0])
    with pytest.raises(PrivacyCheckFailed, match="once"):
        training.coverage_check(stand_in)
    stand_in.trained[-1] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(PrivacyCheckFailed, match="not attached"):
        training.coverage_check(stand_in)


def test_scores_are_sums_over_answer_tokens(stand_in, units) -> None:
    expected_loss, expected_tokens = 0.0, 0
    with torch.no_grad():
        for unit in units:
            for record in unit.records:
                answers = int(record.loss_mask[1:].sum())
                expected_loss += float(library_loss(stand_in.model, [record])) * answers
                expected_tokens += answers
    loss_sum, tokens, scored = training.score(stand_in, units, 100)
    assert (tokens, scored) == (expected_tokens, len(units))
    assert loss_sum == pytest.approx(expected_loss, rel=1e-6)


def test_scores_stop_at_so_many_records(stand_in, units) -> None:
    _, all_of_first, one = training.score(stand_in, units, 3)
    assert one == 1
    _, tokens, scored = training.score(stand_in, units, 2)
    assert scored == 1
    assert 0 < tokens < all_of_first
    assert training.score(stand_in, units, 4)[2] == 2
    assert training.score(stand_in, [], 10) == (0.0, 0, 0)
