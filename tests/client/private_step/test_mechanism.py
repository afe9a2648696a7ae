"""The mechanism, claim by claim, and programs that break it.

Each claim is a named test on the production code. Below them the same tests are run on programs that are deliberately
broken: a claim's test that a broken program passes is a defect of the test. Statistical claims allow six standard
deviations: a false alarm once in 5 x 10^8 runs for a normal statistic, and below 10^-6 for each test as a whole.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foedus_client import checks, privacy, training
from foedus_client.noise import RoundedGaussian
from foedus_client.privacy import BoundedSum, ClippedUnit, StepTerms
from foedus_model.loss import batch_of, token_losses
from foedus_protocols.errors import PrivacyCheckFailed

# Above some units' norms and below others': both sides of the clip are exercised.
TERMS = StepTerms(
    l2_clip_norm=0.05, noise_multiplier=0.8, sampling_prob=1.0, expected_units=16.0, max_records_per_unit=4
)
OPEN = replace(TERMS, noise_multiplier=0.0)


# --- Units that need no model: the gradient of unit i is one-hot at i ------------------------------------------------


class Dummy(torch.nn.Module):
    """A model of one trained tensor, for claims about sampling and scale."""

    config = None

    def __init__(self, length: int = 60) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(length))
        self.trained = [self.weight]
        self.eval()

    @property
    def model(self) -> Dummy:
        return self


@dataclass
class OneHot:
    """A unit whose gradient is 1 at its own coordinate: the vector shows who was sampled."""

    records: list[int]


def one_hot_step(monkeypatch, count: int, terms: StepTerms) -> Callable[[], np.ndarray]:
    """A step over `count` one-hot units, as a function that may be called again and again."""
    units = [OneHot([index]) for index in range(count)]
    monkeypatch.setattr(training, "unit_gradient", lambda adapter, records: np.eye(60, dtype=np.float32)[records[0]])
    adapter = Dummy()
    return lambda: training.private_vector(adapter, units, terms=terms, rng=os.urandom, noise=None).vector


@functools.cache
def table_of(terms: StepTerms, length: int) -> RoundedGaussian | None:
    """Built once: the table is public and has no state."""
    return training.noise_table(terms, length)


# --- The claims ------------------------------------------------------------------------------------------------------


def test_clipped_sum_equals_a_loop_of_single_unit_gradients(stand_in, units, monkeypatch) -> None:
    """Autograd on the library's own forward, one record at a time, clipped in float64: within 1e-6."""
    step = 2.0**-28
    target = OPEN.l2_clip_norm * (1 - 1e-4)  # On so fine a grid the aim is the clip less 1e-4.
    expected = np.zeros(training.vector_length(stand_in))
    for unit in units:
        losses = []
        for record in unit.records:
            tokens = torch.from_numpy(record.tokens.astype(np.int64))
            logits = stand_in.model(input_ids=tokens[None]).logits[0, :-1]
            nll = F.cross_entropy(logits, tokens[1:], reduction="none")
            losses.append(nll[torch.from_numpy(record.loss_mask[1:])].mean())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), stand_in.trained)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).double().numpy()
        expected += flat * min(1.0, target / np.linalg.norm(flat))
    total, scales = training.clipped_sum(stand_in, units, terms=OPEN, step=step, rng=os.urandom)
    assert any(scale < 1.0 for scale in scales)
    found = total.values * step
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_removing_a_unit_moves_the_sum_by_at_most_the_clip(stand_in, units, monkeypatch) -> None:
    """Every unit, in integers; at the charter's clip, and at one that lets every gradient through."""
    length = training.vector_length(stand_in)
    for clip in (0.01, TERMS.l2_clip_norm, 10.0):
        terms = replace(OPEN, l2_clip_norm=clip)
        step = privacy.grid(0.0, clip, length)

        def sum_of(some, terms=terms, step=step) -> BoundedSum:
            return training.clipped_sum(stand_in, some, terms=terms, step=step, rng=os.urandom)[0]

        ratio = checks.sensitivity_check(sum_of, units, l2_clip_norm=clip, drop=len(units))
        assert 0.0 < ratio <= 1.0


