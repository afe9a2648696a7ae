"""The private step: units in, one clipped and noised vector out.

One unit a forward, so that what autograd returns *is* the unit's gradient and no unit's arithmetic depends on who
shares its batch. A unit's loss comes from its own answer tokens alone: the mean over its records of each record's mean
token loss. (The library's `labels=` loss is a mean over the batch's tokens; removing one record moved a clipped sum by
up to 8 clips.) A unit's records are one right-padded batch (`foedus_model.loss`).

Where experts stream from the host (`foedus_model.streaming`), several units share a pass over the layers: each has its
own forward and backward in it, with the same operations.

A private run may take several units of one length in one forward where that was shown to change no bit of any unit's
gradient (`packed.py`); here that is a `Packing`, passed in.

The steps of `private_vector` are in the order of `docs/privacy.md`, "The mechanism". Local steps are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from foedus_model.loss import Batch, Record, UnitLoss, batch_of, token_losses
from foedus_protocols.errors import ConfigError, PrivacyCheckFailed
from numpy.typing import NDArray
from torch import nn

from foedus_client.noise import RandomBytes, RoundedGaussian, rounded_gaussian
from foedus_client.privacy import (
    BoundedSum,
    StepTerms,
    UnitSum,
    choose_records,
    clip_to_grid,
    grid,
    poisson_sample,
    release_vector,
)


class Unit(Protocol):
    """One privacy unit: all records that share its key."""

    @property
    def records(self) -> Sequence[Record]:
        """At least one."""


class Adapter(Protocol):
    """A model with an adapter attached (`foedus_model.adapter.AttachedAdapter`)."""

    @property
    def model(self) -> Any:
        """The model; every parameter outside the adapter is frozen."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained tensors, in layout order."""


class Packing(Protocol):
    """Several units in one forward, for units whose bits do not depend on it (`packed.packing_for` makes one)."""

    @property
    def units(self) -> int:
        """Units of one forward, at most."""

    @property
    def lengths(self) -> frozenset[int]:
        """Tokens of the records that it takes."""

    def takes(self, records: Sequence[Record]) -> bool:
        """Whether a unit with these records takes this path: a function of the unit alone."""

    def gradients(self, adapter: Adapter, records: Sequence[Record]) -> NDArray[np.float32]:
        """The gradient of each of U units of one record and one length.  # float32 (U, d)"""


