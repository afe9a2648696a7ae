"""Our safetensors writer against the library's bytes and reader."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from foedus_model.checkpoint import open_checkpoint, write_streamed
from foedus_model.shards import TensorSpec, plan_shards, read_specs, write_file
from foedus_protocols.errors import CheckpointError
from safetensors.torch import load_file, save_file

TENSORS = {
    "b.norm": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "z.codes": torch.arange(250, dtype=torch.uint8).view(5, 50),
    "a.codes": torch.arange(-4, 5, dtype=torch.int8),
    "umlaut.\N{LATIN SMALL LETTER U WITH DIAERESIS}": torch.ones(2, dtype=torch.float16),
    "count": torch.tensor(3),
    "wide": torch.ones(1, 3, dtype=torch.float64),
    "whole": torch.ones(3, dtype=torch.int32),
    "yes": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


def test_a_written_file_has_the_librarys_bytes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "ours", SPECS, TENSORS.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_written_file_reads_back_equal(tmp_path: Path) -> None:
    write_file(tmp_path / "ours.safetensors", SPECS, lambda name: TENSORS[name].clone())
    assert read_specs(tmp_path / "ours.safetensors") == SPECS
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_a_view_with_strides_is_written_in_order(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).T
    write_file(tmp_path / "ours.safetensors", {"turned": TensorSpec.of(turned)}, lambda _: turned)
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["turned"], turned)


def test_a_tensor_of_another_shape_than_planned_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: expected"):
        write_file(tmp_path / "ours", {"a": TensorSpec(torch.float32, (2,))}, lambda _: torch.zeros(3))


def test_shards_are_filled_in_order_and_named_as_published() -> None:
    specs = {name: TensorSpec(torch.uint8, (size,)) for name, size in (("a", 6), ("b", 4), ("c", 1), ("d", 20))}
    assert plan_shards(specs, 100) == {"model.safetensors": ["a", "b", "c", "d"]}
    assert plan_shards(specs, 10) == {
        "model-00000-of-00002.safetensors": ["a", "b"],
        "model-00001-of-00002.safetensors": ["c"],
        "model-00002-of-00002.safetensors": ["d"],  # Larger than the limit, alone.
    }
    assert list(plan_shards(specs, 10, "original")) == [f"model--0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_type_that_no_model_has_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "strange.safetensors")
    with pytest.raises(CheckpointError, match="a has the type F8_E4M3, expected U8"):
        read_specs(tmp_path / "strange.safetensors")


def test_a_streamed_model_is_in_memory_one_tensor_at_a_time(tmp_path: Path) -> None:
    """64 tensors of a mebibyte pass through less than four of memory, into shards of ten."""
    spec = TensorSpec(torch.uint8, (1 << 20,))
    specs = {f"t{number:02d}": spec for number in range(64)}
    alive: list[int] = []

    def make(name: str) -> torch.Tensor:
        alive.append(int(name[1:]))
        return torch.from_numpy(np.full(1 << 20, int(name[1:]), dtype=np.uint8))  # numpy's memory is counted.

    tracemalloc.start()
    try:
        config = {"model_type": "gpt_oss"}
        options = {"tokenizer_file": None, "provenance": {}, "shard_bytes": 10 << 20}
        write_streamed(tmp_path / "model", config=config, specs=specs, make=make, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert alive == list(range(64)), "each once, in order"
    opened = open_checkpoint(tmp_path / "model")
    assert len(opened.manifest.weight_files) == 7
    found = opened.tensors()
    assert all(bool((found[f"t{number:02d}"] == number).all()) for number in range(64))
