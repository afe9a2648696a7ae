"""``foedus demo --preset NAME --synthetic``: what it asks of a machine, what it refuses, and one run end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foedus_local import synthetic
from foedus_local.cli import app
from foedus_model.checkpoint import open_checkpoint
from foedus_model.presets import TINY
from foedus_model.synthesise import shaped
from foedus_protocols.errors import CheckpointError, ConfigError, UsageError
from foedus_protocols.files import DiskFull
from foedus_protocols.manifest import TOKENIZER_FILE
from typer.testing import CliRunner

GB = 10**9


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")


def terms(make_terms: Any, **changes: Any) -> Any:
    return make_terms(max_records_per_unit=2, **changes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--synthetic"], "expected --preset and --synthetic together"),
        (["--preset", "tiny"], "expected --preset and --synthetic together"),
        (["--preset", "tiny", "--synthetic", "--base", "x"], "expected --base or --synthetic, got both"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text):
        CliRunner().invoke(app, options, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_preset_that_is_none_is_refused(tmp_path: Path, make_terms: Any) -> None:
    with pytest.raises(ConfigError, match="nano"):
        synthetic.require("nano", terms(make_terms), tmp_path, organisations=3)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(DiskFull, match=r"MB free in there/demo for random weights of the shape tiny, got 1\.0 MB"):
        CliRunner().invoke(app, ["--preset", "tiny", "--synthetic", "--folder", "there/demo"], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "host_free", lambda: 50_000_000)
    with pytest.raises(
        CheckpointError, match=r"of free memory on cpu for 3 organisations with a base of the shape tiny"
    ):
        CliRunner().invoke(app, ["--preset", "tiny", "--synthetic"], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_on_a_gpu_its_memory_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_terms: Any) -> None:
    monkeypatch.setenv("FOEDUS_DEVICE", "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(synthetic, "device_free", lambda device: GB)
    with pytest.raises(CheckpointError, match=r"on cuda:0 for 3 .*got 1\.0 GB"):
        synthetic.require("tiny", terms(make_terms), tmp_path, organisations=3)
    monkeypatch.setattr(synthetic, "device_free", lambda device: 80 * GB)
    assert synthetic.require("tiny", terms(make_terms), tmp_path, organisations=3) == shaped("tiny")


def test_what_it_takes_follows_shape_organisations_and_settings(
    monkeypatch: pytest.MonkeyPatch, make_terms: Any
) -> None:
    small = shaped("gpt-oss-20b", layers=2)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setenv("FOEDUS_DTYPE", "float32")

    def memory(**changes: Any) -> int:
        values = {"organisations": 1, "device": gpu} | changes
        return synthetic.requirements(small, terms(make_terms), **values).memory

    one = memory()
    # Embeddings and head in float32, two layers of packed experts, and the driver.
    assert one > 2 * 4 * 201088 * 2880 + 2 * 423_000_000 + synthetic.DRIVER
    assert memory(organisations=3) == 3 * one
    # On a CPU the packed bytes stay in the files.
    assert memory(device=cpu) < one - 2 * 423_000_000
    monkeypatch.setenv("FOEDUS_DTYPE", "bfloat16")
    assert memory() < one - 2 * 2 * 201088 * 2880
    monkeypatch.setenv("FOEDUS_DTYPE", "float32")
    monkeypatch.setenv("FOEDUS_ATTENTION", "fused")
    fused = memory()
    monkeypatch.setenv("FOEDUS_CHECKPOINTING", "on")
    assert memory() < fused < one
    disk = synthetic.requirements(shaped("gpt-oss-20b"), terms(make_terms), organisations=1, device=cpu).disk
    assert disk == pytest.approx(13.76 * GB, rel=1e-3)


def test_the_base_says_what_it_is_and_has_a_tokenizer(tmp_path: Path) -> None:
    config = shaped("tiny", layers=1, experts=4) | {"tie_word_embeddings": False}
    base = synthetic.write_base(tmp_path / "base", config, seed=1, tokenizer_of=TINY)
    opened = open_checkpoint(base)
    assert "NOT a trained model" in opened.manifest.provenance["made"]
    assert opened.tokenizer_path.read_bytes() == (TINY / TOKENIZER_FILE).read_bytes()


@pytest.mark.e2e
@pytest.mark.xdist_group("e2e")
def test_a_synthetic_federation_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "tiny", "--synthetic", "--rounds", "1", "--max-tokens", "64", "--format", "json"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["orgs"], said["rounds"]) == (3, 1)
    assert said["epsilon"] <= 8
    # Random weights know nothing: ln 4096 = 8.32 nats a token.
    assert said["loss_before"] == pytest.approx(8.32, abs=0.1)
    assert "SYNTHETIC" in done.stderr
    assert (tmp_path / "foedus-demo" / "variant" / "manifest.json").exists()
