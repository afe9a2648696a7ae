"""The bench of a GPU without one: its table, its histogram, its argument checks, and every job at a small size."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from foedus_kernels import backend, log_sparse
from foedus_kernels.roofline import GPT_OSS_20B, KERNELS, MOE_16E_32K, RECORD_KERNELS, RECORDS, SHAPES
from foedus_kernels.testing import assert_close
from foedus_model.presets import preset
from foedus_model.synthesise import shaped
from support.once_clock import OnceClock
from torch.nn import functional

BENCH = Path(__file__).parent
CPU = torch.device("cpu")
PEAK = {"flops": 1e12, "bandwidth": 1e11, "link": 1e10}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the bench."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


# --- The histogram ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("rows", [16, 256])
def test_the_histogram_has_the_published_figures(bench: Any, shape: Any, rows: int) -> None:
    routing = bench("gpu_routing")
    tokens = shape.tokens(rows)
    counts = routing.expert_counts(tokens, shape.experts, 4)
    assert counts.sum() == 4 * tokens
    assert counts.max() <= tokens
    assert np.count_nonzero(counts) == round(0.98 * shape.experts)
    assert routing.coefficient(counts) == pytest.approx(0.69, abs=0.01)


def test_a_token_has_its_experts_once_and_a_seed_repeats(bench: Any) -> None:
    routing = bench("gpu_routing")
    ids = routing.routed(512, 128, 4, seed=1)
    assert ids.shape == (512, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    counts = np.sort(np.bincount(ids.ravel(), minlength=128))[::-1]
    assert np.array_equal(counts, routing.expert_counts(512, 128, 4))
    assert np.array_equal(ids, routing.routed(512, 128, 4, seed=1))
    assert not np.array_equal(ids, routing.routed(512, 128, 4, seed=2))


@pytest.mark.parametrize("wrong", [(512, 128, 0), (512, 3, 4), (10, 128, 4)])
def test_a_histogram_that_cannot_be_is_refused(bench: Any, wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="experts a token"):
        bench("gpu_routing").expert_counts(*wrong)


# --- The command -----------------------------------------------------------------------------------------------------


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_without_a_gpu_it_says_one_line_and_fails(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: expected a CUDA device to measure on, got none[^\n]*$"):
        bench("gpu").main([])


def test_the_command_prints_the_empty_tables_and_refuses_what_it_does_not_know() -> None:
    assert "| K1 experts, forward | gpt-oss-120b | 16 | not measured |" in run("--table").stdout
    for options, text in ((["--only", "K9"], "got K9"), (["--repeats", "0"], "got 0")):
        done = run(*options)
        assert (done.returncode, text in done.stderr) == (2, True), done.stderr


def test_the_page_has_the_rows(bench: Any) -> None:
    page = (BENCH.parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"<!-- gpu -->\n\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert written == bench("gpu").table([], [])
    cells = [line.split(" | ")[3:] for line in written.splitlines() if line.startswith(("| K", "| sinks", "| cross"))]
    by_rows = sum(4 if kernel.by_rows else 2 for kernel in KERNELS)
    assert len(cells) == by_rows + len(RECORD_KERNELS) * len(RECORDS)
    assert {cell.strip(" |") for row in cells for cell in row} == {"not measured", "-"}
    private = [line.split(" | ") for line in written.splitlines() if "| <= 1." in line]
    assert [line[2:] for line in private] == [["not measured"] * 4 + ["not measured |"]] * 6


def test_a_measured_row_replaces_not_measured(bench: Any) -> None:
    row = {
        "kernel": "K1 experts, forward", "model": "gpt-oss-20b", "rows_an_expert": 256, "way": "ours", "seconds": 1e-3,
        "bytes_a_second": 9e11, "share_of_flops": 0.52, "share_of_bandwidth": 0.2, "peak_bytes": 2_000_000_000,
    }  # fmt: skip
    record = {
        "kernel": "K5 record, forward", "model": "moe-16e-32k", "rows_an_expert": None, "tokens": 16384, "way": "ours",
        "seconds": 5e-4, "bytes_a_second": 6e11, "share_of_flops": 0.4, "share_of_bandwidth": 0.2, "peak_bytes": 10**9,
    }  # fmt: skip
    full = record | {"way": "stock full attention", "seconds": 4e-3}
    step = {"step": "20b, 2,048 tokens", "seconds": 0.2, "tokens_a_second": 10240.0, "peak_bytes": 16_500_000_000}
    private = {
        "step": "20b, attention, packed", "seconds": 0.84, "over_plain": 1.2, "gradients_over_plain": 1.05,
        "tokens_a_second": 9752.4, "peak_bytes": 15_200_000_000, "plain_peak_bytes": 15_000_000_000,
    }  # fmt: skip
    text = bench("gpu").table([row, record, full], [step, private])
    assert "| K1 experts, forward | gpt-oss-20b | 256 | 1,000 | not measured |" in text
    assert "| 900 | 52% of FLOP/s | 2.00 GB |" in text
    assert "| K5 record, forward | 16,384 | 500 | not measured | 4,000 | 600 | 40% of FLOP/s | 1.00 GB |" in text
    assert "| 10,240 | 16.50 GB |" in text
    assert "| 20b, attention, packed | <= 1.10 | 1.20 | 1.05 | 9,752 | 15.20 GB | 15.00 GB |" in text


@pytest.mark.parametrize(
    ("why", "cell"),
    [
        ("not installed", "not installed"),
        ("version not supported: TypeError: no", "version not supported"),
        ("OutOfMemoryError: CUDA out of memory", "not measured"),
    ],
)
def test_a_row_without_a_figure_says_why_where_it_is_the_packages_fault(bench: Any, why: str, cell: str) -> None:
    row = {"kernel": "K1 experts, forward", "model": "gpt-oss-20b", "rows_an_expert": 16, "way": "triton_kernels"}
    line = next(
        line
        for line in bench("gpu").table([row | {"seconds": None, "why": why}], []).splitlines()
        if line.startswith("| K1 experts, forward | gpt-oss-20b | 16 |")
    )
    assert line.split(" | ")[7] == cell


# --- Every job, small, on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_job_runs_or_says_why_not(bench: Any, kernel: Any) -> None:
    kernels, gpu = bench("gpu_kernels"), bench("gpu")
    shape = kernels.small(GPT_OSS_20B)
    place = kernels.Place(device=CPU, dtype=torch.float32)
    rows = gpu.kernel_rows(kernel, shape, 16, OnceClock(), place, PEAK)
    ways = gpu.WAYS_OF.get(kernel.name, frozenset({"ours", "eager"}))
    assert {row["way"] for row in rows} == ways
    for row in rows:
        assert (row["seconds"] == 0.5) or "GPU" in row["why"] or row["why"] == "not installed", row
    assert sum(row["seconds"] is not None for row in rows) >= 1
    json.dumps(rows)


@pytest.mark.parametrize("backward", [False, True])
def test_the_ways_through_the_experts_agree(bench: Any, backward: bool) -> None:
    kernels = bench("gpu_kernels")
    place = kernels.Place(device=CPU, dtype=torch.float32)
    jobs = kernels.experts_jobs(place, kernels.small(GPT_OSS_20B), 64, backward=backward)
    found = {way: make()() for way, make in jobs.items() if callable(make)}
    assert set(found) == {"reference", "dequantise + grouped_mm", "eager"}
    values = {way: one[0] if backward else one for way, one in found.items()}
    for way in ("dequantise + grouped_mm", "eager"):
        assert_close(values[way], values["reference"], max_relative=1e-4, rms=1e-5, what=way)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_the_eager_attention_is_ours(bench: Any, kind: str) -> None:
    kernels = bench("gpu_kernels")
    place = kernels.Place(device=CPU, dtype=torch.float32)
    jobs = kernels.attention_jobs(place, kernels.small(GPT_OSS_20B), 48, kind=kind)
    for ours, eager in zip(jobs["ours"]()(), jobs["eager"]()(), strict=True):
        assert_close(ours, eager, max_relative=1e-4, rms=1e-5)


@pytest.mark.parametrize("kernel", RECORD_KERNELS, ids=lambda kernel: kernel.name)
def test_every_job_over_a_record_runs_or_says_why_not(bench: Any, kernel: Any) -> None:
    kernels, gpu = bench("gpu_kernels"), bench("gpu")
    place = kernels.Place(device=CPU, dtype=torch.float32)
    rows = gpu.record_rows(kernel, kernels.small(MOE_16E_32K), 300, OnceClock(), place, PEAK)
    found = {row["way"]: row for row in rows}
    assert set(found) == gpu.WAYS_OF[kernel.name] == {"ours", "reference", "stock full attention"}
    assert "kernels run on a GPU" in found["ours"]["why"]
    assert found["reference"]["seconds"] == found["stock full attention"]["seconds"] == 0.5
    assert "bytes_a_second" in found["reference"]
    assert "bytes_a_second" not in found["stock full attention"]  # Its work is not log-sparse's.
    json.dumps(rows)


@pytest.mark.parametrize("kind", ["forward", "forward and backward", "decode"])
def test_a_short_record_is_full_attention_in_every_way(bench: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    kernels = bench("gpu_kernels")
    monkeypatch.setattr(kernels, "fused_or_why", lambda place: None)
    if backend.interpreting():  # Where there is a GPU, `make gpu` has compared device code with the reference.
        code = importlib.import_module("foedus_kernels.device.log_sparse")
        monkeypatch.setattr(log_sparse, "_device_code", lambda q, block: code)
    place = kernels.Place(device=CPU, dtype=torch.float32)
    normal = kernels.Place.normal

    def without_sinks(self: Any, *shape: int, generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, -40.0) if len(shape) == 1 else normal(self, *shape, generator=generator)

    monkeypatch.setattr(kernels.Place, "normal", without_sinks)
    # Of four blocks each query block reads all before it; of five the last does not read the second.
    for tokens, same in ((250, True), (320, False)):
        jobs = kernels.record_jobs(place, kernels.small(MOE_16E_32K), tokens, kind=kind)
        ours, reference, stock = (_tensors(jobs[way]()()) for way in ("ours", "reference", "stock full attention"))
        for left, right in zip(ours, reference, strict=True):
            assert_close(left, right, max_relative=1e-4, rms=1e-5)
        if same:
            for left, right in zip(ours[: len(stock)], stock, strict=True):
                assert_close(left, right, max_relative=1e-4, rms=1e-5)
        else:
            assert (ours[0] - stock[0]).abs().max() > 1e-2


def _tensors(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_the_reference_runs_where_device_code_would(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = bench("gpu_kernels")
    asked: list[str] = []

    class Code:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            raise RuntimeError(f"device code: {name}")

    monkeypatch.setattr(log_sparse, "_device_code", lambda q, block: Code())
    monkeypatch.setattr(kernels, "fused_or_why", lambda place: None)
    place = kernels.Place(device=CPU, dtype=torch.float32)
    for kind in ("forward", "forward and backward", "decode"):
        jobs = kernels.record_jobs(place, kernels.small(MOE_16E_32K), 100, kind=kind)
        assert jobs["reference"]()() is not None
        assert not asked
        with pytest.raises(RuntimeError, match="device code"):
            jobs["ours"]()()
        asked.clear()


def test_the_records_shape_is_the_presets() -> None:
    described = preset("moe-16e-32k")
    assert (MOE_16E_32K.heads, MOE_16E_32K.kv_heads, MOE_16E_32K.width) == tuple(
        described[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    assert (MOE_16E_32K.experts, MOE_16E_32K.layers, MOE_16E_32K.hidden, MOE_16E_32K.inner) == tuple(
        described[name] for name in ("num_local_experts", "num_hidden_layers", "hidden_size", "intermediate_size")
    )
    assert max(RECORDS) == described["max_position_embeddings"]


@pytest.mark.parametrize("norms", [False, True])
def test_the_grouped_product_makes_the_same_gradients(bench: Any, norms: bool) -> None:
    kernels = bench("gpu_kernels")
    place = kernels.Place(device=CPU, dtype=torch.float32)
    jobs = kernels.unit_jobs(place, kernels.small(GPT_OSS_20B), 64, norms=norms)
    for ours, grouped in zip(jobs["reference"]()(), jobs["dequantise + grouped_mm"]()(), strict=True):
        assert_close(grouped, ours, max_relative=1e-4, rms=1e-5)


@pytest.mark.parametrize("streamed", [0, 2])
def test_a_whole_step_runs_small(bench: Any, streamed: int) -> None:
    steps = bench("gpu_steps")
    config = shaped("tiny", layers=2, experts=4, vocabulary=300) | {"tie_word_embeddings": False}
    step = steps.Step(config, 64, device=CPU, dtype=torch.float32, streamed=streamed)
    assert steps.median_of(step.run, 1, lambda: None) > 0
    step.close()
    assert "dequantised" in step.path


TINY = shaped("tiny", layers=2, experts=4, vocabulary=300) | {"tie_word_embeddings": False}


def private_step(bench: Any, targets: str, packed: bool, **options: float) -> Any:
    """The bench's way over six units of 24 tokens, always with the same weights."""
    private = bench("gpu_private")
    case = private.PrivateCase(name="-", preset="-", targets=targets, packed=packed, goal="-", units=6, tokens=24)
    torch.manual_seed(1)
    return private.PrivateStep(TINY, case, device=CPU, dtype=torch.float32, **options)


