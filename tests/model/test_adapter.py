"""The attached adapter against PEFT on transformers' dequantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foedus_model.adapter import AttachedAdapter, LoraLinear, attach
from foedus_model.build import load_base
from foedus_protocols.canonical import digest_file
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import Layout, Tensor, adapter_layout, fixed_tensors
from foedus_protocols.peft_folder import write_peft
from peft import PeftModel
from torch.nn import functional

RANK, ALPHA, SEED = 4, 8, "a public seed"


@pytest.fixture(scope="module")
def layout(base: Path) -> Layout:
    return adapter_layout(json.loads((base / "config.json").read_text()), targets="attention", rank=RANK)


@pytest.fixture(scope="module")
def vector(layout: Layout) -> np.ndarray:
    return (np.random.default_rng(7).normal(size=layout.length) * 0.05).astype(np.float32)


@pytest.fixture
def attached(base: Path, layout: Layout) -> AttachedAdapter:
    return attach(load_base(base), layout, seed=SEED, alpha=ALPHA, rank=RANK)


@pytest.fixture(scope="module")
def reference(base: Path, layout: Layout, vector: np.ndarray, dequantised: Any, tmp_path_factory: Any) -> PeftModel:
    folder = tmp_path_factory.mktemp("variant")
    write_peft(folder, layout=layout, vector=vector, seed=SEED, rank=RANK, alpha=ALPHA, base_name="small")
    return PeftModel.from_pretrained(dequantised(base), folder, is_trainable=True).eval()


def _ids(count: int = 20, length: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(8))


def _loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_zero_trained_matrices_change_nothing(base: Path, attached: AttachedAdapter) -> None:
    ids = _ids(2)
    with torch.inference_mode():
        assert torch.equal(attached.model(input_ids=ids).logits, load_base(base)(input_ids=ids).logits)


def test_logits_and_greedy_tokens_equal_peft(
    attached: AttachedAdapter, reference: PeftModel, vector: np.ndarray
) -> None:
    ids = _ids()
    with torch.inference_mode():
        without = attached.model(input_ids=ids).logits
        attached.load_vector(vector)
        got, want = attached.model(input_ids=ids).logits, reference(input_ids=ids).logits
        assert float((want - without).abs().max()) > 0.1, "the adapter must matter for this comparison to mean anything"
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "do_sample": False}
        tokens = [model.generate(input_ids=ids, eos_token_id=None, **options) for model in (attached.model, reference)]
    assert torch.equal(*tokens)


def test_gradients_equal_peft(
    attached: AttachedAdapter, reference: PeftModel, vector: np.ndarray, layout: Layout
) -> None:
    attached.load_vector(vector)
    got = torch.autograd.grad(_loss(attached.model, _ids(2)), attached.trained)
    named = dict(reference.named_parameters())
    wanted = [named[tensor.name.replace(".weight", ".default.weight")] for tensor in layout.trained()]
    want = torch.autograd.grad(_loss(reference, _ids(2)), wanted)
    for ours, theirs in zip(got, want, strict=True):
        assert float(theirs.norm()) > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_the_vector_comes_back_bit_for_bit(attached: AttachedAdapter, vector: np.ndarray) -> None:
    attached.load_vector(vector)
    assert attached.vector().dtype == np.float32
    assert np.array_equal(attached.vector(), vector)


def test_only_the_trained_matrices_require_a_gradient(attached: AttachedAdapter, layout: Layout) -> None:
    trainable = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in attached.trained}
    assert [tuple(parameter.shape) for parameter in attached.trained] == [t.shape for t in layout.trained()]


def test_every_trained_matrix_gets_a_gradient_and_the_base_stays(base: Path, layout: Layout) -> None:
    before = {path.name: digest_file(path) for path in base.iterdir()}
    adapter = attach(load_base(base), layout, seed=SEED, alpha=ALPHA, rank=RANK)
    frozen = {name: t.clone() for name, t in adapter.model.state_dict().items() if "lora_B" not in name}
    optimiser = torch.optim.SGD(adapter.trained, lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        _loss(adapter.model, _ids(1)).backward()
        assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in adapter.trained)
        optimiser.step()
    assert float(np.linalg.norm(adapter.vector())) > 0
    state = adapter.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    assert {path.name: digest_file(path) for path in base.iterdir()} == before


def test_fixed_matrices_come_from_the_seed(attached: AttachedAdapter, layout: Layout) -> None:
    module = attached.model.model.layers[0].self_attn.q_proj
    assert isinstance(module, LoraLinear)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert np.array_equal(module.lora_A.weight.numpy(), fixed_tensors(layout, SEED)[name])
    assert [type(child) for child in module.children()] == [torch.nn.Linear] * 3


def _layout_with(name: str, shape: tuple[int, int] = (RANK, 128), *, pair: bool = True) -> Layout:
    first = Tensor(name=f"base_model.model.{name}.lora_A.weight", shape=shape, offset=0, trained=False)
    second = Tensor(name=f"base_model.model.{name}.lora_B.weight", shape=(128, RANK), offset=0, trained=True)
    return Layout(tensors=(first, second) if pair else (first,))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (_layout_with("model.layers.9.self_attn.q_proj"), "layers.9.self_attn.q_proj, which the base does not have"),
        (_layout_with("model.layers.0.mlp.experts.gate_up_proj"), "does not have"),
        (_layout_with("model.layers.0.mlp.experts"), "QuantisedExperts and not a plain linear"),
        (_layout_with("model.layers.0.self_attn.q_proj", (RANK, 64)), r"expected the shape \(4, 128\), got \(4, 64\)"),
        (_layout_with("model.layers.0.self_attn.q_proj", pair=False), "only lora_A"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_and_leaves_the_base(base: Path, bad: Layout, text: str) -> None:
    model = load_base(base)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(CheckpointError, match=text):
        attach(model, bad, seed=SEED, alpha=ALPHA, rank=RANK)
    assert [name for name, _ in model.named_modules()] == before


def test_a_second_adapter_is_refused(attached: AttachedAdapter, layout: Layout) -> None:
    with pytest.raises(CheckpointError, match="expected a frozen base"):
        attach(attached.model, layout, seed=SEED, alpha=ALPHA, rank=RANK)
    attached.model.requires_grad_(False)
    with pytest.raises(CheckpointError, match="already holds an adapter"):
        attach(attached.model, layout, seed=SEED, alpha=ALPHA, rank=RANK)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_refused(attached: AttachedAdapter, vector: np.ndarray, value: float) -> None:
    bad = vector.copy()
    bad[3] = value
    with pytest.raises(CheckpointError, match="finite"):
        attached.load_vector(bad)
    assert not attached.vector().any(), "a refused vector leaves the adapter as it was"


def test_a_vector_of_another_length_is_refused(attached: AttachedAdapter, vector: np.ndarray) -> None:
    with pytest.raises(CheckpointError):
        attached.load_vector(vector[:-1])
