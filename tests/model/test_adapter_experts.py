"""Adapters of every kind on every codec, against autograd of the decoded model and against PEFT."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foedus_model.adapter import AttachedAdapter, DenseExperts, ExpertLoraModule, attach
from foedus_model.build import load_base
from foedus_model.codecs import codec
from foedus_model.experts import QuantisedExperts
from foedus_model.linear import quantise_linears
from foedus_protocols.canonical import digest_file
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import Layout, Tensor, Vector, adapter_layout, fixed_tensors, unflatten
from foedus_protocols.peft_folder import folder_layout, read_peft, write_peft
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call
from torch.nn import functional
from transformers import GptOssForCausalLM

RANK, ALPHA, SEED = 4, 8, "a public seed"
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "experts-shared": {"targets": "experts-shared"},
    "experts": {"targets": "experts", "layers": [1]},
}

Dequantised = Callable[[Path], GptOssForCausalLM]


@pytest.fixture(scope="module")
def config(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base / "config.json").read_text())
    return found


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def layout(request: pytest.FixtureRequest, config: dict[str, Any]) -> Layout:
    return adapter_layout(config, rank=RANK, train="both", **request.param)


def some_vector(layout: Layout) -> Vector:
    return (np.random.default_rng(7).normal(size=layout.length) * 0.05).astype(np.float32)


def some_ids(count: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(8))


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def require_equal(got: torch.Tensor, want: torch.Tensor, without: torch.Tensor) -> None:
    """Equal within rounding, a hundred-thousandth of the change: PEFT adds B A to W before the product."""
    change = float((want - without).abs().max())
    assert change > 0.5, "the adapter must matter for this comparison to mean anything"
    assert float((got - want).abs().max()) < 1e-5 * max(1.0, change)


def attached_to(model: GptOssForCausalLM, layout: Layout, vector: Vector | None = None) -> AttachedAdapter:
    adapter = attach(model, layout, seed=SEED, alpha=ALPHA, rank=RANK)
    if vector is not None:
        adapter.load_vector(vector)
    return adapter


def pair_of_models(base: Path, quantisation: str, dequantised: Dequantised) -> tuple[GptOssForCausalLM, Any]:
    """A model in a codec, and transformers' model of the decoded matrices."""
    dense = dequantised(base)
    if quantisation == "mxfp4":
        return load_base(base), dense
    ours = copy.deepcopy(dense)
    if quantisation == "dense":
        return ours, dense
    kind = codec(quantisation)
    quantise_linears(ours, quantisation)
    for layer, reference in zip(ours.model.layers, dense.model.layers, strict=True):
        experts = QuantisedExperts(ours.config, quantisation)
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(reference.mlp.experts, name)  # (E, K, N)
            stored = kind.encode(stack.detach().mT)
            for (suffix, _, _), tensor in zip(kind.parts, stored, strict=True):
                experts.register_buffer(f"{name}_{suffix}", tensor)
            experts.register_buffer(f"{name}_bias", getattr(reference.mlp.experts, f"{name}_bias").detach())
            stack.copy_(kind.weights(*stored).decode(range(stack.shape[0]), torch.float32).mT)
        layer.mlp.experts = experts
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, decoded = getattr(layer.self_attn, name), getattr(reference.self_attn, name)
            for (suffix, _, _), tensor in zip(kind.parts, kind.encode(decoded.weight.detach()), strict=True):
                linear.register_buffer(f"weight_{suffix}", tensor)
            linear.bias = decoded.bias
            decoded.weight.copy_(linear.decode(torch.float32))
    return ours, dense


def reference_gradients(dense: Any, layout: Layout, values: dict[str, Vector], ids: torch.Tensor) -> list[torch.Tensor]:
    """Autograd through ``W + scale * B A``, built whole."""
    leaves = {name: torch.tensor(matrix, requires_grad=True) for name, matrix in values.items()}
    built: dict[str, torch.Tensor] = {}
    for name, a in leaves.items():
        if ".lora_A." not in name:
            continue
        product = ALPHA / RANK * leaves[name.replace(".lora_A.", ".lora_B.")] @ a  # (..., out, in)
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if product.dim() == 2:
            path = f"{path}.weight"
        else:
            product = product.mT
            head, _, gate_up = path.partition(".base_layer")
            path = f"{head}.gate_up_proj" if f"{head}{gate_up}" != path else f"{head}.down_proj"
        built[path] = dense.get_parameter(path).detach() + product
    loss = loss_of(functional_call(dense, built, kwargs={"input_ids": ids}).logits, ids)
    return list(torch.autograd.grad(loss, [leaves[tensor.name] for tensor in layout.trained()]))


