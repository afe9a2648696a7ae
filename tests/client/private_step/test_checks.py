"""The checks accept what is right and say what is wrong. `test_mechanism.py` runs them on broken programs.

Random inputs here come from fixed seeds: these tests cannot raise a false alarm.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from foedus_client import checks, training
from foedus_client.privacy import BoundedSum, StepTerms
from foedus_client.synthetic import synthetic_units
from foedus_model import presets
from foedus_model.adapter import AttachedAdapter, attach
from foedus_protocols.errors import PrivacyCheckFailed
from foedus_protocols.layout import adapter_layout
from transformers import GptOssConfig, GptOssForCausalLM

STDDEV, RESOLUTION = 0.05, 0.05 / 1500


def gaussian(seed: int, factor: float = 1.0, length: int = 24_576):
    """A source of noise vectors on the grid."""
    rng = np.random.default_rng(seed)
    return lambda: (np.rint(rng.standard_normal(length) * factor * STDDEV / RESOLUTION) * RESOLUTION).astype(np.float32)


def test_noise_check_accepts_the_stated_stddev() -> None:
    for seed in range(5):
        ratio = checks.noise_check(gaussian(seed), stddev=STDDEV, resolution=RESOLUTION)
        assert ratio == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2 / 3, 0.9, 1.1, 1.5])
def test_noise_check_rejects_another_stddev(factor: float) -> None:
    with pytest.raises(PrivacyCheckFailed, match=r"variance|odd"):
        checks.noise_check(gaussian(1, factor), stddev=STDDEV, resolution=RESOLUTION)


@pytest.mark.parametrize("named", ["kurtosis", "mean", "correlation", "odd", "not a number"])
def test_noise_check_rejects_other_shapes_and_repeats(named: str) -> None:
    rng, right, kept = np.random.default_rng(4), gaussian(6), gaussian(5)()
    sources = {
        "kurtosis": lambda: (rng.laplace(size=40_000) * STDDEV / math.sqrt(2)).astype(np.float32),
        "mean": lambda: right() + np.float32(0.05 * STDDEV),
        "correlation": lambda: kept,
        "odd": lambda: (np.rint(right() / RESOLUTION / 2) * 2 * RESOLUTION).astype(np.float32),
        "not a number": lambda: np.full(40_000, np.nan, np.float32),
    }
    with pytest.raises(PrivacyCheckFailed, match="mean" if named == "not a number" else named):
        checks.noise_check(sources[named], stddev=STDDEV, resolution=RESOLUTION)


def integers(values) -> BoundedSum:
    return BoundedSum(values=np.asarray(values, np.int64), grid=0.5, l2_sensitivity=2.0)


def test_sensitivity_check_compares_integers_at_the_limit() -> None:
    """A clip of 2.0 on a grid of 0.5 is 4 grid units: a move of 4 passes, of sqrt(17) does not."""

    def sum_of(units):
        return integers(np.sum([*units, np.zeros(2)], axis=0))

    assert checks.sensitivity_check(sum_of, [(4, 0), (0, 4), (1, 1)], l2_clip_norm=2.0) == 1.0
    with pytest.raises(PrivacyCheckFailed, match="at most the clip"):
        checks.sensitivity_check(sum_of, [(4, 1), (0, 4), (1, 1)], l2_clip_norm=2.0)


def test_sensitivity_check_sees_a_small_coupling() -> None:
    def coupled(units):
        total = np.sum([*units, np.zeros(2)], axis=0)
        return integers(total + (np.array([0, len(units)]) if len(units) > 1 else 0))

    with pytest.raises(PrivacyCheckFailed, match="other change"):
        checks.sensitivity_check(coupled, [(3, 0), (2, 0), (1, 1)], l2_clip_norm=2.0)


def test_sensitivity_check_refuses_a_sum_that_states_another_bound() -> None:
    with pytest.raises(PrivacyCheckFailed, match="sensitivity"):
        checks.sensitivity_check(lambda _units: integers([0, 0]), [1, 2, 3], l2_clip_norm=1.0)


def test_squared_norms_beyond_64_bits_are_exact() -> None:
    assert checks._squared(np.array([2**40, -(2**40)], np.int64)) == 2**81


def test_gradient_check_names_the_tensor_that_does_not_train(stand_in) -> None:
    unit = synthetic_units(vocabulary=96, max_tokens=16, max_records=2, rng=os.urandom)[0]
    checks.gradient_check(stand_in, unit)
    layer = stand_in.model.model.layers[1].self_attn
    with torch.no_grad():
        layer.v_proj.a.weight.zero_()
    with pytest.raises(PrivacyCheckFailed, match=r"zero for model\.layers\.1\.self_attn\.v_proj\.b\.weight"):
        checks.gradient_check(stand_in, unit)
    with torch.no_grad():
        layer.v_proj.a.weight.fill_(float("nan"))
    with pytest.raises(PrivacyCheckFailed, match="not finite"):
        checks.gradient_check(stand_in, unit)


def test_synthetic_units_have_the_runs_shapes() -> None:
    units = synthetic_units(vocabulary=50, max_tokens=64, max_records=4, rng=os.urandom)
    lengths = [[len(record.tokens) for record in unit.records] for unit in units]
    assert lengths == [[64] * 4, [16], [32, 32], [8]]
    for unit in units:
        for record in unit.records:
            assert ((record.tokens >= 0) & (record.tokens < 50)).all()
            assert record.loss_mask.any()
            assert not record.loss_mask[0]


def test_preflight_passes_on_the_default_adapter_of_the_tiny_shape() -> None:
    """foedus_model's own adapter, d = 24,576; random weights."""
    config = presets.tiny(vocab_size=256)
    described = {name: value for name, value in config.items() if name != "quantization_config"}
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(**described)).requires_grad_(False).eval()
    adapter = attach(model, adapter_layout(config, targets="attention", rank=16), seed="test", alpha=32.0, rank=16)
    terms = StepTerms(
        l2_clip_norm=0.1, noise_multiplier=0.5, sampling_prob=0.1, expected_units=64.0, max_records_per_unit=2
    )
    assert training.vector_length(adapter) == 24_576
    noise = training.noise_table(terms, 24_576)
    figures = checks.preflight(adapter, terms=terms, noise=noise, max_tokens=32)
    assert figures["move_over_clip"] <= 1.0
    assert figures["noise_over_stated"] == pytest.approx(1.0, abs=0.04)


