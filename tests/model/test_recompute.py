"""Gradient checkpointing: the same bits for less memory, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foedus_model import recompute
from foedus_model.adapter import attach
from foedus_model.build import load_base
from foedus_model.recompute import recompute_layers
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_config

TOKENS = torch.arange(48)[None] * 5 % 256


@pytest.fixture
def adapter(base: Path):
    torch.manual_seed(0)
    attached = attach(
        load_base(base), adapter_layout(read_config(base), targets="attention", rank=4), seed="s", alpha=8.0, rank=4
    )
    for parameter in attached.trained:
        torch.nn.init.normal_(parameter, std=0.05)
    return attached


def gradients_and_kept_bytes(adapter) -> tuple[list[torch.Tensor], int]:
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = adapter.model.model(input_ids=TOKENS, use_cache=False).last_hidden_state
    return list(torch.autograd.grad(hidden.square().mean(), adapter.trained)), sum(kept.values())


def test_gradients_are_equal_to_the_bit_and_less_is_kept(adapter) -> None:
    expected, whole = gradients_and_kept_bytes(adapter)
    recompute_layers(adapter.model)
    recompute_layers(adapter.model)
    found, kept = gradients_and_kept_bytes(adapter)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        assert torch.equal(one, other)
    assert kept < whole / 4


def test_inputs_of_layers_wait_on_the_host_and_no_bit_changes(adapter, monkeypatch) -> None:
    expected, _ = gradients_and_kept_bytes(adapter)
    waiting = []
    hooks = recompute.save_on_cpu

    class Watched(hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            own = self.pack_hook
            # torch 2.11 keeps a tensor of nothing beside each.
            self.pack_hook = lambda tensor: (waiting.append(tensor) if tensor.numel() else None) or own(tensor)

    monkeypatch.setattr(recompute, "save_on_cpu", Watched)
    recompute_layers(adapter.model)
    recompute_layers(adapter.model, offload=True)
    found, _ = gradients_and_kept_bytes(adapter)
    assert [tensor.shape for tensor in waiting] == [(1, 48, 128)] * 2, "a layer's input each, and nothing else"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with recompute.kept(adapter.model.model.layers[0]):
        adapter.model.model(input_ids=TOKENS, use_cache=False)
    assert len(waiting) == 2 + 1, "a layer that is kept is not computed again"


def test_a_layer_runs_twice_with_gradients_and_once_without(adapter, monkeypatch) -> None:
    calls = []
    mlp = adapter.model.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda *args: calls.append(1) or forward(*args))
    recompute_layers(adapter.model)
    gradients_and_kept_bytes(adapter)
    assert len(calls) == 2
    with torch.no_grad():
        adapter.model(input_ids=TOKENS)
    assert len(calls) == 3


def test_a_cache_is_filled_once(adapter) -> None:
    whole = adapter.model(input_ids=TOKENS, use_cache=False).logits
    recompute_layers(adapter.model)
    first = adapter.model(input_ids=TOKENS[:, :40], use_cache=True)
    second = adapter.model(input_ids=TOKENS[:, 40:], past_key_values=first.past_key_values, use_cache=True)
    second.logits.sum().backward()
    assert first.past_key_values.get_seq_length() == TOKENS.shape[1]
    assert torch.allclose(second.logits, whole[:, 40:], atol=1e-5)