@pytest.mark.parametrize("quantisation", ["mxfp4", "nf4", "int8", "dense"])
def test_gradients_equal_autograd_of_the_decoded_model(
    base: Path, layout: Layout, quantisation: str, dequantised: Dequantised
) -> None:
    with torch.no_grad():
        ours, dense = pair_of_models(base, quantisation, dequantised)
    vector, ids = some_vector(layout), some_ids()
    adapter = attached_to(ours, layout, vector)
    got = torch.autograd.grad(loss_of(ours(input_ids=ids).logits, ids), adapter.trained)
    want = reference_gradients(dense, layout, unflatten(layout, vector), ids)
    for tensor, mine, theirs in zip(layout.trained(), got, want, strict=True):
        assert mine.shape == tensor.shape
        assert float(theirs.norm()) > 0
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5, tensor.name


def test_our_folder_in_peft_and_pefts_here_give_equal_logits(
    base: Path, layout: Layout, config: dict[str, Any], dequantised: Dequantised, tmp_path: Path
) -> None:
    vector, ids = some_vector(layout), some_ids(8)
    write_peft(tmp_path / "ours", layout=layout, vector=vector, seed=SEED, rank=RANK, alpha=ALPHA, base_name="small")
    theirs = PeftModel.from_pretrained(dequantised(base), tmp_path / "ours").eval()
    adapter = attached_to(load_base(base), layout)
    with torch.inference_mode():
        without = adapter.model(input_ids=ids).logits
        want = theirs(input_ids=ids).logits
        adapter.load_vector(vector)
        require_equal(adapter.model(input_ids=ids).logits, want, without)
    theirs.save_pretrained(tmp_path / "theirs")
    terms = {"targets": "experts-shared" if layout.tensors[0].shape[0] == 1 else None, "train": "both"}
    manifest = {"adapter_terms": {name: value for name, value in terms.items() if value}}
    read = read_peft(tmp_path / "theirs", folder_layout(tmp_path / "theirs", config, manifest))
    assert np.array_equal(read.vector, vector)