KINDS = {
    "attention": {"targets": "attention"},
    "experts-shared": {"targets": "experts-shared", "layers": [1]},
    "experts": {"targets": "experts", "layers": [0]},
    "attention, both": {"targets": "attention", "train": "both"},
    "experts-shared, both": {"targets": "experts-shared", "train": "both"},
    "experts, both": {"targets": "experts", "layers": [1], "train": "both"},
}


def small_adapter(**terms) -> AttachedAdapter:
    """An adapter on two layers of six experts, of which a token takes two; expert 5 of each layer is never chosen."""
    config = presets.tiny(vocab_size=96) | {"num_hidden_layers": 2, "num_local_experts": 6, "hidden_size": 64}
    config |= {"layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 32}
    described = {name: value for name, value in config.items() if name != "quantization_config"}
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(**described)).requires_grad_(False).eval()
    for layer in model.model.layers:
        layer.mlp.router.bias[5] = -100.0
    return attach(model, adapter_layout(config, rank=2, **terms), seed="test", alpha=4.0, rank=2)


@pytest.mark.parametrize("terms", KINDS.values(), ids=KINDS)
def test_reach_check_passes_on_every_kind_and_leaves_all_as_it_was(terms) -> None:
    adapter = small_adapter(**terms)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    checks.reach_check(adapter, max_tokens=32)
    after = adapter.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_reach_check_needs_to_force_the_routing() -> None:
    """What the router sends nowhere near expert 5 leaves its pair without a gradient."""
    adapter = small_adapter(targets="experts", layers=[0])
    unit = synthetic_units(vocabulary=96, max_tokens=32, max_records=1, rng=os.urandom)[0]
    gradient = training.unit_gradient(adapter, unit.records)
    first = adapter.layout.trained()[0]
    by_expert = gradient[: first.size].reshape(first.shape)
    assert by_expert[0].any()
    assert not by_expert[5].any()
    checks.reach_check(adapter, max_tokens=32)


@pytest.mark.parametrize(
    ("terms", "module", "named"),
    [
        (KINDS["attention"], "layers.1.self_attn.k_proj.lora_A.weight", r"1\.self_attn\.k_proj\.lora_B\.weight: check"),
        (KINDS["experts-shared"], "layers.1.mlp.experts.lora.down_proj_A", r"1\.mlp\.experts\.lora_B\.weight: check"),
        (
            KINDS["experts"],
            "layers.0.mlp.experts.lora.gate_up_proj_A",
            r"zero for .*0\.mlp\.experts\.base_layer\.lora_B\.weight, expert 4: check",
        ),
    ],
    ids=["attention", "experts-shared", "experts"],
)
def test_reach_check_names_the_matrix_that_does_not_train(terms, module, named) -> None:
    adapter = small_adapter(**terms)
    parameter = adapter.model.model.get_parameter(module)
    with torch.no_grad():
        (parameter[4] if parameter.dim() == 3 and parameter.shape[0] > 1 else parameter).zero_()
    with pytest.raises(PrivacyCheckFailed, match=named):
        checks.reach_check(adapter, max_tokens=32)
    assert not adapter.vector().any()


@pytest.mark.parametrize(("value", "said"), [(0.0, "zero"), (math.nan, "not finite")])
def test_reach_check_looks_at_a_after_one_step(monkeypatch, value, said) -> None:
    """A back end that forgets the gradient of one expert's A, or makes no number of it."""
    adapter = small_adapter(targets="experts", layers=[1], train="both")
    start = adapter.vector()
    wrong = next(tensor for tensor in adapter.layout.trained() if ".lora_A." in tensor.name)

    def gradient_of(*arguments):
        gradient = training.unit_gradient(*arguments)
        gradient[wrong.offset : wrong.offset + wrong.size].reshape(wrong.shape)[3] = value
        return gradient

    monkeypatch.setattr(checks, "unit_gradient", gradient_of)
    with pytest.raises(PrivacyCheckFailed, match=rf"{said} for .*base_layer\.lora_A\.weight, expert 3"):
        checks.reach_check(adapter, max_tokens=32)
    assert np.array_equal(adapter.vector(), start)


def test_accountants_are_compared() -> None:
    """dp-accounting's PLD gives 9.47 for this event (facts of the design), Opacus' PRV 9.48."""
    event = {"noise_multiplier": 2.0, "sampling_prob": 0.5, "steps": 50, "delta": 1e-5}
    assert checks.cross_check(**event, pld_epsilon=9.47) == pytest.approx(9.48, abs=0.02)
    for wrong in (9.35, 9.6, math.nan):
        with pytest.raises(PrivacyCheckFailed, match="Opacus"):
            checks.cross_check(**event, pld_epsilon=wrong)
