"""What privacy costs on a GPU: a whole private step at the true shape, beside a plain step of the same batch.

Both steps train the same adapter (A frozen) on the same units of one record each, and compute layers again in the
backward. The plain one is what a trainer without privacy does: the batch's mean loss, some units a forward, gradients
added on the device. The private one is the run's own (`foedus_client.training.private_vector`): each unit's gradient,
clipped and rounded on the host, summed in integers, noised. A third time, of the units' gradients alone, says how much
of the difference is the device's and how much the host's. Memory is the device's.

Two ways: some units in one forward (`packed`), which a charter's run may take only where it was shown to change no bit
and the bench times in any case, and one unit a forward. Every unit has the same choices of experts (`gpu_steps.route`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_steps import median_of, route, synthetic_model

TOGETHER = 4  # Units of a plain step's forward and of a packed one's: of 512 tokens, below what takes another path.


@dataclass(frozen=True, kw_only=True)
class PrivateCase:
    """A row of the private steps' table.

    Attributes:
        name: Of the row.
        preset: Whose shape.
        targets: What is trained; R is 16, and 16 over a token's experts where every expert has a pair of its own.
        packed: Whether units share a forward.
        goal: The private step's time over the plain one's, at most; in words.
        units: Of the batch.
        tokens: Of a unit.
    """

    name: str
    preset: str
    targets: str
    packed: bool
    goal: str
    units: int = 16
    tokens: int = 512


PRIVATE_STEPS = tuple(
    PrivateCase(
        name=f"20b, {targets}, {'packed' if packed else 'one unit a forward'}",
        preset="gpt-oss-20b",
        targets=targets,
        packed=packed,
        goal=f"<= {goal}",
    )
    for packed, goals in ((True, ("1.10", "1.25", "1.25")), (False, ("1.10",) * 3))
    for targets, goal in zip(("attention", "experts-shared", "experts"), goals, strict=True)
)


class PrivateStep:
    """A batch, and the plain and the private way to step over it.

    Attributes:
        adapter: The model, with its adapter attached.
        units: Of one record each; every token but the first is an answer.
        path: What `choose_path` said.
    """

    def __init__(
        self,
        described: dict[str, Any],
        case: PrivateCase,
        *,
        device: torch.device,
        dtype: torch.dtype,
        l2_clip_norm: float = 1.0,
        noise_multiplier: float = 1.0,
    ) -> None:
        """Make the model, its adapter, the units and the table of the noise, which a run makes once."""
        import numpy as np
        from foedus_client.packed import Packing
        from foedus_client.privacy import StepTerms
        from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
        from foedus_client.training import noise_table, vector_length
        from foedus_model.adapter import attach
        from foedus_model.attention import fuse_attention
        from foedus_model.experts import choose_path
        from foedus_model.recompute import recompute_layers
        from foedus_model.switches import prepare_process
        from foedus_protocols.charter_draft import default_rank
        from foedus_protocols.layout import adapter_layout

        prepare_process()
        rank = default_rank(case.targets, described)
        model = synthetic_model(described, device, dtype, streamed=False)
        layout = adapter_layout(described, targets=case.targets, rank=rank)
        self.adapter = attach(model, layout, seed="0" * 64, alpha=16, rank=rank)
        choice = choose_path(model, rows=TOGETHER * case.tokens)
        self.path = "" if choice is None else f"{choice.path}, since {choice.why}"
        fuse_attention(model)
        route(model, case.tokens, seed=0)
        recompute_layers(model)
        words = np.random.default_rng(0).integers(0, int(described["vocab_size"]), (case.units, case.tokens))
        answers = np.arange(case.tokens) > 0
        self.units = [
            SyntheticUnit(records=[SyntheticRecord(tokens=row, loss_mask=answers)]) for row in words.astype(np.int32)
        ]
        # By hand, without the check that a private run's has passed: no charter and no setting can do that.
        self._packing = Packing(units=TOGETHER, lengths=frozenset({case.tokens})) if case.packed else None
        self._terms = StepTerms(
            l2_clip_norm=l2_clip_norm,
            noise_multiplier=noise_multiplier,
            sampling_prob=1.0,  # Every turn has the same batch.
            expected_units=float(case.units),
            max_records_per_unit=1,
        )
        self._noise = noise_table(self._terms, vector_length(self.adapter))

    def plain(self) -> list[torch.Tensor]:
        """The gradients of the batch's mean loss, one for each trained matrix."""
        from foedus_model.loss import batch_of, token_losses

        records = [unit.records[0] for unit in self.units]
        total = [torch.zeros_like(one) for one in self.adapter.trained]
        for start in range(0, len(records), TOGETHER):
            batch = batch_of(records[start : start + TOGETHER], total[0].device)
            if batch is None:
                raise ValueError("expected records of two tokens and more: they have no loss")
            losses, _ = token_losses(self.adapter.model, batch)
            share = losses.sum() / (len(records) * batch.answers.shape[1])
            for sums, found in zip(total, torch.autograd.grad(share, self.adapter.trained), strict=True):
                sums += found
        return total

    def gradients(self) -> None:
        """Each unit's gradient, on the host, before it is clipped."""
        from foedus_client.training import unit_gradient

        for start in range(0, len(self.units), TOGETHER):
            records = [unit.records[0] for unit in self.units[start : start + TOGETHER]]
            if self._packing is not None:
                self._packing.gradients(self.adapter, records)
                continue
            for record in records:
                unit_gradient(self.adapter, [record])

    def private(self) -> Any:
        """The step as a private run makes it: a `StepResult`."""
        from foedus_client.training import private_vector

        return private_vector(
            self.adapter, self.units, terms=self._terms, rng=os.urandom, noise=self._noise, packing=self._packing
        )


def measured(step: PrivateStep, clock: Any, repeats: int) -> dict[str, Any]:
    """Seconds and the most memory of the plain step and of the private one, and their ratio."""
    found: dict[str, Any] = {}
    ways: dict[str, Callable[[], object]] = {"plain": step.plain, "gradients": step.gradients, "private": step.private}
    for way, run in ways.items():
        clock.clear()  # Of the way before.
        found[f"{way}_seconds"] = median_of(run, repeats, clock.synchronise)
        found[f"{way}_peak_bytes"] = clock.peak_bytes()
    found["seconds"], found["peak_bytes"] = found.pop("private_seconds"), found.pop("private_peak_bytes")
    found["over_plain"] = found["seconds"] / found["plain_seconds"]
    found["gradients_over_plain"] = found["gradients_seconds"] / found["plain_seconds"]
    return found
