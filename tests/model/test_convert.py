"""``foedus model quantize``: dense to every codec and what comes of it; what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_kernels import mxfp4
from foedus_model import cli
from foedus_model import quantize as quantisation
from foedus_model.adapter import attach
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint
from foedus_model.quantize import convert, quantise
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import adapter_layout
from typer.testing import CliRunner

from .conftest import random_state, small_config


@pytest.fixture
def dense(write_base: Callable[..., Path]) -> Path:
    """The small random base without quantisation, in bfloat16."""
    config = {key: value for key, value in small_config().items() if key != "quantization_config"}
    state = random_state(small_config())
    state.pop("lm_head.weight")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    return write_base("dense", config=config, tensors=tensors)


def _run(*arguments: str | Path) -> dict[str, Any]:
    words = [*(str(argument) for argument in arguments), "--format", "json"]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    described: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return described


@pytest.mark.parametrize(
    ("to", "parts", "error"),
    [("mxfp4", ["experts"], 0.11), ("nf4", ["attention", "experts"], 0.092), ("int8", ["attention", "experts"], 0.006)],
)
def test_a_dense_base_becomes_one_that_trains_and_generates(
    dense: Path, tmp_path: Path, to: str, parts: list[str], error: float
) -> None:
    said = _run("quantize", dense, tmp_path / "out", "--to", to)
    made = open_checkpoint(tmp_path / "out")
    assert (said["digest"], said["quantisation"], said["source_quantisation"]) == (made.digest, to, "dense")
    assert sorted(said["relative_errors"]) == parts
    assert all(found == pytest.approx(error, rel=0.08) for found in said["relative_errors"].values())
    assert said["bytes"] == sum(spec.nbytes for spec in made.contents.specs.values()) < 0.6 * said["source_bytes"]
    assert not (tmp_path / "out.part").exists()
    assert made.manifest.provenance["source"] == open_checkpoint(dense).digest

    source = open_checkpoint(dense)
    want = quantise(source.tensors(), source.config, to)
    got = made.tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())

    said = _run("generate", "--prompt", "ab", "--base", tmp_path / "out", "--max-new-tokens", "4")
    assert said["base"] == made.digest
    model = load_base(tmp_path / "out")
    layout = adapter_layout(made.config, targets="attention", rank=4)
    adapted = attach(model, layout, seed="ab" * 32, alpha=8, rank=4)
    tokens = torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(3))
    before = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(before, adapted.trained)
    for parameter, gradient in zip(adapted.trained, gradients, strict=True):
        parameter.data -= 1e-2 * gradient / gradient.norm()
    assert float(model(input_ids=tokens, labels=tokens).loss.detach()) < float(before.detach())


def test_what_is_not_stored_and_what_lies_beside_stays(write_base: Callable[..., Path], tmp_path: Path) -> None:
    source = write_base()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "manifest.json").unlink()
    _run("manifest", source)
    made = convert(open_checkpoint(source), tmp_path / "out", to="int8", requantise=True, shard_bytes=200_000)
    assert set(made.errors) == {"attention", "experts"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = open_checkpoint(source).tensors(), open_checkpoint(tmp_path / "out").tensors()
    same = [name for name in before if name in after and not name.endswith("_scales")]
    assert "model.layers.0.mlp.router.weight" in same
    assert "model.layers.0.self_attn.q_proj.weight" not in same
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_the_folder_one_stands_in_is_written_to(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(base.absolute())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    made = convert(source, Path("."), to="int8", requantise=True)
    assert open_checkpoint(tmp_path / "out").digest == made.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_back_from_eight_bits_to_mxfp4_keeps_codes_that_were_mxfp4s(base: Path, tmp_path: Path) -> None:
    """8 bits hold a group of 4-bit values within half a step: rounding back finds every code again, up to a few."""
    first, second = tmp_path / "int8", tmp_path / "mxfp4"
    convert(open_checkpoint(base), first, to="int8", requantise=True)
    convert(open_checkpoint(first), second, to="mxfp4", requantise=True)
    before, after = open_checkpoint(base).tensors(), open_checkpoint(second).tensors()
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.experts.down_proj"
    old, new = (mxfp4.decode(t[f"{name}_blocks"], t[f"{name}_scales"]) for t in (before, after))
    assert float((old - new).norm() / old.norm()) < 0.01
    matrix = "model.layers.0.self_attn.o_proj.weight"
    assert after[matrix].dtype == torch.bfloat16
    assert float((before[matrix].float() - after[matrix].float()).norm() / before[matrix].float().norm()) < 0.01


def test_a_rounded_base_is_not_rounded_again_by_itself(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in mxfp4: rounding twice .* say --requantise"):
        convert(open_checkpoint(base), tmp_path / "out", to="nf4")
    with pytest.raises(CheckpointError, match="another codec than mxfp4"):
        convert(open_checkpoint(base), tmp_path / "out", to="mxfp4", requantise=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    tensors = dict(open_checkpoint(dense).tensors())
    bad = "model.layers.1.mlp.experts.down_proj"
    tensors[bad] = tensors[bad].clone()
    tensors[bad][3, 0, 0] = float("inf")
    shutil.rmtree(dense)
    quantisation.write_streamed(
        dense,
        config={key: value for key, value in small_config().items() if key != "quantization_config"},
        specs={name: quantisation.specs_of(small_config() | {"quantization_config": None})[name] for name in tensors},
        make=tensors.__getitem__,
        tokenizer_file=None,
        provenance={},
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=f"{bad}: "):
        convert(open_checkpoint(dense), tmp_path / "out", to="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_part_that_was_left_is_not_taken_over(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "kept").write_text("mine")
    with pytest.raises(CheckpointError, match="a conversion runs, or was killed"):
        convert(open_checkpoint(dense), tmp_path / "out", to="nf4")
    assert (tmp_path / "out.part" / "kept").exists()


def test_a_link_to_an_empty_folder_is_written_through(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    made = convert(open_checkpoint(dense), tmp_path / "link", to="nf4")
    assert open_checkpoint(tmp_path / "place").digest == made.digest
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("link", "place"))) == [
        "link", "place",
    ]  # fmt: skip


def test_a_folder_in_use_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        convert(open_checkpoint(dense), tmp_path / "out", to="nf4")


def test_too_little_disk_is_refused_first(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quantisation.shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"of free disk in .*, got 1.0 kB; make room"):
        convert(open_checkpoint(dense), tmp_path / "out", to="nf4")
    assert not (tmp_path / "out.part").exists()


def test_a_base_that_lacks_a_tensor_is_refused(write_base: Callable[..., Path], tmp_path: Path) -> None:
    tensors = quantise(random_state(small_config()), small_config())
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.weight"):
        convert(open_checkpoint(write_base(tensors=tensors)), tmp_path / "out", to="int8", requantise=True)


def test_what_people_read(dense: Path, tmp_path: Path) -> None:
    words = ["quantize", str(dense), str(tmp_path / "out"), "--to", "int8"]
    said = CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout
    assert "dense to int8" in said
    assert "rounding moved experts by 0.6" in said