class Streaming(Protocol):
    """Several units in one pass over streamed experts (`foedus_model.streaming.Streamer`)."""

    @property
    def units(self) -> int:
        """Units of one pass, at most."""

    def gradients(self, batches: Sequence[Batch], loss: UnitLoss) -> NDArray[np.float32]:
        """The gradient of each of U units, each with an answer token.  # float32 (U, d)"""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gives.

    Attributes:
        vector: (clipped sum + noise) / (l2_clip_norm x expected_units), the only thing that may leave.  # float32 (d,)
        sampled_units: How many units took part. A statistic of the data: it stays in the organisation.
        clipped_units: How many of them were shortened. It stays.
        dropped_units: How many counted as zero, their gradient not being finite. It stays.
    """

    vector: NDArray[np.float32]
    sampled_units: int
    clipped_units: int
    dropped_units: int


def private_vector(
    adapter: Adapter,
    units: Sequence[Unit],
    *,
    terms: StepTerms,
    rng: RandomBytes,
    noise: RoundedGaussian | None,
    packing: Packing | None = None,
    streaming: Streaming | None = None,
) -> StepResult:
    """One step of an organisation: sample, clip, sum, noise, scale.

    Args:
        adapter: The model, with the round's adapter loaded.
        units: Everything the organisation trains on. May be empty: the step is then noise only, and counts.
        terms: The charter's constants for this organisation.
        rng: `os.urandom` in private modes; a `SeededBytes` of the round in mode `none`.
        noise: The table of `noise_table(terms, d)`; None in mode `none`.
        packing: Of `packed.packing_for`, in this process; None takes one unit a forward. Mode `none` takes one always:
            its bits are made again after a restart.
        streaming: Takes a number of units through each layer at once; each unit's bits are those of one unit a forward.

    Raises:
        PrivacyCheckFailed: A parameter requires a gradient and is not in the vector, the noise is not the one that the
            terms ask for, or a private step is given any bytes but the operating system's. Nothing here depends on a
            record.

    Guarantees:
        With noise, the vector is one Poisson-subsampled Gaussian event of `sampling_prob` and `noise_multiplier` with
        respect to adding or removing one unit, up to the noise table's stated distance. The bytes of the vector are
        covered; the time that the step takes is not.
    """
    coverage_check(adapter)
    length = vector_length(adapter)
    _require_noise(terms, noise, rng, length)
    sampled = [units[index] for index in poisson_sample(len(units), terms.sampling_prob, rng)]
    step = grid(terms.noise_stddev, terms.l2_clip_norm, length)
    allowed = packing if terms.private else None
    total, scales = clipped_sum(adapter, sampled, terms=terms, step=step, rng=rng, packing=allowed, streaming=streaming)
    values = total.values if noise is None else total.values + noise.draw(length)
    vector = release_vector(values, step=step, l2_clip_norm=terms.l2_clip_norm, expected_units=terms.expected_units)
    return StepResult(
        vector=vector,
        sampled_units=len(sampled),
        clipped_units=sum(0.0 < scale < 1.0 for scale in scales),
        dropped_units=sum(scale == 0.0 for scale in scales),
    )


def noise_table(terms: StepTerms, length: int, *, cache: Path | None = None) -> RoundedGaussian | None:
    """The noise that the terms ask for, from the cache folder where it was built before; None in mode `none`."""
    return rounded_gaussian(_grid_stddev(terms, length), cache=cache) if terms.private else None


def make_reproducible(threads: int) -> None:
    """Fix the thread count and take deterministic algorithms, so that mode `none` has the same bits after a restart."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def clipped_sum(
    adapter: Adapter,
    units: Sequence[Unit],
    *,
    terms: StepTerms,
    step: float,
    rng: RandomBytes,
    packing: Packing | None = None,
    streaming: Streaming | None = None,
) -> tuple[BoundedSum, list[float]]:
    """The sum of the units' clipped gradients, with its sensitivity, and the clip factors (which stay at home).

    Guarantees:
        Adding or removing one unit moves the sum by at most `l2_clip_norm`: a unit's gradient is computed in a forward
        of its own, or to the same bits in one with others (as far as `packing` was shown to), and clipped before it is
        added (`clip_to_grid`). Which of the two ways a unit takes is a function of its own records.
    """
    total = UnitSum(length=vector_length(adapter), l2_clip_norm=terms.l2_clip_norm, step=step)
    scales: list[float] = []
    chosen = (
        [unit.records[index] for index in choose_records(len(unit.records), terms.max_records_per_unit, rng)]
        for unit in units
    )
    found = (
        _gradients(adapter, chosen, packing) if streaming is None else streamed_gradients(adapter, chosen, streaming)
    )
    for gradient in found:
        clipped = clip_to_grid(gradient, l2_clip_norm=terms.l2_clip_norm, step=step)
        total.add(clipped)
        scales.append(clipped.scale)
    return total.total(), scales


def _gradients(
    adapter: Adapter, units: Iterable[Sequence[Record]], packing: Packing | None
) -> Iterator[NDArray[np.float32]]:
    """Each unit's gradient, float32 (d,): packed units when as many of their length have come as a forward takes."""
    waiting: dict[int, list[Record]] = {}  # By length.
    for records in units:
        if packing is None or not packing.takes(records):
            yield unit_gradient(adapter, records)
            continue
        group = waiting.setdefault(len(records[0].tokens), [])
        group.append(records[0])
        if len(group) == packing.units:
            yield from packing.gradients(adapter, group)
            group.clear()
    for group in waiting.values():
        if packing is not None and group:
            yield from packing.gradients(adapter, group)


def streamed_gradients(
    adapter: Adapter, units: Iterable[Sequence[Record]], streaming: Streaming
) -> Iterator[NDArray[np.float32]]:
    """Each unit's gradient, float32 (d,), as many units a pass as it takes."""
    device = adapter.trained[0].device
    batches: list[Batch] = []
    for records in units:
        batch = batch_of(records, device)
        if batch is None:
            yield np.zeros(vector_length(adapter), np.float32)
            continue
        batches.append(batch)
        if len(batches) == streaming.units:
            yield from streaming.gradients(batches, unit_loss)
            batches = []
    if batches:
        yield from streaming.gradients(batches, unit_loss)


