"""How an adapter lies in a vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_protocols.canonical import digest
from foedus_protocols.errors import CheckpointError, ConfigError
from foedus_protocols.layout import (
    Layout,
    Tensor,
    Vector,
    adapter_layout,
    fixed_tensors,
    flatten,
    initial_digest,
    initial_vector,
    unflatten,
    vector_bytes,
    vector_digest,
)

VECTORS_FOLDER = Path(__file__).parents[1] / "vectors"
VECTORS = json.loads((VECTORS_FOLDER / "layout.json").read_text(encoding="utf-8"))

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


@pytest.fixture
def layout() -> Layout:
    return adapter_layout(SMALL, targets="attention", rank=4)


def some_vector(layout: Layout) -> Vector:
    return np.random.default_rng(3).standard_normal(layout.length).astype(np.float32)


def test_names_shapes_and_order(layout: Layout) -> None:
    assert [tensor.name.removeprefix("base_model.model.model.layers.") for tensor in layout.tensors[:9]] == [
        "0.self_attn.q_proj.lora_A.weight",
        "0.self_attn.q_proj.lora_B.weight",
        "0.self_attn.k_proj.lora_A.weight",
        "0.self_attn.k_proj.lora_B.weight",
        "0.self_attn.v_proj.lora_A.weight",
        "0.self_attn.v_proj.lora_B.weight",
        "0.self_attn.o_proj.lora_A.weight",
        "0.self_attn.o_proj.lora_B.weight",
        "1.self_attn.q_proj.lora_A.weight",
    ]
    assert [tensor.shape for tensor in layout.tensors[:8]] == [
        (4, 32), (64, 4), (4, 32), (32, 4), (4, 32), (32, 4), (4, 64), (32, 4),
    ]  # fmt: skip
    assert len(layout.tensors) == 16


def test_trained_and_fixed_are_numbered_apart(layout: Layout) -> None:
    assert layout.length == 2 * 4 * (64 + 32 + 32 + 32)
    assert [tensor.offset for tensor in layout.trained()[:3]] == [0, 256, 384]
    assert [tensor.offset for tensor in layout.fixed()[:3]] == [0, 128, 256]
    assert all(".lora_A." in tensor.name for tensor in layout.fixed())


def test_the_released_model_trains_4_6_million_coordinates_at_rank_16() -> None:
    assert (
        adapter_layout(GPT_OSS_120B, targets="attention", rank=16).length
        == 36 * 16 * (4096 + 512 + 512 + 2880)
        == 4_608_000
    )


def test_digests_are_checked_in(layout: Layout) -> None:
    """A change of any of these digests is a change of the protocol."""
    assert layout.digest == VECTORS["layout"]
    matrices = fixed_tensors(layout, VECTORS["seed"])
    assert digest(b"".join(vector_bytes(matrices[tensor.name]) for tensor in layout.fixed())) == VECTORS["fixed"]
    assert vector_digest(initial_vector(layout, VECTORS["seed"])) == VECTORS["initial"]


def test_the_description_names_every_tensor(layout: Layout) -> None:
    assert layout.describe()["tensors"][1] == {
        "name": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "shape": [64, 4],
        "offset": 0,
        "kind": "trained",
    }
    assert adapter_layout(SMALL, targets="attention", rank=8).digest != layout.digest


def test_fixed_matrices_are_uniform_like_pefts() -> None:
    """Mean and variance of 46,080 entries, 5 deviations each: the seed is fixed, so this cannot fail by chance."""
    layout = adapter_layout({**GPT_OSS_120B, "num_hidden_layers": 1}, targets="attention", rank=16)
    matrix = fixed_tensors(layout, "seed")[layout.fixed()[0].name]
    scaled = matrix.astype(np.float64) * np.sqrt(2880)
    assert matrix.shape == (16, 2880)
    assert np.abs(scaled).max() <= 1
    assert np.abs(scaled).max() > 0.999
    assert abs(scaled.mean()) < 5 * np.sqrt(1 / 3 / scaled.size)
    assert abs(np.square(scaled).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / scaled.size)


def test_each_matrix_and_each_seed_has_its_own_stream(layout: Layout) -> None:
    first, second = fixed_tensors(layout, "a"), fixed_tensors(layout, "b")
    names = [tensor.name for tensor in layout.fixed()]
    assert not np.array_equal(first[names[0]], first[names[1]])
    assert not np.array_equal(first[names[0]], second[names[0]])


def test_flatten_is_the_inverse_of_unflatten(layout: Layout) -> None:
    vector = some_vector(layout)
    tensors = unflatten(layout, vector)
    assert tensors[layout.trained()[1].name][0].tolist() == vector[256:260].tolist()
    assert np.array_equal(flatten(layout, tensors), vector)


def test_flatten_refuses_a_missing_or_misshapen_matrix(layout: Layout) -> None:
    tensors = unflatten(layout, some_vector(layout))
    name = layout.trained()[2].name
    for wrong in (tensors[name].T, tensors[name].astype(np.float64)):
        with pytest.raises(CheckpointError, match="v_proj"):
            flatten(layout, {**tensors, name: wrong})
    del tensors[name]
    with pytest.raises(CheckpointError, match="found none"):
        flatten(layout, tensors)


def test_unflatten_refuses_another_length(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match="1280"):
        unflatten(layout, np.zeros(7, dtype=np.float32))


def test_the_adapter_file_is_raw_little_endian() -> None:
    vector = np.array([1.0, -2.0], dtype=np.float32)
    assert vector_bytes(vector) == bytes.fromhex("0000803f000000c0")
    assert vector_digest(vector) == digest(vector_bytes(vector))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
@pytest.mark.parametrize("value", [None, 0, "32", True])
def test_a_config_without_sizes_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        adapter_layout({**SMALL, field: value}, targets="attention", rank=4)


def test_a_layout_with_a_gap_or_a_repeated_name_is_refused() -> None:
    a = Tensor(name="a", shape=(2, 3), offset=0, trained=True)
    with pytest.raises(ConfigError, match="offset 6"):
        Layout(tensors=(a, Tensor(name="b", shape=(1,), offset=7, trained=True)))
    with pytest.raises(ConfigError, match="twice"):
        Layout(tensors=(a, Tensor(name="a", shape=(1,), offset=6, trained=True)))


EXPERTS: dict[str, Any] = {**SMALL, "intermediate_size": 24, "num_local_experts": 5}


def test_experts_have_a_pair_each_or_share_one() -> None:
    each = adapter_layout(EXPERTS, targets="experts", rank=3)
    shapes = [(tensor.name.removeprefix("base_model.model.model.layers."), tensor.shape) for tensor in each.tensors]
    assert shapes[:5] == [
        ("0.mlp.experts.base_layer.lora_A.weight", (5, 3, 32)),
        ("0.mlp.experts.base_layer.lora_B.weight", (5, 48, 3)),
        ("0.mlp.experts.lora_A.weight", (5, 3, 24)),
        ("0.mlp.experts.lora_B.weight", (5, 32, 3)),
        ("1.mlp.experts.base_layer.lora_A.weight", (5, 3, 32)),
    ]  # fmt: skip
    shared = adapter_layout(EXPERTS, targets="experts-shared", rank=3)
    assert [tensor.shape for tensor in shared.tensors[:4]] == [(1, 3, 32), (1, 48, 3), (1, 3, 24), (1, 32, 3)]
    assert each.length == 5 * shared.length == 2 * 5 * 3 * (48 + 32)
    assert each.num_experts == shared.num_experts == 5
    assert adapter_layout(EXPERTS, targets="attention", rank=3).num_experts == 0


@pytest.mark.parametrize("targets", ["attention", "experts-shared", "experts"])
def test_named_layers_are_the_only_ones(targets: str) -> None:
    every, one = (adapter_layout(EXPERTS, targets=targets, rank=3, layers=layers) for layers in (None, [1]))
    assert [(tensor.name, tensor.shape) for tensor in one.tensors] == [
        (tensor.name, tensor.shape) for tensor in every.tensors if ".layers.1." in tensor.name
    ]
    assert one.length == every.length // 2


@pytest.mark.parametrize("targets", ["attention", "experts-shared", "experts"])
def test_where_both_factors_train_a_starts_from_the_seed(targets: str) -> None:
    """The matrices are those that would be fixed; every B is zero either way."""
    fixed = adapter_layout(EXPERTS, targets=targets, rank=3)
    both = adapter_layout(EXPERTS, targets=targets, rank=3, train="both")
    assert both.fixed() == ()
    assert both.length == fixed.length + sum(tensor.size for tensor in fixed.fixed())
    start = unflatten(both, initial_vector(both, "s"))
    seeded = fixed_tensors(fixed, "s")
    for name, matrix in start.items():
        assert np.array_equal(matrix, seeded.get(name, np.zeros_like(matrix))), name
    assert not initial_vector(fixed, "s").any()


@pytest.mark.parametrize("kept", json.loads((VECTORS_FOLDER / "layout-kinds.json").read_bytes())["cases"])
def test_digests_of_other_kinds_are_checked_in(kept: dict[str, Any]) -> None:
    """A change of any of these digests is a change of the protocol."""
    layout = adapter_layout(EXPERTS, **kept["terms"])
    matrices = fixed_tensors(layout, "foedus")
    fixed = digest(b"".join(vector_bytes(matrices[tensor.name]) for tensor in layout.fixed()))
    found = {"layout": layout.digest, "fixed": fixed, "initial": initial_digest(layout, "foedus")}
    assert found == {name: kept[name] for name in found}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"targets": "all-linear"}, "expected the targets attention, experts-shared or experts, got 'all-linear'"),
        ({"train": "a"}, "expected b or both"),
        ({"rank": 0}, "rank of at least 1"),
        ({"layers": []}, r"from 0 to 1 for this base, got \[\]"),
        ({"layers": [2]}, "from 0 to 1"),
        ({"layers": [-1]}, "from 0 to 1"),
        ({"layers": [1, 0]}, "ascending"),
        ({"layers": [1, 1]}, "each once"),
    ],
)
def test_an_adapter_that_reaches_nothing_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adapter_layout(EXPERTS, **({"targets": "experts", "rank": 3} | changes))


@pytest.mark.parametrize("field", ["intermediate_size", "num_local_experts"])
def test_a_base_without_experts_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        adapter_layout({**EXPERTS, field: None}, targets="experts-shared", rank=3)
