"""The checks that run before round 1 of every private run, on the real model and on synthetic records of its shapes.

A mechanism that is right on paper is wrong in a program when a loss couples the units of a batch, a seed repeats the
noise, a dtype coarsens it, or a parameter trains beside the vector. Each check here has a program that it caught. None
reads a real record, so a visible failure tells nothing about the data.

Ideas: the sensitivity test and the noise test of google-deepmind/jax_privacy; `docs/privacy.md`, "Checks that run for
real". Audits with canaries are left out: they run on demand, in hours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from foedus_model.adapter import AttachedAdapter
from foedus_protocols.errors import PrivacyCheckFailed
from foedus_protocols.layout import Layout, is_lora_a
from numpy.typing import NDArray
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from foedus_client.noise import RandomBytes, RoundedGaussian
from foedus_client.privacy import BoundedSum, StepTerms, grid, squared_limit
from foedus_client.synthetic import SyntheticUnit, synthetic_record, synthetic_units
from foedus_client.training import (
    Adapter,
    Packing,
    Streaming,
    Unit,
    clipped_sum,
    coverage_check,
    private_vector,
    streamed_gradients,
    unit_gradient,
    vector_length,
)

U = TypeVar("U")

MOST_DEVIATIONS = 6.0
"""How far a statistic may lie from its expectation; a normal one is further off once in 5 x 10^8."""

_NOISE_COORDINATES = 1 << 16  # Six deviations of the sample variance are then 3.3 %.
_COUPLING = 1e-3  # Of the clip: what removing a unit may change beyond that unit's own gradient (rounding on a GPU).
_ACCOUNTANTS_AGREE = 0.05
_DROPPED_UNITS = 2
_REACH_TOKENS = 64


def preflight(
    adapter: Adapter,
    *,
    terms: StepTerms,
    noise: RoundedGaussian,
    max_tokens: int,
    rng: RandomBytes = os.urandom,
    packing: Packing | None = None,
    streaming: Streaming | None = None,
) -> dict[str, float]:
    """All checks of a private run's model, terms and noise, on synthetic records of the run's shapes.

    The sensitivity is checked at the charter's clip, and again at a clip above every synthetic gradient, where a loss
    that couples units cannot hide behind the clipping. Where units may share a forward, it is checked once more among
    as many of one length as share it, with the exact bound that nothing else changes. Where units stream through the
    layers together, each one's gradient is compared with its own alone, in two orders.

    Returns:
        Figures for the organisation's own log: the largest move over the clip, the noise's stddev over the stated one.

    Raises:
        PrivacyCheckFailed: With what failed and by how much. Nothing was released.
    """
    coverage_check(adapter)
    units = synthetic_units(
        vocabulary=int(adapter.model.config.vocab_size),
        max_tokens=max_tokens,
        max_records=terms.max_records_per_unit,
        rng=rng,
    )
    longest = max(float(np.linalg.norm(gradient_check(adapter, unit))) for unit in units)
    wide = replace(terms, l2_clip_norm=2.0 * longest, noise_multiplier=0.0)
    figures = {
        "move_over_clip": _largest_move(adapter, units, terms, rng, streaming=streaming),
        "move_over_wide_clip": _largest_move(adapter, units, wide, rng, streaming=streaming),
    }
    if packing is not None:
        figures["move_over_clip_packed"] = _packed_move(adapter, terms, packing, rng)
    if streaming is not None:
        figures["streamed_apart_over_norm"] = streaming_check(adapter, units, streaming)
    unit_worth = grid(terms.noise_stddev, terms.l2_clip_norm, vector_length(adapter)) / (
        terms.l2_clip_norm * terms.expected_units
    )
    figures["noise_over_stated"] = noise_check(
        lambda: private_vector(adapter, [], terms=terms, rng=os.urandom, noise=noise).vector,
        stddev=terms.noise_multiplier / terms.expected_units,
        resolution=unit_worth,
    )
    return figures


def streaming_check(adapter: Adapter, units: Sequence[Unit], streaming: Streaming) -> float:
    """Units that stream through the layers together have the gradients that they have alone, whoever comes before.

    Returns:
        The largest difference of a unit's gradient over its norm.

    Raises:
        PrivacyCheckFailed: A difference of any bit on a CPU, or of more than rounding on a GPU.
    """
    allowed = 0.0 if adapter.trained[0].device.type == "cpu" else _COUPLING
    alone = [unit_gradient(adapter, unit.records) for unit in units]
    apart = 0.0
    for order in (1, -1):
        records = [unit.records for unit in units[::order]]
        streamed = streamed_gradients(adapter, records, streaming)
        for own, found in zip(alone[::order], streamed, strict=True):
            norm = max(float(np.linalg.norm(own)), float(np.finfo(np.float32).tiny))
            apart = max(apart, float(np.linalg.norm(found.astype(np.float64) - own)) / norm)
    if not apart <= allowed:  # NaN fails too.
        raise PrivacyCheckFailed(
            f"expected streamed gradients within {allowed:g} of those of one unit a forward, got {apart:.3g}: leave "
            "FOEDUS_STREAMING out"
        )
    return apart


def _packed_move(adapter: Adapter, terms: StepTerms, packing: Packing, rng: RandomBytes) -> float:
    """`_largest_move` of units that share a forward, where not one grid unit of another may change."""
    vocabulary, longest = int(adapter.model.config.vocab_size), max(packing.lengths)
    units = [SyntheticUnit(records=[synthetic_record(vocabulary, longest, rng)]) for _ in range(packing.units)]
    return _largest_move(adapter, units, terms, rng, packing=packing, coupling=0.0)


def _largest_move(
    adapter: Adapter,
    units: Sequence[Unit],
    terms: StepTerms,
    rng: RandomBytes,
    *,
    packing: Packing | None = None,
    streaming: Streaming | None = None,
    coupling: float = _COUPLING,
) -> float:
    """`sensitivity_check` of the production sum, on the grid of these terms."""
    step = grid(terms.noise_stddev, terms.l2_clip_norm, vector_length(adapter))

    def sum_of(some: Sequence[Unit]) -> BoundedSum:
        return clipped_sum(adapter, some, terms=terms, step=step, rng=rng, packing=packing, streaming=streaming)[0]

    return sensitivity_check(sum_of, units, l2_clip_norm=terms.l2_clip_norm, coupling=coupling)


def gradient_check(adapter: Adapter, unit: SyntheticUnit) -> NDArray[np.float32]:
    """Every trained tensor has a finite and non-zero gradient on a synthetic unit; returns the gradient.

    Raises:
        PrivacyCheckFailed: With the tensor's name: it would never train, or would poison every step.
    """
    names = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    gradient = unit_gradient(adapter, unit.records)
    start = 0
    for parameter in adapter.trained:
        part = gradient[start : start + parameter.numel()]
        start += parameter.numel()
        _require_trains(part, names.get(id(parameter), "an unattached tensor"))
    return gradient


def reach_check(adapter: AttachedAdapter, *, max_tokens: int, rng: RandomBytes = os.urandom) -> None:
    """Every matrix of the adapter can train: its gradient on a synthetic record is finite and not zero.

    At the start every B is zero, and with it every gradient of A; where A trains, it is looked at after one step. A
    router sends eight random tokens where it likes, so where each expert has a pair of its own, all tokens are sent to
    the experts of each group in turn.

    Args:
        adapter: With the vector that every run starts from loaded; it is loaded again at the end.
        max_tokens: Of a record of the run; the synthetic one has at most 64.
        rng: Makes the record.

    Raises:
        PrivacyCheckFailed: With the matrix's name, and its expert where it has one.
    """
    start = adapter.vector()
    record = synthetic_record(int(adapter.model.config.vocab_size), max(8, min(max_tokens, _REACH_TOKENS)), rng)
    trains_a = any(is_lora_a(tensor) for tensor in adapter.layout.trained())
    try:
        for group in _expert_groups(adapter):
            with _sent_to(adapter.model, group):
                gradient = unit_gradient(adapter, [record])
                _require_reached(adapter.layout, gradient, group, but_a=True)
                if trains_a:
                    adapter.load_vector(start - gradient / np.linalg.norm(gradient))
                    _require_reached(adapter.layout, unit_gradient(adapter, [record]), group, but_a=False)
                    adapter.load_vector(start)
    finally:
        adapter.load_vector(start)


def _expert_groups(adapter: AttachedAdapter) -> list[range]:
    """Experts to send tokens to, as many at once as a token has; one empty group where no matrix is one expert's."""
    experts = adapter.layout.num_experts
    if all(len(tensor.shape) == 2 or tensor.shape[0] == 1 for tensor in adapter.layout.trained()):
        return [range(0)]
    at_once = int(adapter.model.config.num_experts_per_tok)
    return [range(first, min(first + at_once, experts)) for first in range(0, experts, at_once)]


