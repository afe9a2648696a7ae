"""The clipped sum of every adapter kind on every codec equals a loop of single units through the library's forward."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foedus_client import packed, training
from foedus_client.packed import Packing
from foedus_client.privacy import StepTerms
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from foedus_model.adapter import AttachedAdapter, ExpertLoraModule, attach
from foedus_model.recompute import recompute_layers
from foedus_protocols.layout import adapter_layout
from support.quantised import LONELY, VOCABULARY, small_model

KINDS: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "experts-shared": {"targets": "experts-shared"},
    "experts": {"targets": "experts", "layers": [1]},
}
CLIP = 0.4
STEP = 2.0**-30  # A grid so fine that rounding to it is far below what is compared.
TERMS = StepTerms(
    l2_clip_norm=CLIP, noise_multiplier=0.0, sampling_prob=1.0, expected_units=6.0, max_records_per_unit=3
)
LENGTHS = ([20, 24, 1], [24], [1], [24], [2])


def adapted(quantisation: str, kind: str, train: str) -> AttachedAdapter:
    model = small_model(quantisation)
    layout = adapter_layout(model.config.to_dict(), rank=4, train=train, **KINDS[kind])
    adapter = attach(model, layout, seed="public", alpha=8.0, rank=4)
    adapter.load_vector((np.random.default_rng(5).normal(size=layout.length) * 0.1).astype(np.float32))
    return adapter


def units() -> list[SyntheticUnit]:
    rng = np.random.default_rng(3)
    return [SyntheticUnit(records=[record(rng, length) for length in lengths]) for lengths in LENGTHS]


def record(rng: np.random.Generator, length: int) -> SyntheticRecord:
    tokens = rng.integers(0, VOCABULARY, length).astype(np.int32)
    return SyntheticRecord(tokens=tokens, loss_mask=np.arange(length) >= length // 2)


def loop_of_single_units(adapter: AttachedAdapter, some: list[SyntheticUnit]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each record by itself, unpadded, by the library's logits; clipped and summed in float64."""
    total, gradients = np.zeros(adapter.layout.length), []
    for unit in some:
        with_answers = [one for one in unit.records if one.loss_mask[1:].any()]
        gradient = np.zeros(adapter.layout.length)
        for one in with_answers:
            tokens = torch.from_numpy(one.tokens.astype(np.int64))
            logits = adapter.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            answers = torch.from_numpy(one.loss_mask[1:])
            loss = F.cross_entropy(logits[answers], tokens[1:][answers])
            found = torch.autograd.grad(loss, adapter.trained)
            gradient += torch.cat([part.reshape(-1).double() for part in found]).numpy() / len(with_answers)
        norm = np.linalg.norm(gradient)
        total += gradient * min(1.0, CLIP * (1.0 - 1e-4) / norm) if norm else 0.0
        gradients.append(gradient)
    return total, gradients


def production(adapter: AttachedAdapter, some: list[SyntheticUnit], packing: Packing | None = None) -> np.ndarray:
    total, _ = training.clipped_sum(adapter, some, terms=TERMS, step=STEP, rng=os.urandom, packing=packing)
    assert total.l2_sensitivity == CLIP
    return total.values * STEP


@pytest.mark.parametrize("train", ["b", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantisation", ["mxfp4", "nf4", "int8", "dense"])
def test_clipped_sums_equal_a_loop_of_single_units(quantisation: str, kind: str, train: str) -> None:
    adapter, some = adapted(quantisation, kind, train), units()
    expected, gradients = loop_of_single_units(adapter, some)
    norms = [float(np.linalg.norm(one)) for one in gradients]
    assert norms[2] == 0.0, "a token alone has no loss"
    assert min(norms[:2] + norms[3:]) > 0.0
    assert max(norms) > CLIP, "clipping must matter here"
    size = np.linalg.norm(expected)
    packing = Packing(units=2, lengths=frozenset({24}))
    one_a_forward, together = production(adapter, some), production(adapter, some, packing)
    assert np.linalg.norm(one_a_forward - expected) <= 1e-6 * size
    assert np.linalg.norm(together - expected) <= 1e-6 * size
    kept = training.unit_gradient(adapter, some[0].records)
    recompute_layers(adapter.model)
    assert np.array_equal(training.unit_gradient(adapter, some[0].records), kept)
    assert np.array_equal(production(adapter, some, packing), together)
    if kind == "experts":
        require_nothing_for_the_lonely(adapter, some)


def require_nothing_for_the_lonely(adapter: AttachedAdapter, some: list[SyntheticUnit]) -> None:
    """The pair of an expert that nobody is routed to gets exactly nothing, and every other one something."""
    records = [unit.records[0] for unit in some if len(unit.records[0].tokens) == 24]
    rows = packed.packed_gradients(adapter, records)  # (U, d)
    rows = np.concatenate([rows, training.unit_gradient(adapter, some[0].records)[None]])
    start = 0
    pairs = [module for module in adapter.model.modules() if isinstance(module, ExpertLoraModule)]
    assert len(pairs) == 1
    for parameter in adapter.trained:
        part = rows[:, start : start + parameter.numel()].reshape(-1, *parameter.shape)  # (U, E, ., .)
        start += parameter.numel()
        assert not part[:, LONELY].any()
        assert np.delete(part, LONELY, axis=1).any(axis=(0, 2, 3)).all()
