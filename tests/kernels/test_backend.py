"""Which path runs: a function of device, codec and the run's shapes, with its reason; refused where it cannot run."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foedus_kernels import backend, clip, mxfp4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `choose` asks of a machine with an H100, answered so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "gcc")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("rows", "codec", "path", "why"),
    [
        (1, "mxfp4", "fused", "at most 1 rows"),
        (8191, "mxfp4", "fused", "at most 8,191 rows"),
        (8192, "mxfp4", "dequantised", "up to 8,192 rows"),
        (131072, "mxfp4", "dequantised", "up to 131,072 rows"),
        (512, "nf4", "dequantised", "experts in nf4"),
        (512, "dense", "dequantised", "experts in dense"),
    ],
)
def test_the_runs_shape_chooses(rows: int, codec: str, path: str, why: str) -> None:
    choice = backend.choose(device="cuda", codec=codec, dtype=torch.bfloat16, rows=rows)
    assert choice.path == path
    assert why in choice.why
    assert (
        backend.choose(device="cuda", codec=codec, dtype=torch.bfloat16, rows=rows, wanted="dequantised").path
        == "dequantised"
    )


@pytest.mark.usefixtures("gpu")
def test_where_nothing_can_be_compiled_the_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert backend.missing_for_kernels(device) is None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert backend.missing_for_kernels(device) is None
    monkeypatch.setattr(backend.os, "access", lambda folder, mode: folder != tmp_path)
    assert "cannot be written" in (backend.missing_for_kernels(device) or "")
    with monkeypatch.context() as headless:
        headless.setattr(backend.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        assert f"no Python.h in {tmp_path}" in (backend.missing_for_kernels(device) or "")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "no C compiler" in (backend.missing_for_kernels(device) or "")


@pytest.mark.usefixtures("gpu")
def test_float32_is_fused_only_where_it_is_wanted() -> None:
    choice = backend.choose(device="cuda", codec="mxfp4", dtype=torch.float32, rows=16)
    assert (choice.path, "torch.float32" in choice.why) == ("dequantised", True)
    wanted = backend.choose(device="cuda", codec="mxfp4", dtype=torch.float32, rows=16, wanted="fused")
    assert wanted.path == "fused"


def test_on_a_cpu_the_library_multiplies_and_fused_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16)
    assert (choice.path, "cpu" in choice.why) == ("dequantised", True)
    # The interpreter is no path of a run: it has to be asked for, together with the path.
    assert (
        backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16, interpreted=True).path
        == "dequantised"
    )
    with pytest.raises(ValueError, match="the device cpu, and its kernels run on a GPU"):
        backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16, wanted="fused")
    assert (
        backend.choose(
            device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16, wanted="fused", interpreted=True
        ).path
        == "fused"
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 has to be set"):
        backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16, wanted="fused", interpreted=True)


@pytest.mark.usefixtures("gpu")
def test_what_the_fused_path_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        with pytest.raises(ValueError, match="expected what the fused path needs") as caught:
            backend.choose(device="cuda", codec="mxfp4", dtype=torch.bfloat16, rows=16, wanted="fused")
        assert backend.choose(device="cuda", codec="mxfp4", dtype=torch.bfloat16, rows=16).path == "dequantised"
        return str(caught.value)

    with monkeypatch.context() as one:
        one.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install triton" in refused()
    with monkeypatch.context() as one:
        one.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "compute capability (7, 5)" in refused()
    with monkeypatch.context() as one:
        one.setattr(torch.cuda, "is_available", lambda: False)
        assert "without CUDA" in refused()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in refused()


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a path among"):
        backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=16, wanted="fast")
    with pytest.raises(ValueError, match="expected a number of rows"):
        backend.choose(device="cpu", codec="mxfp4", dtype=torch.bfloat16, rows=-1)


def test_operators_run_device_code_on_cuda_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card: the choice alone, on tensors of a CPU, of K0 and K3. Float64 stays with the reference."""
    asked = []
    code = SimpleNamespace(unit_gradients=lambda *given: ("device", *given), decode=lambda *given: ("device", *given))
    monkeypatch.setattr(backend, "device_code", lambda name, device: asked.append(name) or code)
    chosen = clip._on_cuda("unit_gradients", lambda *given: ("reference", *given))
    for dtype, who in ((torch.float32, "device"), (torch.bfloat16, "device"), (torch.float64, "reference")):
        left = torch.ones(2, 3, dtype=dtype)
        assert chosen(left, left, "offsets") == (who, left, left, "offsets")
    stored = mxfp4.encode(torch.ones(2, 32))
    assert mxfp4._decode_on_cuda(*stored, torch.float32) == ("device", *stored, torch.float32)
    assert asked == ["clip", "clip", "mxfp4"]
    monkeypatch.setattr(backend, "device_code", lambda *_: None)
    assert chosen(left.float(), left, "offsets")[0] == "reference"
    assert torch.equal(mxfp4._decode_on_cuda(*stored, torch.float32), torch.ones(2, 32))


def test_device_code_is_looked_for_once_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backend.device_code.cache_clear()
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert [backend.device_code("clip", torch.device("cpu")) for _ in range(2)] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "clip on cpu: by the reference: the device cpu, and its kernels run on a GPU"
    ]