@contextmanager
def _sent_to(model: nn.Module, experts: range) -> Iterator[None]:
    """Every router sends every token to these experts, by matrices for the time; the base's are put back."""
    routers = [module for module in model.modules() if experts and isinstance(module, GptOssTopKRouter)]
    kept = [(router.weight, router.bias) for router in routers]
    for router in routers:
        bias = torch.zeros_like(router.bias)
        bias[list(experts)] = 1.0
        router.weight = nn.Parameter(torch.zeros_like(router.weight), requires_grad=False)
        router.bias = nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        for router, (weight, bias) in zip(routers, kept, strict=True):
            router.weight, router.bias = weight, bias


def _require_reached(layout: Layout, gradient: NDArray[np.float32], experts: range, *, but_a: bool) -> None:
    """Raise where a gradient is no number, or zero: of a whole matrix, or in a stack of each of these experts.

    With `but_a` an A may have none.
    """
    for tensor in layout.trained():
        part = gradient[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        may_rest = but_a and is_lora_a(tensor)
        if len(tensor.shape) == 2 or tensor.shape[0] == 1:
            if part.any() or not may_rest:
                _require_trains(part, tensor.name)
            continue
        for expert, found in enumerate(part):
            if found.any() or not (may_rest or expert not in experts):
                _require_trains(found, tensor.name, expert)


def _require_trains(part: NDArray[np.float32], name: str, expert: int | None = None) -> None:
    if not np.isfinite(part).all() or not part.any():
        came = "zero" if np.isfinite(part).all() else "not finite"
        whose = "" if expert is None else f", expert {expert}"
        raise PrivacyCheckFailed(
            f"expected a finite, non-zero gradient on a synthetic record, got one that is {came} for "
            f"{name}{whose}: check the adapter's targets and the base"
        )


def sensitivity_check(
    sum_of: Callable[[Sequence[U]], BoundedSum],
    units: Sequence[U],
    *,
    l2_clip_norm: float,
    drop: int = _DROPPED_UNITS,
    coupling: float = _COUPLING,
) -> float:
    """Drop each of the first `drop` units: the sum must move by at most the clip, and by that unit's share alone.

    Args:
        sum_of: The production sum, as a function of the units.
        units: More than `drop` of them, the largest first.
        l2_clip_norm: The stated sensitivity.
        drop: How many units to drop, one at a time.
        coupling: What a unit that leaves may change beyond its own share, in clips.

    Returns:
        The largest move over the clip.

    Raises:
        PrivacyCheckFailed: The sum moves too far, or what other units contribute changes, or the sum states another
            sensitivity. The first comparison is between integers.
    """
    whole = sum_of(units)
    if whole.l2_sensitivity != l2_clip_norm:
        raise PrivacyCheckFailed(f"expected a sum of sensitivity {l2_clip_norm}, got {whole.l2_sensitivity}")
    limit = squared_limit(l2_clip_norm, whole.grid)
    largest = 0.0
    for index in range(drop):
        moved = whole.values - sum_of([*units[:index], *units[index + 1 :]]).values
        ratio = math.sqrt(_squared(moved) / limit)
        if _squared(moved) > limit:
            raise PrivacyCheckFailed(
                f"expected the sum to move by at most the clip when a unit leaves, got {ratio:.6g} clips: "
                "the clip does not bound a unit, or units share a loss"
            )
        coupled = math.sqrt(_squared(moved - sum_of([units[index]]).values) / limit)
        if coupled > coupling:
            raise PrivacyCheckFailed(
                f"expected a unit to change its own share of the sum alone, got {coupled:.6g} clips of other change: "
                "units share a loss, a sample or a batch"
            )
        largest = max(largest, ratio)
    return largest


def _squared(values: NDArray[np.int64]) -> int:
    """The squared norm of integers, exactly, however long."""
    largest = int(np.abs(values).max(initial=0))
    if largest**2 * values.size < 2**63:
        return int(np.dot(values, values))
    return sum(int(value) ** 2 for value in values)


def noise_check(release: Callable[[], NDArray[np.float32]], *, stddev: float, resolution: float) -> float:
    """The noise has the stated spread and shape, on the stated grid, and is drawn afresh each time.

    Args:
        release: Makes one vector from no unit: pure noise, through the production path.
        stddev: What a coordinate's standard deviation should be, in the vector's units.
        resolution: What one grid unit is worth in the vector.

    Returns:
        The measured standard deviation over the stated one.

    Raises:
        PrivacyCheckFailed: Mean, variance, kurtosis, correlation of successive vectors, or the share of odd grid points
            lies more than six standard deviations from what it should be. With right noise that happens once in 10^6
            runs (kurtosis has the heaviest tail), and a factor 2/3 or 3/2 of the stddev is always seen.
    """
    first, second = _noise_pair(release)
    sample = np.concatenate([first, second]).astype(np.float64) / stddev  # (n,)
    count = sample.size
    paired = np.mean(first.astype(np.float64) * second) / stddev**2
    odd = np.mean(np.rint(np.nan_to_num(sample) * (stddev / resolution)).astype(np.int64) & 1)
    variance = float(np.mean(sample**2))
    # With mean 0 and variance 1, z^4 - 6 z^2 + 3 (a Hermite polynomial) has mean 0 and variance 24.
    deviations = {
        "mean": float(sample.mean()) * math.sqrt(count),
        "variance": (variance - 1.0) * math.sqrt(count / 2.0),
        "kurtosis": (float(np.mean(sample**4)) - 6.0 * variance + 3.0) * math.sqrt(count / 24.0),
        "correlation of two vectors": float(paired) * math.sqrt(first.size),
        "share of odd grid points": (float(odd) - 0.5) * 2.0 * math.sqrt(count),
    }
    for name, deviation in deviations.items():
        if not abs(deviation) <= MOST_DEVIATIONS:
            raise PrivacyCheckFailed(
                f"expected noise of the stated spread, shape and independence, got a {name} {deviation:+.1f} standard "
                f"deviations off (stddev {math.sqrt(variance):.4f} of the stated one): nothing was released"
            )
    return math.sqrt(variance)


def _noise_pair(release: Callable[[], NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two samples of enough coordinates, from alternating releases."""
    firsts, seconds, drawn = [], [], 0
    while drawn < _NOISE_COORDINATES:
        firsts.append(release())
        seconds.append(release())
        drawn += 2 * firsts[-1].size
    return np.concatenate(firsts), np.concatenate(seconds)


def cross_check(
    *, noise_multiplier: float, sampling_prob: float, steps: int, delta: float, pld_epsilon: float
) -> float:
    """Opacus' PRV accountant must agree with the epsilon that the charter was signed for.

    Returns:
        Opacus' epsilon.

    Raises:
        PrivacyCheckFailed: They differ by more than 0.05.
    """
    from opacus.accountants import PRVAccountant  # Seconds to import, and needed once a run.

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sampling_prob, steps)]
    epsilon = float(accountant.get_epsilon(delta=delta))
    if not abs(epsilon - pld_epsilon) <= _ACCOUNTANTS_AGREE:
        raise PrivacyCheckFailed(
            f"expected Opacus' accountant within {_ACCOUNTANTS_AGREE} of epsilon {pld_epsilon:.4f}, got {epsilon:.4f}: "
            "nothing is released until they agree"
        )
    return epsilon
