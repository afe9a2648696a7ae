"""Random weights at a true shape: repeatable, readable by others, and said to be random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_model import cli
from foedus_model.build import load_base, specs_of
from foedus_model.checkpoint import open_checkpoint
from foedus_model.parts import by_part
from foedus_model.presets import preset, tiny
from foedus_model.shards import TensorSpec
from foedus_model.synthesise import PROVENANCE, random_tensor, shaped, synthesise
from foedus_protocols.errors import CheckpointError, ConfigError, UsageError
from typer.testing import CliRunner

GB = 10**9


def _small(layers: int = 2) -> dict[str, Any]:
    return shaped("tiny", layers=layers, experts=4, vocabulary=300) | {"tie_word_embeddings": False}


@pytest.mark.parametrize(("name", "total", "experts"), [("gpt-oss-120b", 65.25, 60.91), ("gpt-oss-20b", 13.76, 10.15)])
def test_a_release_of_a_preset_has_the_published_bytes(name: str, total: float, experts: float) -> None:
    parts = by_part(specs_of(preset(name)))
    assert sum(part.bytes for part in parts.values()) == pytest.approx(total * GB, rel=1e-3)
    assert parts["experts"].bytes == pytest.approx(experts * GB, rel=1e-3)
    assert parts["head"].bytes == parts["embeddings"].bytes == 2 * 201088 * 2880
    assert parts["experts"].dtypes == ("uint8",)


@pytest.mark.parametrize("layout", ["released", "original"])
def test_a_synthetic_model_loads_and_runs(tmp_path: Path, layout: str) -> None:
    digest = synthesise(tmp_path / "model", _small(), seed=3, layout=layout, shard_bytes=100_000)
    model = load_base(tmp_path / "model", expect_digest=digest)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(20)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0.05
    assert open_checkpoint(tmp_path / "model").manifest.provenance == {"made": PROVENANCE, "seed": 3}


def test_a_seed_gives_the_same_digest_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (synthesise(tmp_path / str(at), _small(1), seed=seed) for at, seed in enumerate((1, 1, 2)))
    assert first == again
    assert first != other


def test_a_model_of_fewer_layers_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    for layers in (1, 2):
        synthesise(tmp_path / str(layers), _small(layers), seed=0)
    one, two = (open_checkpoint(tmp_path / str(layers)).tensors() for layers in (1, 2))
    assert one.keys() < two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_drawn() -> None:
    codes = random_tensor("a_blocks", TensorSpec(torch.uint8, (4, 100, 64)), seed=0)
    counts = torch.bincount(codes.flatten().long(), minlength=256)
    # 25,600 draws over 256 bytes: 100 each; six standard deviations are 60.
    assert bool((counts > 40).all() and (counts < 160).all())
    scales = random_tensor("a_scales", TensorSpec(torch.uint8, (1000,)), seed=0)
    assert set(scales.tolist()) == set(range(117, 124))
    weight = random_tensor("a.weight", TensorSpec(torch.bfloat16, (200, 200)), seed=0).float()
    assert float(weight.mean()) == pytest.approx(0, abs=6e-4)  # 6 x 0.02 / 200.
    assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
    assert bool((random_tensor("norm.weight", TensorSpec(torch.bfloat16, (5,)), seed=0) == 1).all())
    assert not torch.equal(codes, random_tensor("b_blocks", TensorSpec(torch.uint8, (4, 100, 64)), seed=0))


def test_a_preset_is_cut_down_where_asked() -> None:
    config = shaped("gpt-oss-20b", layers=3, experts=8, vocabulary=1024)
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (config["num_local_experts"], config["vocab_size"], config["hidden_size"]) == (8, 1024, 2880)
    assert config["eos_token_id"] is config["pad_token_id"] is None
    assert shaped("gpt-oss-20b") == preset("gpt-oss-20b")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": 25}, "expected num_hidden_layers of the preset gpt-oss-20b to be cut to 1 to 24, got 25"),
        ({"layers": 0}, "num_hidden_layers .* to be cut to 1 to 24, got 0"),
        ({"experts": 3}, "num_local_experts .* cut to 4 to 32"),
        ({"vocabulary": 0}, "vocab_size .* cut to 1 to 201088"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        shaped("gpt-oss-20b", **options)


def test_only_mxfp4_is_made(tmp_path: Path) -> None:
    config = {name: value for name, value in tiny().items() if name != "quantization_config"}
    with pytest.raises(CheckpointError, match="expected experts in mxfp4 to make random ones, got 'dense'"):
        synthesise(tmp_path / "model", config, seed=0)


def _run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*arguments, "--format", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    described: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return described


def test_command_synthesise_writes_what_inspect_reads(tmp_path: Path) -> None:
    cut = ["--layers", "2", "--experts", "4", "--vocabulary", "300"]
    made = _run("synthesise", "--preset", "tiny", "--out", str(tmp_path / "model"), *cut, "--seed", "5")
    assert made == _run("inspect", str(tmp_path / "model"))
    assert (made["num_local_experts"], made["vocab_size"], made["num_hidden_layers"]) == (4, 300, 2)
    assert "NOT a trained model" in made["provenance"]["made"]


def test_command_synthesise_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    arguments = ["synthesise", "--out", str(tmp_path / "model"), "--preset"]
    for preset_name, extra, error, text in (
        ("tiny", ["--layout", "gguf"], UsageError, "expected --layout released or original, got 'gguf'"),
        ("nano", [], ConfigError, "nano"),
        ("tiny", ["--layout", "original"], CheckpointError, "cannot say tie_word_embeddings"),
    ):
        with pytest.raises(error, match=text):
            CliRunner().invoke(cli.app, [*arguments, preset_name, *extra], catch_exceptions=False)
    assert not (tmp_path / "model").exists()
