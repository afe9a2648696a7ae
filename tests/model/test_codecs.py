"""Bases in every codec: loaded from files, beside the dense model of the decoded matrices."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_kernels import int8, mxfp4, nf4
from foedus_model.adapter import attach
from foedus_model.build import load_base
from foedus_model.codecs import CODECS, codec
from foedus_model.linear import QuantisedLinear
from foedus_model.quantize import quantise, quantised_config
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_manifest
from transformers import GptOssConfig, GptOssForCausalLM

from .conftest import random_state, small_config

STACKS = {"mxfp4": mxfp4.Mxfp4Weights, "nf4": nf4.Nf4Weights, "int8": int8.Int8Weights}
NAMES = sorted(STACKS)


@pytest.fixture
def stored(write_base: Callable[..., Path]) -> Callable[[str], Path]:
    """Writes the small random base in a codec."""

    def write(name: str) -> Path:
        config = quantised_config(small_config(), name)
        return write_base(name, config=config, tensors=quantise(random_state(config), config, name))

    return write


def _dense(model: Any) -> GptOssForCausalLM:
    """transformers' model with the decoded matrices of ours."""
    config = GptOssConfig(**{key: value for key, value in small_config().items() if key != "quantization_config"})
    config._attn_implementation = "eager"
    dense = GptOssForCausalLM(config)
    state = dict(dense.state_dict())
    for name, tensor in model.state_dict().items():
        if name in state:
            state[name] = tensor
    for index, layer in enumerate(model.model.layers):
        packed = layer.mlp.experts.packed()
        for matrix, stack in (("gate_up_proj", packed.gate_up), ("down_proj", packed.down)):
            values = stack.decode(range(stack.shape[0]), torch.float32)
            state[f"model.layers.{index}.mlp.experts.{matrix}"] = values.mT
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, matrix)
            if isinstance(linear, QuantisedLinear):
                state[f"model.layers.{index}.self_attn.{matrix}.weight"] = linear.decode(torch.float32)
    dense.load_state_dict(state)
    return dense.requires_grad_(False).eval()


def _prompts(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_the_gradient_of_the_input_equal_the_dense_models(stored: Callable[[str], Path], name: str) -> None:
    folder = stored(name)
    assert read_manifest(folder).quantisation == name
    ours = load_base(folder)
    reference = _dense(ours)
    embedded = ours.get_input_embeddings()(_prompts(ours.config.vocab_size))
    found = []
    for model in (ours, reference):
        inputs = embedded.clone().requires_grad_(True)
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), inputs)
        found.append((logits.detach(), gradient))
    (got, got_gradient), (want, want_gradient) = found
    assert float(want.abs().max()) > 5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=0, atol=1e-4 * float(want_gradient.abs().max()))


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4.25), ("nf4", 4.5), ("int8", 8.25)])
def test_what_is_stored_stays_stored_and_frozen(stored: Callable[[str], Path], name: str, bits: float) -> None:
    model = load_base(stored(name))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    packed = model.model.layers[0].mlp.experts.packed()
    assert 8 * packed.gate_up.nbytes == bits * 16 * 256 * 128
    quantised = isinstance(model.model.layers[0].self_attn.q_proj, QuantisedLinear)
    assert quantised == CODECS[name].linears
    assert isinstance(model.model.layers[0].mlp.router.weight, torch.nn.Parameter)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_decoded_outlives_a_call(
    stored: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = load_base(stored(name))
    decode, made = STACKS[name].decode, []

    def watched(self: Any, experts: Any, dtype: torch.dtype) -> torch.Tensor:
        values: torch.Tensor = decode(self, experts, dtype)
        made.append(weakref.ref(values.untyped_storage()))
        return values

    monkeypatch.setattr(STACKS[name], "decode", watched)
    embedded = model.get_input_embeddings()(_prompts(model.config.vocab_size)).requires_grad_(True)
    loss = model(inputs_embeds=embedded, use_cache=False).logits.square().mean()
    forward = len(made)
    gc.collect()
    assert forward > 0
    assert not any(values() is not None for values in made), "the graph holds decoded weights"
    loss.backward()
    gc.collect()
    assert len(made) > forward, "the backward pass decodes again"
    assert not any(values() is not None for values in made)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_an_adapter_on_quantised_linears_has_the_dense_models_gradients(
    stored: Callable[[str], Path], name: str
) -> None:
    ours = load_base(stored(name))
    gradients = []
    for model in (ours, _dense(ours)):
        layout = adapter_layout(small_config(), targets="attention", rank=4, train="both")
        adapted = attach(model, layout, seed="ab" * 32, alpha=8, rank=4)
        generator = torch.Generator().manual_seed(1)
        for parameter in adapted.trained:
            parameter.data.normal_(std=0.05, generator=generator)
        tokens = _prompts(model.config.vocab_size)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, adapted.trained))
    assert len(gradients[0]) == 2 * 2 * 4
    for got, want in zip(*gradients, strict=True):
        assert float(want.abs().max()) > 0
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_a_linear_layer_has_the_bits_of_its_decoded_matrix() -> None:
    dense = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    for name in NAMES:
        linear = QuantisedLinear(64, 48, name)
        for (suffix, _, _), tensor in zip(codec(name).parts, codec(name).encode(dense), strict=True):
            setattr(linear, f"weight_{suffix}", tensor)
        torch.nn.init.ones_(linear.bias)
        inputs = torch.randn(3, 5, 64, requires_grad=True)
        got = linear(inputs)
        want = torch.nn.functional.linear(inputs, linear.decode(torch.float32), linear.bias)
        assert torch.equal(got, want)
        assert name in repr(linear)
        assert linear.bias.grad is None


def test_a_width_that_a_codec_cannot_store_is_refused() -> None:
    with pytest.raises(CheckpointError, match="weight: expected inputs in multiples of 64 for nf4, got 96"):
        QuantisedLinear(96, 32, "nf4")


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(CheckpointError, match="mxfp4, nf4, int8, got 'fp8'"):
        codec("fp8")


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_scales_that_are_not_finite_are_refused(write_base: Callable[..., Path], name: str) -> None:
    config = quantised_config(small_config(), name)
    tensors = quantise(random_state(config), config, name)
    tensors["model.layers.1.self_attn.k_proj.weight_scales"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_scales: expected finite scales"):
        load_base(write_base(config=config, tensors=tensors))
