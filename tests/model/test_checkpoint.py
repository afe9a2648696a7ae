"""Writing and opening checkpoints: identity, shards, and every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint, write_checkpoint
from foedus_model.quantize import quantise
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import MANIFEST_FILE, Manifest, read_manifest, verify_manifest, write_manifest

from .conftest import random_state, small_config


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_the_same_weights_give_the_same_identity(write_base: Callable[..., Path]) -> None:
    first, second = (open_checkpoint(write_base(name)) for name in ("one", "two"))
    assert first.digest == second.digest
    assert first.manifest.quantisation == "mxfp4"
    assert first.manifest.tokenizer_digest is not None


def test_other_weights_give_another_identity(write_base: Callable[..., Path]) -> None:
    config = small_config()
    other = quantise(random_state(config, seed=1), config)
    assert open_checkpoint(write_base("one")).digest != open_checkpoint(write_base("two", tensors=other)).digest


def test_shards_hold_the_same_tensors_as_one_file(write_base: Callable[..., Path]) -> None:
    whole, sharded = open_checkpoint(write_base("one")), open_checkpoint(write_base("two", shard_bytes=200_000))
    assert len(sharded.manifest.weight_files) > 2
    got, want = sharded.tensors(), whole.tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    ids = torch.arange(10).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(load_base(sharded.path)(input_ids=ids).logits, load_base(whole.path)(input_ids=ids).logits)


def test_transformers_reads_the_tokenizer(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer("a line of text").input_ids) == "a line of text"
    assert tokenizer.eos_token == "<|return|>"


def test_the_stored_layout_is_the_released_one(base: Path) -> None:
    tensors = open_checkpoint(base).tensors()
    prefix = "model.layers.0.mlp.experts."
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name.startswith(prefix)}
    assert shapes == {
        f"{prefix}gate_up_proj_blocks": ((16, 256, 4, 16), torch.uint8),
        f"{prefix}gate_up_proj_scales": ((16, 256, 4), torch.uint8),
        f"{prefix}gate_up_proj_bias": ((16, 256), torch.bfloat16),
        f"{prefix}down_proj_blocks": ((16, 128, 4, 16), torch.uint8),
        f"{prefix}down_proj_scales": ((16, 128, 4), torch.uint8),
        f"{prefix}down_proj_bias": ((16, 128), torch.bfloat16),
    }
    assert "lm_head.weight" not in tensors


def test_the_wrong_base_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the base 0000"):
        open_checkpoint(copy, "0" * 64)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"expected {len(data)} bytes, got {len(data) - 1} \(truncated\)"):
        open_checkpoint(copy)


def test_a_truncated_file_is_refused_even_where_the_manifest_agrees(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    write_manifest(copy, provenance={})
    with pytest.raises(CheckpointError, match="complete safetensors"):
        load_base(copy)


def test_one_changed_byte_is_refused(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="expected the digest"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.PTH", "weights.pkl"])
def test_a_pickle_is_refused_and_never_opened(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=f"{name}.*pickles can run code"):
        open_checkpoint(copy)
    with pytest.raises(CheckpointError, match="pickles can run code"):
        write_manifest(copy, provenance={})


def test_a_missing_shard_is_refused(write_base: Callable[..., Path]) -> None:
    folder = write_base(shard_bytes=200_000)
    shard = read_manifest(folder).weight_files[1]
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"names {shard}, which is not in"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"names {shard}, which is not in"):
        write_manifest(folder, provenance={})


def test_weights_beside_the_manifest_are_refused(copy: Path) -> None:
    shutil.copyfile(copy / "model.safetensors", copy / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"does not name: more\.safetensors"):
        open_checkpoint(copy)


def test_an_unknown_quantisation_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        write_manifest(copy, provenance={})


def test_a_folder_without_a_manifest_says_how_to_write_one(copy: Path) -> None:
    (copy / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match="foedus model manifest"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("files"),
        lambda value: value.update(quantisation=3),
        lambda value: value.update(config_digest="0" * 64),
        lambda value: value.update(surplus=1),
        lambda value: value.update(format="foedus/base/2"),
        lambda value: value["files"].update({"../config.json": value["files"]["config.json"]}),
        lambda value: value["files"]["config.json"].update(size="12"),
    ],
)
def test_a_malformed_manifest_is_refused(base: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads((base / MANIFEST_FILE).read_bytes())
    change(value)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        Manifest.decode(canonical_bytes(value))


def test_a_manifest_in_another_spelling_is_refused(copy: Path) -> None:
    value = json.loads((copy / MANIFEST_FILE).read_bytes())
    (copy / MANIFEST_FILE).write_text(json.dumps(value, indent=1))
    with pytest.raises(CheckpointError, match="canonical"):
        verify_manifest(copy)


def test_a_full_folder_is_not_written_over(base: Path) -> None:
    with pytest.raises(CheckpointError, match="new or empty folder"):
        write_checkpoint(base, config={}, tensors={}, tokenizer_file=None, provenance={})


def test_a_state_without_experts_is_not_quantised() -> None:
    with pytest.raises(CheckpointError, match="without any"):
        quantise({"model.norm.weight": torch.zeros(4)}, {})
