"""Streaming on a CUDA device against the same model at rest there, by pinned pages and by buffers. Without files.

`make gpu` runs it where there is a GPU; the case on a CPU shows in `make test` that the comparison itself is sound.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
from foedus_model import stream_ring
from foedus_model.adapter import attach
from foedus_model.experts import QuantisedExperts
from foedus_model.loss import Batch, token_losses
from foedus_model.streaming import RingShape, stream_experts
from foedus_protocols.layout import adapter_layout
from support.quantised import VOCABULARY, small_model

SHAPE = RingShape(per_chunk=2, chunks=4, slots=5)


def mean(losses: torch.Tensor, owners: torch.Tensor, records: int) -> torch.Tensor:
    return losses.mean()


@pytest.mark.parametrize("way", ["pinned in place", "through buffers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_streamed_model_has_the_gradients_of_one_at_rest(
    device: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_ring, "host_free", lambda: 0 if way == "through buffers" else 1 << 50)
    model = small_model("mxfp4").to(device=device, dtype=dtype)
    layout = adapter_layout(model.config.to_dict(), targets="experts-shared", rank=4)
    adapter = attach(model, layout, seed="s", alpha=8.0, rank=4)
    adapter.load_vector((np.random.default_rng(7).normal(size=layout.length) * 0.05).astype(np.float32))
    at_rest = copy.deepcopy(adapter)
    for module in model.modules():
        if isinstance(module, QuantisedExperts):
            module._buffers.update({name: tensor.cpu() for name, tensor in module.stored().items()})
    tokens = torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(8)).to(device)
    batches = [Batch(tokens=row[None], answers=torch.ones(1, 39, dtype=torch.bool, device=device)) for row in tokens]
    expected = np.stack([_gradient(at_rest, batch) for batch in batches])
    streamer = stream_experts(model, adapter.trained, units=3, shape=SHAPE, whole=True)
    try:
        found = streamer.gradients(batches, mean)
        again = streamer.gradients(batches[::-1], mean)[::-1]
        plain = np.stack([_gradient(adapter, batch) for batch in batches])
    finally:
        streamer.close()
    scale = np.abs(expected).max()
    assert scale > 1e-3
    # On a GPU a sum by index may be taken in any order; nothing else differs.
    bound = 0.0 if device == "cpu" else scale * (1e-5 if dtype == torch.float32 else 1e-2)
    for one in (found, again, plain):
        assert np.abs(one - expected).max() <= bound


def _gradient(adapter: Any, batch: Batch) -> np.ndarray:
    losses, _ = token_losses(adapter.model, batch)
    found = torch.autograd.grad(losses.mean(), adapter.trained)
    return torch.cat([one.reshape(-1).float() for one in found]).cpu().numpy()
