"""``foedus model inspect`` and ``manifest``: what a folder holds, for people and for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_model import cli
from foedus_model.checkpoint import open_checkpoint
from foedus_protocols.errors import CheckpointError
from typer.testing import CliRunner


def _run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*arguments, "--format", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    described: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return described


def test_inspect_tells_parts_bytes_types_layers_experts_and_digest(base: Path) -> None:
    described = _run("inspect", str(base))
    tensors = open_checkpoint(base).tensors()
    assert described["digest"] == open_checkpoint(base).digest
    assert (described["verified"], described["layout"], described["quantisation"]) == (True, "released", "mxfp4")
    assert (described["num_hidden_layers"], described["num_local_experts"]) == (2, 16)
    assert described["layer_types"] == ["sliding_attention", "full_attention"]
    assert described["dtypes"] == ["bfloat16", "uint8"]
    parts = described["parts"]
    assert list(parts) == ["experts", "expert biases", "attention", "router", "embeddings", "norms"]
    assert sum(part["bytes"] for part in parts.values()) == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(part["tensors"] for part in parts.values()) == len(tensors) == described["tensors"]
    values = 2 * 16 * (256 * 128 + 128 * 128)
    assert parts["experts"] == {"bytes": values * 17 // 32, "tensors": 8, "dtypes": ["uint8"]}
    assert parts["router"] == {"bytes": 2 * 2 * (16 * 128 + 16), "tensors": 4, "dtypes": ["bfloat16"]}


def test_inspect_for_people(base: Path) -> None:
    said = CliRunner().invoke(cli.app, ["inspect", str(base)], catch_exceptions=False).stdout
    assert "layer_types  1 sliding_attention, 1 full_attention" in said
    assert "835,584" in said
    assert "835.6 kB" in said
    assert "uint8" in said


def test_quick_reads_headers_only(base: Path, tmp_path: Path) -> None:
    """A changed byte of a weight is not seen, and the answer says that it was not verified."""
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    quick = _run("inspect", str(folder), "--quick")
    assert quick["verified"] is False
    assert quick["digest"] == open_checkpoint(base).digest
    with pytest.raises(CheckpointError, match="expected the digest"):
        _run("inspect", str(folder))


def test_quick_still_refuses_a_truncated_file(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        _run("inspect", str(folder), "--quick")


def test_an_original_folder_is_adopted_and_described_in_the_same_words(
    write_base: Callable[..., Path], tmp_path: Path
) -> None:
    from .conftest import small_config

    config = small_config(tie_word_embeddings=False)
    released = write_base("released", config=config)
    folder = write_base("original", config=config, layout="original")
    (folder / "manifest.json").unlink()
    adopted = _run("manifest", str(folder), "--source", "a mirror")
    assert adopted["layout"] == "original"
    assert adopted["provenance"] == {"source": "a mirror"}
    theirs = _run("inspect", str(released))
    assert adopted["parts"] == theirs["parts"]
    assert adopted["num_local_experts"] == theirs["num_local_experts"] == 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [("index", "which it does not; fetch both again"), ("shard", "missing .*; config and weights must come from one")],
)
def test_a_folder_that_no_model_loads_from_gets_no_manifest(
    write_base: Callable[..., Path], damage: str, message: str
) -> None:
    folder = write_base(shard_bytes=200_000)
    index = folder / "model.safetensors.index.json"
    if damage == "index":
        said = json.loads(index.read_text())
        first, *_, last = sorted(said["weight_map"])
        said["weight_map"][first] = said["weight_map"][last]
        index.write_text(json.dumps(said))
    else:
        index.unlink()
        max(folder.glob("*.safetensors")).unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        _run("manifest", str(folder))
    assert not (folder / "manifest.json").exists()
