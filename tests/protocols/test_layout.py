"""The adapter as a vector, as files, and as PEFT's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_protocols.canonical import digest
from foedus_protocols.errors import CheckpointError, ConfigError
from foedus_protocols.layout import (
    ADAPTER_FILE,
    CONFIG_FILE,
    Layout,
    Tensor,
    Vector,
    attention_layout,
    fixed_tensors,
    flatten,
    initial_vector,
    read_peft,
    read_peft_config,
    unflatten,
    vector_bytes,
    vector_digest,
    vector_from_bytes,
    write_peft,
)
from safetensors.numpy import load_file, save_file

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "layout.json").read_text(encoding="utf-8"))

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
    return attention_layout(SMALL, rank=4)


def some_vector(layout: Layout) -> Vector:
    return np.random.default_rng(3).standard_normal(layout.length).astype(np.float32)


@pytest.fixture
def folder(layout: Layout, tmp_path: Path) -> Path:
    path = tmp_path / "variant"
    write_peft(path, layout=layout, vector=some_vector(layout), seed="s", rank=4, alpha=8, base_name="tiny")
    return path


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
    assert attention_layout(GPT_OSS_120B, rank=16).length == 36 * 16 * (4096 + 512 + 512 + 2880) == 4_608_000


def test_digests_are_checked_in(layout: Layout) -> None:
    """A change of any of these digests is a change of the protocol."""
    assert layout.digest == VECTORS["layout"]
    matrices = fixed_tensors(layout, VECTORS["seed"])
    assert digest(b"".join(vector_bytes(matrices[tensor.name]) for tensor in layout.fixed())) == VECTORS["fixed"]
    assert vector_digest(initial_vector(layout)) == VECTORS["initial"]


def test_the_description_names_every_tensor(layout: Layout) -> None:
    assert layout.describe()["tensors"][1] == {
        "name": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "shape": [64, 4],
        "offset": 0,
        "kind": "trained",
    }
    assert attention_layout(SMALL, rank=8).digest != layout.digest


def test_fixed_matrices_are_uniform_like_pefts() -> None:
    """Mean and variance of 46,080 entries, 5 deviations each: the seed is fixed, so this cannot fail by chance."""
    layout = attention_layout({**GPT_OSS_120B, "num_hidden_layers": 1}, rank=16)
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
    assert vector_from_bytes(vector_bytes(vector), length=2).tolist() == [1.0, -2.0]
    assert vector_digest(vector) == digest(vector_bytes(vector))
    with pytest.raises(CheckpointError, match="12 bytes"):
        vector_from_bytes(vector_bytes(vector), length=3)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
@pytest.mark.parametrize("value", [None, 0, "32", True])
def test_a_config_without_sizes_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        attention_layout({**SMALL, field: value}, rank=4)


def test_a_layout_with_a_gap_or_a_repeated_name_is_refused() -> None:
    a = Tensor(name="a", shape=(2, 3), offset=0, trained=True)
    with pytest.raises(ConfigError, match="offset 6"):
        Layout(tensors=(a, Tensor(name="b", shape=(1,), offset=7, trained=True)))
    with pytest.raises(ConfigError, match="twice"):
        Layout(tensors=(a, Tensor(name="a", shape=(1,), offset=6, trained=True)))


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
        ("lora_alpha", "8"),
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
    layout = attention_layout(config.to_dict(), rank=4)
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