def unit_gradient(adapter: Adapter, records: Sequence[Record]) -> NDArray[np.float32]:
    """The gradient of one unit's loss over the trained tensors, in layout order.  # float32 (d,)

    A unit without an answer token has no loss, and a gradient of zero.
    """
    batch = batch_of(records, adapter.trained[0].device)
    if batch is None:
        return np.zeros(vector_length(adapter), np.float32)
    losses, owners = token_losses(adapter.model, batch)  # (N,), (N,)
    gradients = torch.autograd.grad(unit_loss(losses, owners, len(records)), adapter.trained)
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])  # (d,)
    return flat.cpu().numpy()


def unit_loss(losses: torch.Tensor, owners: torch.Tensor, records: int) -> torch.Tensor:
    """A unit's loss: the mean over its records with an answer of each record's mean token loss.

    Args:
        losses: [N], of the unit's answer tokens.
        owners: int64 [N], the record of each.
        records: How many records the unit has.
    """
    tokens = torch.bincount(owners, minlength=records).to(losses.dtype)  # (records,)
    shares = 1.0 / (tokens[owners] * torch.count_nonzero(tokens))  # (N,)
    return (losses * shares).sum()


def score(adapter: Adapter, units: Sequence[Unit], max_records: int) -> tuple[float, int, int]:
    """Loss of held-out units: the sum of token losses in nats, the number of tokens, and of units, that it stands for.

    Units are taken in their order until `max_records` records were read; a unit is read to its end or to that number.
    The figures are statistics of the data. They leave only where the charter's evaluation term says so.
    """
    loss_sum, tokens, scored, left = 0.0, 0, 0, max_records
    with torch.no_grad():
        for unit in units:
            if left == 0:
                break
            records = list(unit.records)[:left]
            left -= len(records)
            batch = batch_of(records, adapter.trained[0].device)
            if batch is None:
                continue
            losses, _ = token_losses(adapter.model, batch)
            loss_sum += float(losses.double().sum())
            tokens += losses.numel()
            scored += 1
    return loss_sum, tokens, scored


def vector_length(adapter: Adapter) -> int:
    """Coordinates of the vector: the trained tensors."""
    return sum(parameter.numel() for parameter in adapter.trained)


def coverage_check(adapter: Adapter) -> None:
    """Every parameter that requires a gradient is in the clipped and noised vector, once, and nothing couples units.

    Raises:
        PrivacyCheckFailed: With the parameter's name, or the setting.
    """
    covered = {id(parameter) for parameter in adapter.trained}
    if len(covered) != len(adapter.trained) or not covered:
        raise PrivacyCheckFailed("expected each trained tensor once in the vector, got a repeated one or none")
    reached = set()
    for name, parameter in adapter.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            raise PrivacyCheckFailed(
                f"expected every trainable parameter in the clipped and noised vector, got {name} outside it: freeze it"
            )
        if parameter.requires_grad:
            reached.add(id(parameter))
    if reached != covered:
        raise PrivacyCheckFailed(
            f"expected {len(covered)} trainable tensors in the model, found {len(reached)}: the adapter is not attached"
        )
    if adapter.model.training:
        raise PrivacyCheckFailed("expected the model in evaluation mode (no dropout), got training mode: call eval()")
    if getattr(adapter.model.config, "output_router_logits", False):
        raise PrivacyCheckFailed(
            "expected no router loss, which couples the units of a batch, got output_router_logits: turn it off"
        )


def _require_noise(terms: StepTerms, noise: RoundedGaussian | None, rng: RandomBytes, length: int) -> None:
    """The noise is the one that the terms ask for, and a private step takes no seed."""
    if not terms.private:
        if noise is not None:
            raise ConfigError("expected no noise in mode none, got a noise table: correct the step's terms")
        return
    if rng is not os.urandom:
        raise PrivacyCheckFailed("expected the operating system's random source in a private step, got another one")
    stddev = _grid_stddev(terms, length)
    if noise is None or noise.stddev != stddev:
        came = "none" if noise is None else f"{noise.stddev:g}"
        raise PrivacyCheckFailed(f"expected noise of {stddev:g} grid units, got {came}: nothing was released")


def _grid_stddev(terms: StepTerms, length: int) -> float:
    """The noise in grid units: exact, since the grid is a power of two."""
    return terms.noise_stddev / grid(terms.noise_stddev, terms.l2_clip_norm, length)