def loop_of_single_units(step: Any) -> np.ndarray:
    """Each unit by itself, by the library's logits and loss.  # float64 (U, d)"""
    rows = []
    for unit in step.units:
        tokens = torch.from_numpy(unit.records[0].tokens.astype(np.int64))
        logits = step.adapter.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        found = torch.autograd.grad(functional.cross_entropy(logits, tokens[1:]), step.adapter.trained)
        rows.append(torch.cat([part.flatten().double() for part in found]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("targets", ["attention", "experts-shared", "experts"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_private_row_is_a_private_step(bench: Any, targets: str, packed: bool) -> None:
    """Its vector is the clipped sum of a loop of single units, and the noise that was asked for around it."""
    single = loop_of_single_units(private_step(bench, targets, packed))
    norms = np.linalg.norm(single, axis=1)
    clip, noise = float(np.median(norms)), 1e-5  # A grid has no room for much less noise.
    step = private_step(bench, targets, packed, l2_clip_norm=clip, noise_multiplier=noise)
    plain = np.concatenate([one.flatten().numpy() for one in step.plain()])
    assert np.linalg.norm(plain - single.mean(0)) <= 1e-5 * np.linalg.norm(plain)

    result = step.private()
    assert (result.sampled_units, result.clipped_units, result.dropped_units) == (6, 3, 0)
    wanted = (single * np.minimum(1.0, clip * (1.0 - 1e-4) / norms)[:, None]).sum(0) / (6 * clip)
    stddev = noise / 6
    apart = result.vector.astype(np.float64) - wanted
    # Of some 10,000 Gaussians one is farther than seven deviations with probability 3e-8.
    assert 2 / 3 * stddev < float(apart.std()) < 3 / 2 * stddev
    assert np.abs(apart).max() < 7 * stddev + 1e-6
    assert np.linalg.norm(wanted - single.mean(0) / clip) > 0.01 * np.linalg.norm(wanted), "clipping must matter here"


def test_packed_units_share_a_forward_and_others_do_not(bench: Any) -> None:
    private = bench("gpu_private")
    for packed, forwards in ((True, [4, 2]), (False, [1] * 6)):
        step, batches = private_step(bench, "experts", packed), []
        step.adapter.model.model.register_forward_pre_hook(
            lambda module, args, given, batches=batches: batches.append(len(given["input_ids"])), with_kwargs=True
        )
        for run, wanted in ((step.plain, [4, 2]), (step.gradients, forwards), (step.private, forwards)):
            batches.clear()
            run()
            assert batches == wanted
        found = private.measured(step, OnceClock(), 1)
        assert found["over_plain"] == found["seconds"] / found["plain_seconds"] > 0
        json.dumps(found)


def test_a_private_row_says_its_figures_or_why_not(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = bench("gpu")
    case = gpu.PRIVATE_STEPS[0]
    monkeypatch.setattr(gpu, "PrivateStep", lambda *_, **__: private_step(bench, "attention", True))
    row = gpu.private_row(case, OnceClock(), CPU, 1)
    assert row["tokens_a_second"] == 16 * 512 / row["seconds"]
    assert row["peak_bytes"] == row["plain_peak_bytes"] == 10**9
    assert "dequantised" in row["path"]

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "PrivateStep", out_of_memory)
    row = gpu.private_row(case, OnceClock(), CPU, 1)
    assert (row["seconds"], row["why"]) == (None, "OutOfMemoryError: CUDA out of memory")
    assert f"| {case.name} | <= 1.10 | not measured |" in gpu.table([], [row])


def test_the_memory_of_a_way_is_that_of_its_turns_and_no_way_holds_anothers(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, events, alive = bench("gpu"), [], []

    class Clock(OnceClock):
        def clear(self) -> None:
            events.append(f"clear, {sum(one() is not None for one in alive)} held")

    class Held:
        def __call__(self) -> None:
            events.append("turn")

    def make() -> Held:
        events.append("make")
        job = Held()
        alive.append(weakref.ref(job))
        return job

    monkeypatch.setitem(gpu.JOBS, "K4 link", lambda place, shape, tokens: {"ours": make, "eager": make})
    (kernel,) = (one for one in KERNELS if one.name == "K4 link")
    gpu.kernel_rows(kernel, GPT_OSS_20B, 16, Clock(), None, PEAK)
    assert events == ["clear, 0 held", "make", "clear, 1 held", "turn"] * 2


def test_a_step_that_fails_is_a_row_that_says_why(bench: Any) -> None:
    gpu = bench("gpu")
    case = gpu.StepCase(name="none", preset="no such preset", tokens=8, goal="-")
    row = gpu.step_row(case, OnceClock(), CPU, PEAK, 1)
    assert row["seconds"] is None
    assert "no such preset" in row["why"]


def test_a_whole_run_writes_its_rows_and_they_are_points(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, kernels = bench("gpu"), bench("gpu_kernels")
    monkeypatch.setattr(gpu, "require_cuda", lambda: CPU)
    monkeypatch.setattr(gpu, "CudaClock", lambda device, repeats: OnceClock())
    monkeypatch.setattr(gpu, "peaks", lambda clock, device: PEAK)
    monkeypatch.setattr(gpu, "Place", lambda device: kernels.Place(device=device, dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    small = {
        name: lambda place, shape, tokens, job=job: job(place, kernels.small(shape), 16)
        for name, job in kernels.JOBS.items()
    }
    monkeypatch.setattr(gpu, "JOBS", small)
    out = tmp_path / "rows.json"
    gpu.main(["--only", "records", "--seconds", "0", "--out", str(out)])  # No time, no row.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == []
    gpu.main(["--only", "records", "--model", "moe-16e-32k", "--out", str(out)])
    found = [(row["kernel"], row["tokens"], row["way"]) for row in json.loads(out.read_text(encoding="utf-8"))["rows"]]
    ways = ("ours", "reference", "stock full attention")
    assert found == [(kernel.name, tokens, way) for kernel in RECORD_KERNELS for tokens in RECORDS for way in ways]
    capsys.readouterr()

    gpu.main(["--only", "K0 decode", "sinks, full layer", "--model", "gpt-oss-20b", "--out", str(out)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads(out.read_text(encoding="utf-8"))
    assert {row["kernel"] for row in said["rows"]} == {"K0 decode", "sinks, full layer"}
    assert {row["model"] for row in said["rows"]} == {"gpt-oss-20b"}
    bench("roofline").draw(tmp_path / "points.svg", said["rows"])
    # Ours alone: a full layer at 16 and at 256 rows; decoding in Triton needs a GPU.
    assert "2 measured points" in (tmp_path / "points.svg").read_text(encoding="utf-8")


def test_the_cards_peaks_are_what_its_clock_says(bench: Any) -> None:
    found = bench("gpu").peaks(OnceClock(), CPU, width=16, size=1024)
    assert found == {"flops": 2 * 16**3 / 0.5, "bandwidth": 2 * 1024 / 0.5, "link": 256 / 0.5}
