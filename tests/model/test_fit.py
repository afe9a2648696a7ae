"""``foedus model fit``: its figures beside peaks that the kernel measured, and what it says of a limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_kernels.cross_entropy import cross_entropy_torch
from foedus_model import cli
from foedus_model.fit import _Count, fit
from foedus_model.presets import TINY, preset
from foedus_protocols.errors import ConfigError, UsageError
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_config, read_manifest
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "support" / "step_peak.py"
TOLERANCE = 0.10
"""Of a measured peak; 4 % and less were seen. Pages, allocators and code that is read in for the first time differ."""


def test_the_traced_peaks_are_the_measured_ones() -> None:
    """In float32 on a CPU: activations, plain and with each remedy, for two kinds of adapter; the loss alone."""
    tokens, rank = 1024, 8
    ways = ["attention", "attention+fused", "attention+fused+checkpointing", "experts", "loss"]
    said = subprocess.run(
        [sys.executable, str(SCRIPT), str(tokens), str(rank), *ways],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    measured = json.loads(said.stdout.splitlines()[-1])
    options: dict[str, Any] = {"tokens": tokens, "dtype": torch.float32, "rank": rank, "driver": 0}
    attention = fit(preset("tiny"), targets="attention", **options)
    experts = fit(preset("tiny"), targets="experts", **options)
    peaks = (attention.activations, attention.fused, attention.checkpointed, experts.activations, _loss_peak(tokens))
    traced = dict(zip(ways, peaks, strict=True))
    assert measured["attention+fused"] < 0.9 * measured["attention"]
    assert measured["attention+fused+checkpointing"] < 0.8 * measured["attention+fused"]
    for way in ways:
        assert traced[way] == pytest.approx(measured[way], rel=TOLERANCE), way


def _loss_peak(rows: int) -> int:
    """What `step_peak.py` calls ``loss``: here the logits are the peak, in a step of so short a text they are not."""
    with _Count(0) as count, torch.device("meta"):
        hidden, head = torch.zeros(rows, 128, requires_grad=True), torch.zeros(4096, 128)
        losses = cross_entropy_torch(hidden, head, torch.zeros(rows, dtype=torch.int64))
        torch.autograd.grad(losses.sum(), hidden)
    return count.peak


def _run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["fit", *arguments, "--format", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    described: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return described


def test_a_limit_is_answered_with_bytes_by_part_and_by_remedy() -> None:
    said = _run("--model", str(TINY), "--tokens", "512", "--gpu", "600MB", "--answers", "64", "--dtype", "bfloat16")
    files = read_manifest(TINY).files
    weights = sum(said["weights"].values())
    stored = sum(entry.size for name, entry in files.items() if name.endswith(".safetensors"))
    assert 0 <= stored - weights < 20_000, "but for a header"
    plain, fused, again, offloaded, streamed = said["remedies"]
    fixed = weights + said["adapter"] + said["driver_assumed"]
    assert plain["bytes"] == fixed + said["activations"]
    assert fused["bytes"] == fixed + said["activations_with_fused_attention"] < plain["bytes"]
    assert again["bytes"] == fixed + said["activations_with_both"] < fused["bytes"]
    assert offloaded["bytes"] == again["bytes"] - said["layer_inputs"] * 3 // 4, (
        "the input of the layer at work is back"
    )
    assert said["layer_inputs"] == 4 * 512 * 128 * 2
    vector = 4 * adapter_layout(read_config(TINY), targets="attention", rank=16).length
    assert said["streaming"]["host_a_unit"] == said["layer_inputs"] * 5 // 4 + vector
    assert streamed["bytes"] < offloaded["bytes"]
    assert [one["fits"] for one in said["remedies"]] == [one["bytes"] <= 600_000_000 for one in said["remedies"]]
    assert said["fits"] == (again["bytes"] <= 600_000_000)


def test_what_streaming_takes_at_the_published_shapes() -> None:
    """120b within 7 GB of a GPU at 2,048 tokens a unit in float32, by the plan's arithmetic; nothing was measured."""
    found = fit(preset("gpt-oss-120b"), tokens=2048)
    assert found.stream is not None
    assert found.remedies[-1].name == "the same, streaming of layers"
    assert found.remedies[-1].bytes < 7_000_000_000
    assert sum(found.stream.gradients) == 18_432_000, "A frozen at rank 16"
    streaming = sum(found.weights[part] for part in ("experts", "expert biases", "attention", "router", "norms"))
    assert found.stream.link_bytes == pytest.approx(2 * streaming, rel=1e-4)
    pairs = fit(preset("tiny"), tokens=64, targets="experts")
    assert pairs.stream is None, "a pair for each expert does not stream"
    assert len(pairs.remedies) == 4
    assert fit({**preset("tiny"), "quantization_config": None}, tokens=64).stream is None


def test_the_type_is_what_clients_compute_in_unless_another_is_named() -> None:
    words = ["--preset", "tiny", "--tokens", "64"]
    plain, half = _run(*words), _run(*words, "--dtype", "bfloat16")
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert plain["layer_inputs"] == 2 * half["layer_inputs"]
    assert plain["weights"]["attention"] == 2 * half["weights"]["attention"]
    assert plain["weights"]["experts"] == half["weights"]["experts"], "as they are stored"


def test_an_adapter_in_named_layers_takes_its_share() -> None:
    words = ["--preset", "tiny", "--tokens", "64", "--targets", "experts"]
    every, last = _run(*words), _run(*words, "--layers", "3")
    assert (every["rank"], every["layers"], last["layers"]) == (8, None, [3]), "16 over the experts of a token"
    assert 4 * last["adapter"] == every["adapter"] > 0
    assert last["activations"] < every["activations"], "nothing is kept below the lowest adapted layer"
    with pytest.raises(ConfigError, match="layers"):
        _run(*words, "--layers", "9")


def test_what_people_read() -> None:
    words = ["fit", "--preset", "tiny", "--tokens", "64", "--gpu", "1GiB"]
    said = CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout
    assert "A step of 64 tokens in float32 fits 1.1 GB in this version." in said
    assert "weights: experts" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preset", "tiny", "--tokens", "1"], "expected 2 to 2048 tokens, the model's longest text, got 1"),
        (["--preset", "tiny", "--tokens", "9", "--answers", "9"], "expected 1 to 8 answer tokens of 9, got 9"),
        (["--tokens", "9"], "expected either --preset or --model, got both or neither"),
        (["--preset", "tiny", "--tokens", "9", "--gpu", "8"], "expected a size such as 8GiB or 80GB, got '8'"),
        (["--preset", "tiny", "--tokens", "9", "--gpu", "0GB"], "expected a size such as 8GiB or 80GB, got '0GB'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError) as refused:
        CliRunner().invoke(cli.app, ["fit", *arguments], catch_exceptions=False)
    assert text in str(refused.value)
