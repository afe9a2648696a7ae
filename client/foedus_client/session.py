"""What a worker does: hold one base and one data set, check the mechanism, make vectors, score adapters.

Plain functions over a loaded `Session`; nothing here knows of Flower, sockets, keys or the ledger.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from foedus_model.adapter import AttachedAdapter
from foedus_model.streaming import Streamer
from foedus_protocols.errors import PrivacyCheckFailed, RoundFailed
from foedus_protocols.files import disk_errors
from foedus_protocols.layout import Vector, initial_vector
from foedus_protocols.manifest import TOKENIZER_FILE
from foedus_protocols.messages import Scores

from foedus_client import checks, training
from foedus_client.datasets import Dataset, load_dataset
from foedus_client.loading import load_adapted
from foedus_client.noise import RoundedGaussian
from foedus_client.packed import Packing, packing_for
from foedus_client.privacy import SeededBytes, StepTerms
from foedus_client.switches import units_a_forward
from foedus_client.work import (
    CheckReply,
    CheckTask,
    EvaluateReply,
    EvaluateTask,
    Setup,
    SetupReply,
    StepTermsTask,
    TrainReply,
    TrainTask,
)

NOISE_TABLES = "noise"


class Session:
    """A base with an attached adapter, a data set, and the noise tables that were built.

    The base is loaded once and stays as long as the session; an adapter is 10 to 100 MB and is loaded for each task.
    """

    def __init__(
        self,
        setup: Setup,
        adapter: AttachedAdapter,
        data: Dataset,
        *,
        work: Path,
        streaming: Streamer | None = None,
    ) -> None:
        self._setup = setup
        self._streaming = streaming
        self._adapter = adapter
        self._data = data
        self._work = work
        self._tables: dict[StepTerms, RoundedGaussian | None] = {}
        self._packing: Packing | None = None
        self._packing_tried = False

    @classmethod
    def load(cls, setup: Setup, *, work: Path) -> Session:
        """Load base, adapter and data.

        Raises:
            CheckpointError: Another base than the charter's, or another adapter layout.
            ConfigError: A setting of the environment that cannot be.
            DataError: A file cannot be read.
        """
        adapter, streaming = load_adapted(setup)
        data = load_dataset(
            [Path(file) for file in setup.files],
            units=setup.units,
            columns=setup.columns,
            tokenizer_path=Path(setup.base) / TOKENIZER_FILE,
            max_tokens=setup.max_tokens,
            max_records_per_unit=setup.max_records_per_unit,
            split_key=bytes.fromhex(setup.split_key),
        )
        return cls(setup, adapter, data, work=work, streaming=streaming)

    def close(self) -> None:
        """End what copies experts beside the computation, and unpin; any number of times. Nothing else is open."""
        if self._streaming is not None:
            self._streaming.close()

    def describe(self) -> SetupReply:
        """How much data there is, and where the model runs."""
        return SetupReply(
            train_units=len(self._data.train),
            heldout_units=len(self._data.heldout),
            device=str(self._adapter.trained[0].device),
        )

    def check(self, task: CheckTask) -> CheckReply:
        """Coverage and gradients; in private modes also sensitivity, noise and a second accountant.

        All of it on synthetic records of the run's shapes, with the adapter that every run starts from.

        Raises:
            PrivacyCheckFailed: One of them failed.
        """
        terms = self._terms(task.terms)
        noise = self._table(terms)
        self._adapter.load_vector(self.initial_vector())
        checks.reach_check(self._adapter, max_tokens=self._setup.max_tokens)
        if noise is None:
            return CheckReply(figures={})
        if task.delta is None or task.epsilon is None:
            raise PrivacyCheckFailed("expected delta and epsilon to check a private run against, got none")
        figures = checks.preflight(
            self._adapter,
            terms=terms,
            noise=noise,
            max_tokens=self._setup.max_tokens,
            packing=self._packing_of(terms),
            streaming=self._streaming,
        )
        figures["epsilon_of_second_accountant"] = checks.cross_check(
            noise_multiplier=terms.noise_multiplier,
            sampling_prob=terms.sampling_prob,
            steps=task.steps,
            delta=task.delta,
            pld_epsilon=task.epsilon,
        )
        return CheckReply(figures=figures)

    def train(self, task: TrainTask) -> TrainReply:
        """One step; the vector goes to the task's output file, and only figures for this organisation come back."""
        self._load_adapter(task.adapter)
        terms = self._terms(task.terms)
        if terms.private or task.terms.seed is None:
            rng = os.urandom
        else:
            training.make_reproducible(torch.get_num_threads())
            rng = SeededBytes(seed=task.terms.seed, org=task.org, round_number=task.round)
        result = training.private_vector(
            self._adapter,
            self._data.train,
            terms=terms,
            rng=rng,
            noise=self._table(terms),
            packing=self._packing_of(terms),
            streaming=self._streaming,
        )
        output = Path(task.output)
        with disk_errors(output):
            output.write_bytes(result.vector.astype("<f4", copy=False).data)
        return TrainReply(
            figures={
                "sampled_units": result.sampled_units,
                "clipped_units": result.clipped_units,
                "dropped_units": result.dropped_units,
            }
        )

    def evaluate(self, task: EvaluateTask) -> EvaluateReply:
        """Held-out scores, None where nothing is held out."""
        if not self._data.heldout:
            return EvaluateReply(scores=None)
        self._load_adapter(task.adapter)
        loss_sum, tokens, units = training.score(self._adapter, self._data.heldout, task.max_records)
        return EvaluateReply(scores=Scores(loss_sum=loss_sum, tokens=tokens, units=units) if units else None)

    def unit_norms(self, count: int) -> list[float]:
        """L2 norms of the first units' gradients at the run's start, before clipping.

        They are statistics of the data, for public data only. Each unit's first `max_records_per_unit` records stand
        for it.
        """
        self._adapter.load_vector(self.initial_vector())
        most = self._setup.max_records_per_unit
        chosen = [unit.records[:most] for unit in self._data.train[:count]]
        return [float(np.linalg.norm(training.unit_gradient(self._adapter, records))) for records in chosen]

    def initial_vector(self) -> Vector:
        """The trained matrices before round 1 of a run that extends nothing.  # (d,)"""
        return initial_vector(self._adapter.layout, self._setup.adapter_seed)

    def _load_adapter(self, path: str) -> None:
        vector = np.fromfile(path, dtype="<f4").astype(np.float32)
        if vector.size != training.vector_length(self._adapter):
            raise RoundFailed(
                f"expected an adapter of {training.vector_length(self._adapter)} numbers, got {vector.size}"
            )
        self._adapter.load_vector(vector)

    def _terms(self, task: StepTermsTask) -> StepTerms:
        """The step's terms.

        Raises:
            PrivacyCheckFailed: They call themselves private and name no noise or a seed, or noise and not private.
        """
        noised = task.noise_multiplier > 0.0
        if task.private != noised or (task.private and task.seed is not None):
            raise PrivacyCheckFailed(
                f"expected noise and no seed exactly where a step is private, got private {task.private}, "
                f"noise multiplier {task.noise_multiplier}, {'a' if task.seed is not None else 'no'} seed"
            )
        return StepTerms(
            l2_clip_norm=task.l2_clip_norm,
            noise_multiplier=task.noise_multiplier,
            sampling_prob=task.sampling_prob,
            expected_units=task.expected_units,
            max_records_per_unit=self._setup.max_records_per_unit,
        )

    def _packing_of(self, terms: StepTerms) -> Packing | None:
        """Several units a forward, where the organisation asks for it and this process has shown that it may.

        It is tried once in each process, on synthetic records, before the first private step. Mode `none` never packs.
        """
        if not terms.private or units_a_forward() == 1:
            return None
        if not self._packing_tried:
            self._packing = packing_for(self._adapter, units=units_a_forward(), max_tokens=self._setup.max_tokens)
            self._packing_tried = True
        return self._packing

    def _table(self, terms: StepTerms) -> RoundedGaussian | None:
        """The noise table of these terms; it is public, and kept on disk beside the work folder's other files."""
        if terms not in self._tables:
            length = training.vector_length(self._adapter)
            self._tables[terms] = training.noise_table(terms, length, cache=self._work / NOISE_TABLES)
        return self._tables[terms]
