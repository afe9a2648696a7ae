"""The loaded base against transformers' dequantised one, and what the loader refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foedus_kernels import mxfp4
from foedus_kernels.experts import Gate
from foedus_model import presets
from foedus_model.build import _model_config, _on_meta, load_base, specs_of
from foedus_model.experts import QuantisedExperts, gate_of
from foedus_model.quantize import quantise
from foedus_protocols.canonical import digest_file
from foedus_protocols.errors import CheckpointError, ConfigError

from .conftest import random_state, small_config


def _prompts(vocabulary: int, count: int = 20, length: int = 40) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(4))


def test_logits_and_greedy_tokens_equal_the_dequantised_model(base: Path, dequantised: Any) -> None:
    ours, reference = load_base(base), dequantised(base)
    prompts = _prompts(ours.config.vocab_size)
    with torch.inference_mode():
        got, want = (model(input_ids=prompts).logits for model in (ours, reference))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompts)
        tokens = [model.generate(prompts, attention_mask=mask, **options) for model in (ours, reference)]
    assert tokens[0].shape == (20, 40 + 64)
    assert torch.equal(*tokens)


def test_a_padded_batch_equals_its_rows_alone(base: Path) -> None:
    model = load_base(base)
    prompt = _prompts(model.config.vocab_size, count=1, length=12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(prompt)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        alone = model(input_ids=prompt).logits
        together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_the_experts_stay_packed_and_everything_is_frozen(base: Path) -> None:
    model = load_base(base)
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert all(isinstance(module, QuantisedExperts) for module in experts)
    assert all(module.gate_up_proj_blocks.dtype == torch.uint8 for module in experts)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert not model.config.output_router_logits, "the load-balancing loss couples records"
    packed = sum(buffer.nbytes for module in experts for buffer in module.buffers() if buffer.dtype == torch.uint8)
    values = 2 * 16 * (256 * 128 + 128 * 128)
    assert packed == values * 17 // 32  # 4 bits a value and one byte for 32 of them


def test_loading_leaves_the_files_as_they_were(base: Path) -> None:
    before = {path.name: digest_file(path) for path in base.iterdir()}
    model = load_base(base)
    with torch.inference_mode():
        model(input_ids=_prompts(model.config.vocab_size, count=1))
        model.model.layers[0].mlp.experts.down_proj_blocks.zero_()  # A private mapping: the file must not follow.
    assert {path.name: digest_file(path) for path in base.iterdir()} == before


def test_a_dense_checkpoint_loads_alike(write_base: Callable[..., Path], base: Path) -> None:
    config = {key: value for key, value in small_config().items() if key != "quantization_config"}
    packed = load_base(base)
    state = random_state(small_config())
    state.pop("lm_head.weight")
    for name, tensor in state.items():
        state[name] = tensor.to(torch.bfloat16)
    for index, layer in enumerate(packed.model.layers):
        experts = layer.mlp.experts
        for matrix in ("gate_up_proj", "down_proj"):
            blocks, scales = getattr(experts, f"{matrix}_blocks"), getattr(experts, f"{matrix}_scales")
            state[f"model.layers.{index}.mlp.experts.{matrix}"] = mxfp4.decode(blocks, scales).mT
    dense = load_base(write_base("dense", config=config, tensors=state))
    prompts = _prompts(packed.config.vocab_size, count=2)
    with torch.inference_mode():
        got, want = (model(input_ids=prompts).logits for model in (dense, packed))
    # Another memory order of the matrices sums in another order: a few units in the last place of logits up to 30.
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)


def test_bfloat16_loads_packed_and_runs(base: Path) -> None:
    model = load_base(base, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.experts.down_proj_bias.dtype == torch.bfloat16
    with torch.inference_mode():
        logits = model(input_ids=_prompts(model.config.vocab_size, count=1)).logits
    assert bool(torch.isfinite(logits).all())


def test_float16_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="float16"):
        load_base(base, dtype=torch.float16)


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without("model.norm.weight"), "missing model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "not expected extra"),
        (_changed("model.norm.weight", lambda t: t[:-1]), r"expected the shape \(128,\), got \(127,\)"),
        (_changed(BLOCKS, lambda t: t.view(torch.int8)), "expected uint8, got torch.int8"),
        (_changed("model.norm.weight", lambda t: t.half()), "got torch.float16"),
        (_changed(SCALES, lambda t: t.clone().fill_(255)), "scale bytes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    write_base: Callable[..., Path], damage: Callable[[dict[str, torch.Tensor]], None], text: str
) -> None:
    config = small_config()
    tensors = quantise(random_state(config), config)
    damage(tensors)
    with pytest.raises(CheckpointError, match=text):
        load_base(write_base(tensors=tensors))


def test_the_activation_has_the_models_own_constants_where_a_configuration_has_none() -> None:
    """transformers 5.17 has no field for them, and keeps one that a file has."""
    assert gate_of(SimpleNamespace()) == Gate(alpha=1.702, limit=7.0)
    assert gate_of(SimpleNamespace(swiglu_limit=5.0)) == Gate(alpha=1.702, limit=5.0)
    assert gate_of(SimpleNamespace(swiglu_alpha=1.5, swiglu_limit=5.0)) == Gate(alpha=1.5, limit=5.0)
    for wrong in ("7", True, 0, -7.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match="swiglu_limit as a number above 0"):
            gate_of(SimpleNamespace(swiglu_limit=wrong))


def test_an_unknown_layer_type_is_refused(write_base: Callable[..., Path]) -> None:
    tensors = quantise(random_state(small_config()), small_config())
    config = small_config(layer_types=["sliding_attention", "dilated_attention"])
    folder = write_base(config=config, tensors=tensors)
    with pytest.raises(ConfigError, match="got dilated_attention"):
        load_base(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers from 1 to 4096"),
        ({"vocab_size": 2**62}, "vocab_size from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads from 1 to"),
        ({"num_key_value_heads": 3}, "query heads in groups of 3"),
        ({"num_experts_per_tok": 99}, "at most 16 experts a token"),
        ({"layer_types": 5}, "a list of names"),
        ({"layer_types": [["a"]] * 2}, "a list of names"),
        ({"layer_types": ["full_attention"]}, "2 layer_types"),
        ({"swiglu_limit": "7"}, "a gpt-oss configuration"),
        ({"swiglu_limit": -7.0}, "a gpt-oss configuration"),
        ({"rope_parameters": {"rope_type": "evil", "rope_theta": 1.0}}, "a gpt-oss configuration"),
        ({"pad_token_id": 10**9}, "a gpt-oss configuration"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    """It may be somebody else's: nothing is built from it, and nothing of the library's own gets out."""
    with pytest.raises(ConfigError, match=said):
        specs_of(small_config(**changes))


def test_another_architecture_is_refused(write_base: Callable[..., Path]) -> None:
    config = small_config()
    folder = write_base(config=config | {"model_type": "mixtral"}, tensors=quantise(random_state(config), config))
    with pytest.raises(ConfigError, match="mixtral"):
        load_base(folder)


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", 20.91), ("gpt-oss-120b", 116.83)])
def test_released_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = _on_meta(_model_config(presets.preset(name)), "dense")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="nano"):
        presets.preset("nano")


def test_tiny_is_small_and_fits_the_format() -> None:
    model = _on_meta(_model_config(presets.preset("tiny")), "mxfp4")
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
