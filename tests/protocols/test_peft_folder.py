"""The adapter as PEFT's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_protocols.errors import CheckpointError, ConfigError
from foedus_protocols.layout import (
    Layout,
    Vector,
    adapter_layout,
    fixed_tensors,
    flatten,
    unflatten,
)
from foedus_protocols.peft_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    folder_layout,
    read_peft,
    read_peft_config,
    write_peft,
)
from safetensors.numpy import load_file, save_file

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def layout() -> Layout:
    return adapter_layout(SMALL, targets="attention", rank=4)


def some_vector(layout: Layout) -> Vector:
    return np.random.default_rng(3).standard_normal(layout.length).astype(np.float32)


@pytest.fixture
def folder(layout: Layout, tmp_path: Path) -> Path:
    path = tmp_path / "variant"
    write_peft(path, layout=layout, vector=some_vector(layout), seed="s", rank=4, alpha=8, base_name="tiny")
    return path


def test_a_folder_reads_back(layout: Layout, folder: Path) -> None:
    adapter = read_peft(folder, layout)
    assert (adapter.rank, adapter.alpha, adapter.base_name) == (4, 8.0, "tiny")
    assert np.array_equal(adapter.vector, some_vector(layout))
    expected = fixed_tensors(layout, "s")
    assert adapter.fixed.keys() == expected.keys()
    assert all(np.array_equal(adapter.fixed[name], matrix) for name, matrix in expected.items())


def test_a_folder_is_the_same_bytes_each_time(layout: Layout, folder: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "b", layout=layout, vector=some_vector(layout), seed="s", rank=4, alpha=8, base_name="tiny")
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()


def test_a_rank_that_is_not_the_layouts_is_refused(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 8"):
        write_peft(tmp_path, layout=layout, vector=some_vector(layout), seed="s", rank=8, alpha=8, base_name="")


def test_an_absent_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        read_peft_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {}),
        ("rank_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("target_modules", ["q_proj"]),
        ("target_modules", "all-linear"),
        ("peft_type", "IA3"),
        ("r", None),
        ("r", True),
        ("r", 10**400),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("inf")),
    ],
)
def test_a_config_that_means_something_else_is_refused(folder: Path, field: str, value: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected"):
        read_peft_config(folder)


def test_a_pickle_is_never_opened(layout: Layout, folder: Path) -> None:
    (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle adapter_model\.bin"):
        read_peft(folder, layout)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(layout: Layout, folder: Path, keep: int) -> None:
    data = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        read_peft(folder, layout)


def test_surplus_missing_and_misshapen_tensors_are_refused(layout: Layout, folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_FILE)
    name = layout.fixed()[0].name
    for changed, match in (
        ({**tensors, "extra": tensors[name]}, "extra"),
        ({key: value for key, value in tensors.items() if key != name}, "found none"),
        ({**tensors, name: tensors[name].astype(np.float16)}, "float16"),
        ({**tensors, name: np.ascontiguousarray(tensors[name].T)}, "shape"),
    ):
        save_file(changed, folder / ADAPTER_FILE)
        with pytest.raises(CheckpointError, match=match):
            read_peft(folder, layout)


def test_peft_and_we_read_each_others_folders(tmp_path: Path) -> None:
    """Every tensor that PEFT loads from our folder is ours, and the folder that PEFT then saves reads back as ours."""
    import peft  # torch takes seconds to load, and only this test needs it
    import transformers

    config = transformers.GptOssConfig(
        **SMALL, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, vocab_size=64
    )
    layout = adapter_layout(config.to_dict(), targets="attention", rank=4)
    vector = some_vector(layout)
    write_peft(tmp_path / "ours", layout=layout, vector=vector, seed="s", rank=4, alpha=8, base_name="")
    model = peft.PeftModel.from_pretrained(transformers.GptOssForCausalLM(config), tmp_path / "ours")
    loaded = {
        name.replace(".default.", "."): parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert loaded.keys() == {tensor.name for tensor in layout.tensors}
    assert np.array_equal(flatten(layout, loaded), vector)
    assert all(np.array_equal(loaded[name], matrix) for name, matrix in fixed_tensors(layout, "s").items())
    model.save_pretrained(tmp_path / "theirs")
    assert np.array_equal(read_peft(tmp_path / "theirs", layout).vector, vector)


EXPERTS: dict[str, Any] = {**SMALL, "intermediate_size": 24, "num_local_experts": 5}
KINDS: dict[str, dict[str, Any]] = {
    "attention in a layer": {"targets": "attention", "layers": [1]},
    "attention, both": {"targets": "attention", "train": "both"},
    "shared": {"targets": "experts-shared"},
    "shared in a layer, both": {"targets": "experts-shared", "layers": [0], "train": "both"},
    "experts": {"targets": "experts"},
    "experts in a layer, both": {"targets": "experts", "layers": [1], "train": "both"},
}


def written(folder: Path, layout: Layout) -> Path:
    write_peft(folder, layout=layout, vector=some_vector(layout), seed="s", rank=3, alpha=6, base_name="tiny")
    return folder


@pytest.mark.parametrize("terms", KINDS.values(), ids=KINDS)
def test_every_kind_reads_back(terms: dict[str, Any], tmp_path: Path) -> None:
    layout = adapter_layout(EXPERTS, rank=3, **terms)
    folder = written(tmp_path, layout)
    named = folder_layout(folder, EXPERTS, {"adapter_terms": terms})
    assert named == layout
    read = read_peft(folder, named)
    assert np.array_equal(read.vector, some_vector(layout))
    expected = fixed_tensors(layout, "s")
    assert read.fixed.keys() == expected.keys()
    assert all(np.array_equal(read.fixed[name], matrix) for name, matrix in expected.items())


def test_without_a_manifest_experts_have_a_pair_each_and_b_trains(tmp_path: Path) -> None:
    written(tmp_path, adapter_layout(EXPERTS, targets="experts-shared", rank=3, layers=[1]))
    each = adapter_layout(EXPERTS, targets="experts", rank=3, layers=[1])
    assert folder_layout(tmp_path, EXPERTS) == each
    matrices = unflatten(each, read_peft(tmp_path, each).vector)
    for matrix in matrices.values():
        assert all(np.array_equal(one, matrix[0]) for one in matrix)


def test_the_file_has_experts_slowest_in_a_and_fastest_in_b(tmp_path: Path) -> None:
    layout = adapter_layout(EXPERTS, targets="experts", rank=3, layers=[1], train="both")
    stacks = unflatten(layout, some_vector(layout))
    stored = load_file(written(tmp_path, layout) / ADAPTER_FILE)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for place, inputs, outputs in ((f"{prefix}.base_layer", 32, 48), (prefix, 24, 32)):
        a, b = (f"{place}.lora_{factor}.weight" for factor in "AB")
        assert (stored[a].shape, stored[b].shape) == ((5 * 3, inputs), (outputs, 3 * 5))
        for expert in range(5):
            assert np.array_equal(stored[a][3 * expert : 3 * expert + 3], stacks[a][expert])
            assert np.array_equal(stored[b][:, expert::5], stacks[b][expert])


def test_experts_that_differ_share_no_pair(tmp_path: Path) -> None:
    written(tmp_path, adapter_layout(EXPERTS, targets="experts", rank=3))
    shared = folder_layout(tmp_path, EXPERTS, {"adapter_terms": {"targets": "experts-shared"}})
    with pytest.raises(CheckpointError, match="the same for all 5 experts"):
        read_peft(tmp_path, shared)


@pytest.mark.parametrize("field", ["target_parameters", "target_modules"])
@pytest.mark.parametrize(
    "value",
    [
        ["mlp.experts.gate_up_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
        ["layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
        ["layers.01.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
        ["layers.1.self_attn.q_proj"],
        ["gate_proj"],
        [1],
        "all-linear",
    ],
    ids=str,
)
def test_targets_that_reach_other_matrices_are_refused(tmp_path: Path, field: str, value: object) -> None:
    """PEFT itself trains no expert for ``gate_proj`` or ``all-linear`` on a gpt-oss, and says nothing."""
    written(tmp_path, adapter_layout(EXPERTS, targets="experts", rank=3))
    config = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected target_modules"):
        read_peft_config(tmp_path)


def test_a_folder_of_another_kind_or_another_base_is_refused(tmp_path: Path) -> None:
    written(tmp_path, adapter_layout(EXPERTS, targets="experts", rank=3, layers=[1]))
    with pytest.raises(CheckpointError, match="expected an adapter of attention"):
        folder_layout(tmp_path, EXPERTS, {"adapter_terms": {"targets": "attention"}})
    with pytest.raises(ConfigError, match="from 0 to 0 for this base"):
        folder_layout(tmp_path, {**EXPERTS, "num_hidden_layers": 1})
    fewer = folder_layout(tmp_path, {**EXPERTS, "num_local_experts": 4})
    with pytest.raises(CheckpointError, match=r"of shape \(12, 32\), got float32 of shape \(15, 32\)"):
        read_peft(tmp_path, fewer)
