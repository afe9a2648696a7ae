"""A small gpt-oss exactly as the releases lay one out, against transformers and against OpenAI's program."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_model import presets
from foedus_model.build import load, load_base
from foedus_model.checkpoint import open_checkpoint, write_checkpoint
from foedus_model.quantize import quantise
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import INDEX_FILE, read_config, write_manifest
from safetensors import safe_open
from safetensors.torch import save_file
from support.openai_program import Program

from .conftest import byte_tokenizer, random_state, small_config

SHARD = 150_000
YARN = presets.preset("gpt-oss-20b")["rope_parameters"]


def released_config(**changes: Any) -> dict[str, Any]:
    """A small model with what the releases have and `tiny` has not: YaRN, an untied head, odd head counts."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    described = {"rope_parameters": YARN, "max_position_embeddings": 131072, "tie_word_embeddings": False}
    return small_config(**heads, **described, num_hidden_layers=3, layer_types=_types(3)) | changes


def _types(layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The spelling of the ``config.json`` that lies beside the released weights (transformers 4.55)."""
    rope = dict(config["rope_parameters"])
    published = {key: value for key, value in config.items() if key != "rope_parameters"}
    return published | {
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": int(rope.pop("rope_theta")),
        "rope_scaling": rope,
        "router_aux_loss_coef": 0.9,
        "transformers_version": "4.55.0.dev0",
    }


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Random weights, their experts in MXFP4 and everything else in bfloat16, as a release has them."""
    config = released_config()
    return quantise(random_state(config), config)


@pytest.fixture(scope="module")
def released(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a release: shards, index, and the old spelling of the configuration."""
    folder = tmp_path_factory.mktemp("released")
    _write(folder / "model", tensors, config=as_published(released_config()))
    return folder / "model"


@pytest.fixture(scope="module")
def original(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the layout of a release's ``original/``."""
    folder = tmp_path_factory.mktemp("original") / "original"
    _write(folder, tensors, config=released_config(), layout="original")
    return folder


def _write(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> str:
    tokenizer = byte_tokenizer(folder.with_name("tokenizer.json"))
    return write_checkpoint(
        folder, tensors=tensors, tokenizer_file=tokenizer, provenance={}, **{"shard_bytes": SHARD} | options
    )


def _tokens(length: int = 48) -> torch.Tensor:
    vocabulary = released_config()["vocab_size"]
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(9))


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=_tokens()).logits
    return logits


def test_a_release_loads_here_and_in_transformers_with_equal_logits(released: Path, dequantised: Any) -> None:
    """Named and sharded as published; 48 tokens pass the window of 8 and are stretched by YaRN."""
    files = sorted(path.name for path in released.glob("*.safetensors"))
    last = len(files) - 1
    assert last > 4
    assert files == [f"model-{number:05d}-of-{last:05d}.safetensors" for number in range(last + 1)]
    index = json.loads((released / INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == set(files)
    want = _logits(dequantised(released))
    assert float(want.abs().max()) > 1
    torch.testing.assert_close(_logits(load_base(released)), want, rtol=0, atol=1e-5)


def test_the_published_spelling_means_the_same_model(
    released: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    published = json.loads((released / "config.json").read_text())
    assert "rope_parameters" not in published
    assert {"rope_scaling", "rope_theta", "experts_per_token", "initial_context_length"} <= published.keys()
    _write(tmp_path / "newer", tensors, config=released_config())
    ours, newer = load_base(released), load_base(tmp_path / "newer")
    assert ours.config.rope_parameters == newer.config.rope_parameters == YARN
    assert torch.equal(_logits(ours), _logits(newer))


def test_openais_program_over_original_files_gives_our_logits(original: Path) -> None:
    program = Program(original)
    want = program.logits(_tokens()[0].tolist())
    assert program.used == program.held.keys()
    torch.testing.assert_close(_logits(load_base(original))[0], want, rtol=0, atol=1e-5)


def test_the_original_layout_is_openais(original: Path) -> None:
    """Names, shapes and types as published; shards count from 1 there, and name their number."""
    files = sorted(path.name for path in original.glob("*.safetensors"))
    assert files == [f"model--{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    held: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with safe_open(original / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not iterable
                piece = opened.get_slice(name)
                held[name] = (piece.get_shape(), piece.get_dtype())
    layer = {name.removeprefix("block.1."): spec for name, spec in held.items() if name.startswith("block.1.")}
    assert layer == {
        "attn.norm.scale": ([128], "BF16"),
        "attn.out.bias": ([128], "BF16"),
        "attn.out.weight": ([128, 192], "BF16"),
        "attn.qkv.bias": ([320], "BF16"),
        "attn.qkv.weight": ([320, 128], "BF16"),
        "attn.sinks": ([6], "BF16"),
        "mlp.gate.bias": ([16], "BF16"),
        "mlp.gate.weight": ([16, 128], "BF16"),
        "mlp.mlp1_bias": ([16, 256], "BF16"),
        "mlp.mlp1_weight.blocks": ([16, 256, 4, 16], "U8"),
        "mlp.mlp1_weight.scales": ([16, 256, 4], "U8"),
        "mlp.mlp2_bias": ([16, 128], "BF16"),
        "mlp.mlp2_weight.blocks": ([16, 128, 4, 16], "U8"),
        "mlp.mlp2_weight.scales": ([16, 128, 4], "U8"),
        "mlp.norm.scale": ([128], "BF16"),
    }
    assert held.keys() - {f"block.{at}.{name}" for at in range(3) for name in layer} == {
        "embedding.weight",
        "norm.scale",
        "unembedding.weight",
    }
    assert json.loads((original / "config.json").read_text()) == {
        "num_hidden_layers": 3,
        "num_experts": 16,
        "experts_per_token": 2,
        "vocab_size": 262,
        "hidden_size": 128,
        "intermediate_size": 128,
        "swiglu_limit": 7.0,
        "head_dim": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "initial_context_length": 4096,
        "rope_theta": 150000.0,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }


def test_both_layouts_read_back_what_was_written(
    released: Path, original: Path, tensors: dict[str, torch.Tensor]
) -> None:
    for folder, layout in ((released, "released"), (original, "original")):
        opened = open_checkpoint(folder)
        assert opened.layout == layout
        found = opened.tensors()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert torch.equal(_logits(load_base(released)), _logits(load_base(original)))


def test_loading_reports_bytes_by_part(
    original: Path, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load(original)
    packed = sum(tensor.nbytes for name, tensor in tensors.items() if tensor.dtype == torch.uint8)
    others = sum(4 * tensor.numel() for name, tensor in tensors.items() if tensor.dtype != torch.uint8)
    assert loaded.bytes["experts"] == packed
    assert sum(loaded.bytes.values()) == packed + others
    assert loaded.bytes["embeddings"] == loaded.bytes["head"] == 4 * 262 * 128
    said = caplog.text
    assert f"{len(tensors)} tensors, none missing, none left over" in said
    assert "(original, mxfp4) on cpu in float32: experts 1.3 MB, " in said


def test_experts_stay_in_the_file(released: Path) -> None:
    """The codes are mapped, not copied: their memory belongs to the file in the process's map."""
    model = load_base(released, dtype=torch.bfloat16)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(released) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" not in name:
            assert any(start <= tensor.data_ptr() < end for start, end in spans), name


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_an_index_that_names_another_shard_is_refused(released: Path, tmp_path: Path) -> None:
    folder = _copy(released, tmp_path)
    index = json.loads((folder / INDEX_FILE).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][moved] = second
    (folder / INDEX_FILE).write_text(json.dumps(index))
    write_manifest(folder, provenance={})
    with pytest.raises(CheckpointError, match=f"says that {second} holds {moved}, which it does not; fetch both again"):
        load_base(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(released: Path, tmp_path: Path) -> None:
    folder = _copy(released, tmp_path)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    write_manifest(folder, provenance={})
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight, which .* does not name; fetch both again"):
        load_base(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "expected a JSON object, got a list"),
        ("{", "expected JSON, got something else"),
        ('{"weight_map": [1]}', "expected a 'weight_map' of tensor names to files"),
        ('{"weight_map": {"a": 1}}', "expected file names in 'weight_map', got something else"),
    ],
)
def test_a_damaged_index_is_refused(released: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = _copy(released, tmp_path)
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        write_manifest(folder, provenance={})


def test_two_shards_with_one_name_are_refused(released: Path, tmp_path: Path) -> None:
    folder = _copy(released, tmp_path)
    shutil.copyfile(min(folder.glob("*.safetensors")), folder / "more.safetensors")
    write_manifest(folder, provenance={})
    with pytest.raises(CheckpointError, match=r"more\.safetensors: .* is in another shard already"):
        load_base(folder)


def test_fused_rows_that_the_heads_do_not_ask_for_are_refused(original: Path, tmp_path: Path) -> None:
    folder = _copy(original, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    write_manifest(folder, provenance={})
    with pytest.raises(CheckpointError, match=r"expected 384 rows of q, k and v, got the shape \(320"):
        load_base(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "block.01.attn.sinks", "block.0.mlp.mlp1_weight"])
def test_a_name_that_is_not_openais_is_refused(original: Path, tmp_path: Path, name: str) -> None:
    """The first would take the place of `norm.scale` without a word."""
    folder = _copy(original, tmp_path)
    (folder / INDEX_FILE).unlink()
    save_file({name: torch.zeros(128, dtype=torch.bfloat16)}, folder / "more.safetensors")
    write_manifest(folder, provenance={})
    with pytest.raises(CheckpointError, match=f"expected only names of OpenAI's layout.*got the tensor {name}:"):
        load_base(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tie_word_embeddings": True}, "cannot say tie_word_embeddings = True"),
        ({"layer_types": ["full_attention"] * 3}, "cannot say layer_types"),
        ({"rope_parameters": YARN | {"truncate": True}}, "cannot say rope_parameters"),
    ],
)
def test_what_openais_layout_cannot_say_is_not_written(
    tensors: dict[str, torch.Tensor], tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{text}.*write the released layout"):
        _write(tmp_path / "original", tensors, config=released_config(**change), layout="original")
    assert not (tmp_path / "original").exists()


def test_dense_experts_have_no_name_in_openais_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no name for model\.layers\.0\.mlp\.experts\.down_proj"):
        _write(tmp_path / "original", random_state(released_config()), config=released_config(), layout="original")
    assert not (tmp_path / "original").exists()


def test_a_published_configuration_can_be_written_as_original(
    released: Path, original: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _write(tmp_path / "original", tensors, config=read_config(released), layout="original")
    again, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "original", original))
    assert again == first
