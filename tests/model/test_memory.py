"""What loading needs, what the machine has by its own files, and the refusal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from foedus_model import memory, presets
from foedus_model.build import _expected, _model_config, _on_meta, _stored, load, load_base
from foedus_model.memory import Needs, host_free, needs_of, require_memory
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import MANIFEST_FILE

GB = 10**9


def _machine(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    available_kib: int,
    groups: str = "",
    files: dict[str, str] | None = None,
) -> None:
    """A machine's /proc and control groups, as the kernel writes them."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kib} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in (files or {}).items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "_PROC", root / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", root / "cgroup")


def test_without_limits_the_kernel_says_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(tmp_path, monkeypatch, available_kib=1000, groups="0::/user.slice\n")
    assert host_free() == 1000 * 1024


def test_a_limit_above_this_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2: the group itself has no limit, its parent has; unused pages of files are free."""
    _machine(
        tmp_path,
        monkeypatch,
        available_kib=10_000_000,
        groups="0::/box/inner\n",
        files={
            "box/inner/memory.max": "max\n",
            "box/inner/memory.current": "300\n",
            "box/memory.max": "5000\n",
            "box/memory.current": "4000\n",
            "box/memory.stat": "anon 100\ninactive_file 700\n",
        },
    )
    assert host_free() == 1000 + 700


def test_version_1_and_an_exhausted_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(
        tmp_path,
        monkeypatch,
        available_kib=10_000_000,
        groups="11:cpu,cpuacct:/box\n9:memory:/box\n",
        files={"memory/box/memory.limit_in_bytes": "5000\n", "memory/box/memory.usage_in_bytes": "6000\n"},
    )
    assert host_free() == 0


def test_another_system_says_nothing_and_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "absent")
    assert host_free() is None
    require_memory(Needs(host=10**18, mapped=0, device=0), path=tmp_path, device="cpu")


def _needs(name: str, **options: object) -> Needs:
    config = _model_config(presets.preset(name))
    model = _on_meta(config, "mxfp4")
    return needs_of(_expected(model, config), _stored(model), **({"device": "cpu", "dtype": torch.float32} | options))


def test_the_needs_of_the_released_models() -> None:
    """The published sizes: 60.9 and 10.15 GB of packed experts, 65.25 and 13.76 GB in all."""
    assert _needs("gpt-oss-120b").mapped == pytest.approx(60.91 * GB, rel=1e-3)
    assert _needs("gpt-oss-20b").mapped == pytest.approx(10.15 * GB, rel=1e-3)
    assert _needs("gpt-oss-20b").host == pytest.approx(2 * (13.76 - 10.15) * GB, rel=2e-3)
    in_file_type = _needs("gpt-oss-20b", dtype=torch.bfloat16)
    assert (in_file_type.host, in_file_type.mapped) == (0, pytest.approx(13.76 * GB, rel=1e-3))
    on_gpu = _needs("gpt-oss-120b", device="cuda", dtype=torch.bfloat16)
    assert (on_gpu.host, on_gpu.device) == (0, pytest.approx(65.25 * GB, rel=1e-3))
    converted = _needs("gpt-oss-20b", device="cuda")
    assert converted.device == pytest.approx((10.15 + 2 * 3.61 + 1.158) * GB, rel=2e-3)


def test_a_model_takes_what_its_needs_say(base: Path) -> None:
    loaded = load(base)
    config = loaded.model.config
    model = _on_meta(config, "mxfp4")
    needs = needs_of(_expected(model, config), _stored(model), device="cpu", dtype=torch.float32)
    assert sum(loaded.bytes.values()) == needs.host + needs.mapped


def test_too_little_host_memory_is_refused_before_the_weights_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(tmp_path, monkeypatch, available_kib=500)
    monkeypatch.setattr("foedus_model.build.open_checkpoint", None)
    text = (
        r"expected 598\.\d kB of free host memory to load .* for the CPU, got 512\.0 kB; stop .*the 835\.6 kB that stay"
    )
    with pytest.raises(CheckpointError, match=text):
        load_base(base)


def test_too_little_gpu_memory_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_free", lambda device: 2000)
    monkeypatch.setattr("foedus_model.build.open_checkpoint", None)
    with pytest.raises(
        CheckpointError, match=r"of free memory on cuda:1 to load .*, got 2\.0 kB; .* `foedus model fit`"
    ):
        load_base(base, device="cuda:1")


def test_free_gpu_memory_counts_what_torch_keeps_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.device_free("cuda") == 1300


def test_files_that_do_not_fit_beside_it_are_said_to_be_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _machine(tmp_path, monkeypatch, available_kib=4_000_000)
    with caplog.at_level(logging.WARNING):
        require_memory(Needs(host=1 * GB, mapped=2 * GB, device=0), path=tmp_path, device="cpu")
        assert not caplog.records
        require_memory(Needs(host=1 * GB, mapped=10 * GB, device=0), path=tmp_path, device="cpu")
    assert "every pass reads the rest from the disk again" in caplog.text


def test_another_base_is_refused_before_memory_is_asked_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foedus_model.build.require_memory", None)
    with pytest.raises(CheckpointError, match="expected the base 0000"):
        load_base(base, expect_digest="0" * 64)
    assert (base / MANIFEST_FILE).exists()