def test_the_vector_is_the_clipped_sum_and_noise_of_the_stated_stddev(stand_in, units, monkeypatch) -> None:
    """Released minus clipped sum, through the production path; also no correlation between two rounds."""
    length = training.vector_length(stand_in)
    noise = table_of(TERMS, length)
    step = privacy.grid(TERMS.noise_stddev, TERMS.l2_clip_norm, length)
    worth = step / (TERMS.l2_clip_norm * TERMS.expected_units)
    total, _ = training.clipped_sum(stand_in, units[1:3], terms=TERMS, step=step, rng=os.urandom)

    def difference() -> np.ndarray:
        result = training.private_vector(stand_in, units[1:3], terms=TERMS, rng=os.urandom, noise=noise)
        return (result.vector - total.values * worth).astype(np.float32)

    ratio = checks.noise_check(difference, stddev=TERMS.noise_multiplier / TERMS.expected_units, resolution=worth)
    assert ratio == pytest.approx(1.0, abs=0.04)


def test_organisations_rounds_and_starts_share_no_noise(stand_in, units, monkeypatch) -> None:
    """Three starts of one program with one `--seed`, two organisations, two rounds: all pairs are uncorrelated."""
    length = training.vector_length(stand_in)
    noise = table_of(TERMS, length)
    vectors = []
    for _start, _org in itertools.product(range(3), "ab"):
        np.random.seed(5)
        torch.manual_seed(5)
        for _round in range(2):
            result = training.private_vector(stand_in, [], terms=TERMS, rng=os.urandom, noise=noise)
            vectors.append(result.vector.astype(np.float64))
    for first, second in itertools.combinations(vectors, 2):
        correlation = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
        assert abs(correlation) * math.sqrt(length) < 6.0


def test_the_sum_is_divided_by_the_charters_constant(stand_in, units, monkeypatch) -> None:
    """A unit's share of the vector is the same in a sample of 1 and of 30, and follows from clip and expected_units."""
    for count in (1, 7, 30):
        vector = one_hot_step(monkeypatch, count, OPEN)()
        assert vector[:count] == pytest.approx(1.0 / OPEN.expected_units, rel=1e-3)
        assert not vector[count:].any()


def test_every_step_draws_its_own_poisson_sample(stand_in, units, monkeypatch) -> None:
    """Counts of 60 units over 300 steps are binomial, and successive samples are independent."""
    steps, count, prob = 300, 60, 0.25
    step = one_hot_step(monkeypatch, count, replace(OPEN, sampling_prob=prob))
    sampled = np.stack([step() != 0.0 for _ in range(steps)])  # (steps, units)
    spread = math.sqrt(steps * prob * (1 - prob))
    assert (np.abs(sampled.sum(0) - steps * prob) < 6.0 * spread).all()
    again = (sampled[1:] & sampled[:-1]).sum()
    pairs = (steps - 1) * count
    # Overlaps of successive pairs share a member: the variance is p^2 (1 - p^2) + 2 p^3 (1 - p) a pair.
    deviation = math.sqrt(pairs * (prob**2 * (1 - prob**2) + 2 * prob**3 * (1 - prob)))
    assert abs(again - pairs * prob**2) < 6.0 * deviation


def test_a_trainable_parameter_outside_the_vector_stops_the_step(stand_in, units, monkeypatch) -> None:
    """Before anything is computed, whatever the parameter is."""
    stand_in.model.model.layers[0].mlp.router.weight.requires_grad_(True)
    with pytest.raises(PrivacyCheckFailed, match="outside"):
        training.private_vector(stand_in, units, terms=OPEN, rng=os.urandom, noise=None)


def test_preflight_passes(stand_in, units, monkeypatch) -> None:
    """All checks that run before round 1 of a private run, on synthetic records."""
    noise = table_of(TERMS, training.vector_length(stand_in))
    figures = checks.preflight(stand_in, terms=TERMS, noise=noise, max_tokens=24)
    assert figures["move_over_clip"] <= 1.0
    assert figures["move_over_wide_clip"] <= 1.0
    assert figures["noise_over_stated"] == pytest.approx(1.0, abs=0.04)


# --- Programs that are broken on purpose -----------------------------------------------------------------------------

true_draw = RoundedGaussian.draw
true_release = privacy.release_vector
true_sample = privacy.poisson_sample


def batch_mean_sum(adapter, units, *, terms, step, rng, packing=None, streaming=None):
    """The library's loss: a mean over the batch's tokens, times the number of units, as engines for it assume."""
    batches = [batch_of(unit.records, adapter.trained[0].device) for unit in units]
    tokens = sum(int(batch.answers.sum()) for batch in batches)
    total = privacy.UnitSum(length=training.vector_length(adapter), l2_clip_norm=terms.l2_clip_norm, step=step)
    scales = []
    for batch in batches:
        loss = token_losses(adapter.model, batch)[0].sum() * len(units) / tokens
        gradients = torch.autograd.grad(loss, adapter.trained)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
        clipped = privacy.clip_to_grid(flat, l2_clip_norm=terms.l2_clip_norm, step=step)
        total.add(clipped)
        scales.append(clipped.scale)
    return total.total(), scales


