"""Dense weights to the released layout: orientation, types, and the reference's reading of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_kernels import mxfp4
from foedus_model.quantize import quantise
from foedus_protocols.errors import CheckpointError

from .conftest import random_state, small_config


def test_expert_rows_are_outputs_and_the_rest_is_bfloat16() -> None:
    config = small_config()
    state = random_state(config)
    tensors = quantise(state, config)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    decoded = mxfp4.decode(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])  # (E, 2N, K)
    dense = state[name].mT
    assert decoded.shape == dense.shape
    error = (decoded - dense).norm() / dense.norm()
    assert 0.05 < float(error) < 0.13  # Gaussian weights in MXFP4: 0.11.
    others = {key: t for key, t in tensors.items() if not key.endswith(("_blocks", "_scales"))}
    assert {t.dtype for t in others.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert "lm_head.weight" in quantise(state, config | {"tie_word_embeddings": False})


def test_a_matrix_that_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.down_proj: .* 33 inputs"):
        quantise({"model.layers.0.mlp.experts.down_proj": torch.zeros(2, 33, 32)}, {})


def test_transformers_decodes_what_was_stored(base: Path, dequantised: Any) -> None:
    config = small_config()
    tensors = quantise(random_state(config), config)
    reference = dequantised(base)
    for index, layer in enumerate(reference.model.layers):
        for matrix in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{index}.mlp.experts.{matrix}"
            want = mxfp4.decode(tensors[f"{prefix}_blocks"], tensors[f"{prefix}_scales"]).mT
            assert torch.equal(getattr(layer.mlp.experts, matrix), want)