@pytest.mark.parametrize("layers", [None, [1]])
def test_an_adapter_that_peft_made_gives_its_logits_here(
    base: Path, config: dict[str, Any], dequantised: Dequantised, tmp_path: Path, layers: list[int] | None
) -> None:
    """The order of experts in both factors, and of the two nested wrappers, from the other side."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if layers is not None:
        names = [f"layers.{layer}.{name}" for layer in layers for name in names]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    model = get_peft_model(dequantised(base), lora).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(tmp_path)
    layout = folder_layout(tmp_path, config)
    read, ids = read_peft(tmp_path, layout), some_ids()
    ours = attach(load_base(base), layout, seed="", alpha=read.alpha, rank=read.rank, fixed=read.fixed)
    with torch.inference_mode():
        without = ours.model(input_ids=ids).logits
        ours.load_vector(read.vector)
        got, want = ours.model(input_ids=ids).logits, model(input_ids=ids).logits
    require_equal(got, want, without)


def test_a_fresh_adapter_changes_nothing(base: Path, layout: Layout) -> None:
    adapter, ids = attached_to(load_base(base), layout), some_ids()
    with torch.inference_mode():
        assert torch.equal(adapter.model(input_ids=ids).logits, load_base(base)(input_ids=ids).logits)


def test_fixed_factors_of_experts_come_from_the_seed(base: Path, config: dict[str, Any]) -> None:
    layout = adapter_layout(config, targets="experts", rank=RANK, layers=[1])
    adapter = attached_to(load_base(base), layout)
    module = adapter.model.model.layers[1].mlp.experts.lora
    assert isinstance(module, ExpertLoraModule)
    matrices = fixed_tensors(layout, SEED)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert np.array_equal(module.gate_up_proj_A.numpy(), matrices[f"{prefix}.base_layer.lora_A.weight"])
    assert np.array_equal(module.down_proj_A.numpy(), matrices[f"{prefix}.lora_A.weight"])
    assert adapter.model.model.layers[0].mlp.experts.lora is None
    trainable = {id(parameter) for parameter in adapter.model.parameters() if parameter.requires_grad}
    assert trainable == {id(module.gate_up_proj_B), id(module.down_proj_B)}


def test_dense_experts_keep_their_names(base: Path, config: dict[str, Any], dequantised: Dequantised) -> None:
    model = dequantised(base)
    names, ids = set(model.state_dict()), some_ids()
    with torch.inference_mode():
        want = model(input_ids=ids).logits
    adapter = attached_to(model, adapter_layout(config, targets="experts-shared", rank=RANK, layers=[0]))
    assert isinstance(model.model.layers[0].mlp.experts, DenseExperts)
    assert set(model.state_dict()) - names == {
        f"model.layers.0.mlp.experts.lora.{name}_proj_{factor}" for name in ("gate_up", "down") for factor in "AB"
    }
    with torch.inference_mode():
        torch.testing.assert_close(adapter.model(input_ids=ids).logits, want, rtol=1e-6, atol=1e-5)


def test_two_hundred_steps_on_packed_experts_leave_the_base(base: Path, config: dict[str, Any]) -> None:
    files = {path.name: digest_file(path) for path in base.iterdir()}
    layout = adapter_layout(config, targets="experts", rank=2, layers=[1])
    adapter = attach(load_base(base), layout, seed=SEED, alpha=ALPHA, rank=2)

    def digest() -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(adapter.model.state_dict().items()):
            if not name.endswith("_proj_B"):
                found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    before, ids, losses = digest(), some_ids(1, 8), []
    optimiser = torch.optim.Adam(adapter.trained, lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        loss = loss_of(adapter.model(input_ids=ids).logits, ids)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2, "the steps must train for the comparison to mean anything"
    assert digest() == before
    assert {path.name: digest_file(path) for path in base.iterdir()} == files


def experts_tensor(path: str, factor: str, shape: tuple[int, int, int], offset: int = 0) -> Tensor:
    name = f"base_model.model.model.layers.0.{path}.lora_{factor}.weight"
    return Tensor(name=name, shape=shape, offset=offset, trained=True)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(tensors=()), "at least one matrix"),
        (Layout(tensors=(experts_tensor("mlp.experts", "A", (16, RANK, 128)),)), "missing down_proj_B, gate_up_proj_A"),
        (Layout(tensors=(experts_tensor("mlp.router", "A", (1, RANK, 128)),)), "mlp.router.lora_A.weight: not supp"),
    ],
)
def test_a_layout_that_reaches_no_expert_is_refused(base: Path, layout: Layout, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        attached_to(load_base(base), layout)


@pytest.mark.parametrize("targets", ["experts-shared", "experts"])
def test_a_layout_of_another_base_is_refused_and_leaves_this_one(
    base: Path, config: dict[str, Any], targets: str
) -> None:
    model = load_base(base)
    before = [name for name, _ in model.named_modules()]
    for other in ({"num_hidden_layers": 3}, {"hidden_size": 64}, {"intermediate_size": 64}):
        with pytest.raises(CheckpointError, match=r"expected the shape|which the base does not have"):
            attached_to(model, adapter_layout(config | other, targets=targets, rank=RANK))
        assert [name for name, _ in model.named_modules()] == before


def test_other_numbers_of_experts_are_refused(base: Path, config: dict[str, Any]) -> None:
    layout = adapter_layout(config | {"num_local_experts": 8}, targets="experts", rank=RANK)
    with pytest.raises(CheckpointError, match=r"expected the shape \(16, 4, 128\), got \(8, 4, 128\)"):
        attached_to(load_base(base), layout)


def test_a_second_adapter_on_the_experts_is_refused(base: Path, config: dict[str, Any]) -> None:
    layout = adapter_layout(config, targets="experts-shared", rank=RANK)
    adapter = attached_to(load_base(base), layout)
    adapter.model.requires_grad_(False)
    with pytest.raises(CheckpointError, match="already holds an adapter"):
        attached_to(adapter.model, layout)