def no_clip(gradient, *, l2_clip_norm, step) -> ClippedUnit:
    values = np.rint(gradient.astype(np.float64) / step).astype(np.int64)
    return ClippedUnit(values=values, grid=step, l2_bound=l2_clip_norm, scale=1.0)


def noise_times(factor: float):
    return lambda self, count: np.rint(true_draw(self, count) * factor).astype(np.int64)


def noise_from_seed(self, count: int) -> np.ndarray:
    return np.rint(np.random.standard_normal(count) * self.stddev).astype(np.int64)


def noise_of_few_bits(self, count: int) -> np.ndarray:
    return torch.from_numpy(true_draw(self, count)).to(torch.bfloat16).to(torch.int64).numpy()


KEPT: dict[int, np.ndarray] = {}


def noise_kept(self, count: int) -> np.ndarray:
    return KEPT.setdefault(count, true_draw(self, count))


def divided_by_sample(values, *, step, l2_clip_norm, expected_units) -> np.ndarray:
    size = max(1, np.count_nonzero(values))  # Of one-hot units: the size of the sample.
    return true_release(values, step=step, l2_clip_norm=l2_clip_norm, expected_units=float(size))


@functools.cache
def sample_once(count: int, sampling_prob: float, random_bytes) -> np.ndarray:
    return true_sample(count, sampling_prob, random_bytes)


def patch(*changes):
    """A program with these attributes replaced."""

    def apply(monkeypatch) -> None:
        for owner, name, value in changes:
            monkeypatch.setattr(owner, name, value)

    return apply


def draw(replacement):
    return patch((RoundedGaussian, "draw", replacement))


SUM_MOVES_BY_THE_CLIP = test_removing_a_unit_moves_the_sum_by_at_most_the_clip
NOISE_HAS_ITS_STDDEV = test_the_vector_is_the_clipped_sum_and_noise_of_the_stated_stddev

BROKEN = [
    ("batch-mean loss", patch((training, "clipped_sum", batch_mean_sum)), SUM_MOVES_BY_THE_CLIP),
    (
        "batch-mean loss",
        patch((training, "clipped_sum", batch_mean_sum)),
        test_clipped_sum_equals_a_loop_of_single_unit_gradients,
    ),
    ("batch-mean loss", patch((checks, "clipped_sum", batch_mean_sum)), test_preflight_passes),
    ("no clip", patch((training, "clip_to_grid", no_clip)), SUM_MOVES_BY_THE_CLIP),
    ("no clip", patch((training, "clip_to_grid", no_clip)), test_preflight_passes),
    ("no noise", draw(noise_times(0.0)), NOISE_HAS_ITS_STDDEV),
    ("no noise", draw(noise_times(0.0)), test_preflight_passes),
    ("half the noise", draw(noise_times(1 / 2)), NOISE_HAS_ITS_STDDEV),
    ("half the noise", draw(noise_times(1 / 2)), test_preflight_passes),
    ("2/3 of the noise", draw(noise_times(2 / 3)), NOISE_HAS_ITS_STDDEV),
    ("3/2 of the noise", draw(noise_times(3 / 2)), NOISE_HAS_ITS_STDDEV),
    ("noise in bfloat16", draw(noise_of_few_bits), test_preflight_passes),
    ("noise from --seed", draw(noise_from_seed), test_organisations_rounds_and_starts_share_no_noise),
    ("noise drawn once", draw(noise_kept), test_preflight_passes),
    (
        "division by the sample's size",
        patch((training, "release_vector", divided_by_sample)),
        test_the_sum_is_divided_by_the_charters_constant,
    ),
    (
        "a trainable parameter outside the vector",
        patch((training, "coverage_check", lambda _adapter: None)),
        test_a_trainable_parameter_outside_the_vector_stops_the_step,
    ),
    (
        "a Poisson sample drawn once and kept",
        patch((training, "poisson_sample", sample_once)),
        test_every_step_draws_its_own_poisson_sample,
    ),
]


@pytest.mark.parametrize(
    ("_variant", "breaks", "named_test"), BROKEN, ids=[f"{name} fails {test.__name__}" for name, _, test in BROKEN]
)
def test_a_broken_program_fails(_variant, breaks, named_test, stand_in, units, monkeypatch) -> None:
    breaks(monkeypatch)
    # Where the named test expects an error and none comes, pytest raises Failed, which is not an Exception.
    with pytest.raises((AssertionError, PrivacyCheckFailed, pytest.fail.Exception)):
        named_test(stand_in, units, monkeypatch)
