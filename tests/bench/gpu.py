"""The kernels and whole steps on a GPU at the true shapes of gpt-oss-120b and 20b, beside what others do, in one run.

    make bench-gpu GPU_BENCH_FLAGS="--out rows.json"
    PYTHONPATH=kernels:model:protocols:client python tests/bench/gpu.py --only "K1 experts, forward" --model gpt-oss-20b

First the card's own peaks (a large product in bfloat16, a large copy, a pinned copy from the host), then each kernel at
16 and 256 rows an expert: median seconds by CUDA events with the caches cold, bandwidth and FLOP/s from the arithmetic
of `foedus_kernels.roofline`, their share of the card's peak, the most memory. Then log-sparse attention over records of
4K to 32K tokens, whole training steps, and private steps beside plain ones of the same batch (`gpu_private.py`).
Weights are synthetic, made on the device, scale bytes 117 to 123; routing has a trained router's histogram
(`gpu_routing.py`).

What cannot run says "not measured" and why, and the rest goes on; ``--out`` has each row as soon as it is there.
triton_kernels (`gpu_triton_kernels.py`) may instead be "not installed" or of a "version not supported".
``--table`` prints the empty tables of docs/benchmarks.md and needs no GPU. Rows feed ``roofline.py --measured``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from foedus_kernels.roofline import (
    KERNELS,
    MOE_16E_32K,
    RECORD_KERNELS,
    RECORDS,
    ROWS,
    SHAPES,
    Kernel,
    Shape,
    Work,
)
from gpu_kernels import EAGER, GROUPED, JOBS, OURS, RECORD_WAYS, REFERENCE, STOCK, THEIRS, WAYS, Job, Jobs, Place
from gpu_private import PRIVATE_STEPS, PrivateCase, PrivateStep, measured
from gpu_steps import STEPS, Step, StepCase, link_bound, median_of
from gpu_triton_kernels import NOT_INSTALLED, UNSUPPORTED, CannotRunError, first_line

NOT_MEASURED = "not measured"
_COLD_BYTES = 256 << 20  # Written between two turns: five times the H200's second-level cache.


class CudaClock:
    """Median seconds of a job by CUDA events, caches cold, and the memory that it took."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats
        self._cold = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, job: Job) -> float:
        """After two turns that warm up (and compile)."""
        times = []
        for turn in range(self._repeats + 2):
            self._cold.zero_()
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            job()
            ended.record()
            torch.cuda.synchronize(self._device)
            if turn >= 2:
                times.append(begun.elapsed_time(ended) / 1e3)
        return statistics.median(times)

    def peak_bytes(self) -> int:
        """The most since the last question."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def synchronise(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def clear(self) -> None:
        """Give memory back between cases."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


def peaks(clock: Any, device: torch.device, *, width: int = 8192, size: int = 4 << 30) -> dict[str, float]:
    """FLOP/s of a product in bfloat16, bytes/s of a copy (read and written), bytes/s from pinned memory."""
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * width**3 / clock.seconds(lambda: left @ right)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / clock.seconds(lambda: target.copy_(source))
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    link = pinned.nbytes / clock.seconds(lambda: source[: pinned.nbytes].copy_(pinned, non_blocking=True))
    return {"flops": flops, "bandwidth": bandwidth, "link": link}


def kernel_rows(
    kernel: Kernel, shape: Shape, count: int, clock: Any, place: Place, peak: dict[str, float]
) -> list[dict[str, Any]]:
    """A kernel at one shape: a row for each way."""
    tokens = shape.tokens(count)
    about = {"kernel": kernel.name, "model": shape.name, "rows_an_expert": count, "tokens": tokens}
    return _rows(about, kernel.work(shape, tokens), lambda: JOBS[kernel.name](place, shape, tokens), clock, peak)


def record_rows(
    kernel: Kernel, shape: Shape, tokens: int, clock: Any, place: Place, peak: dict[str, float]
) -> list[dict[str, Any]]:
    """Log-sparse attention over one record: a row for each way."""
    about = {"kernel": kernel.name, "model": shape.name, "rows_an_expert": None, "tokens": tokens}
    return _rows(about, kernel.work(shape, tokens), lambda: JOBS[kernel.name](place, shape, tokens), clock, peak)


def _rows(
    about: dict[str, Any], work: Work, make_jobs: Callable[[], Jobs], clock: Any, peak: dict[str, float]
) -> list[dict[str, Any]]:
    try:
        jobs = make_jobs()
    except Exception as error:  # One case's failure, mostly of memory, must not lose the others.
        return [about | {"way": OURS, "seconds": None, "why": _reason(error)}]
    rows = []
    for way, make in jobs.items():
        row = about | {"way": way}
        if isinstance(make, str):
            rows.append(row | {"seconds": None, "why": make})
            continue
        clock.clear()  # Of the way before.
        try:
            seconds = _timed(make, clock)
        except Exception as error:
            rows.append(row | {"seconds": None, "why": _reason(error)})
            continue
        row |= {"seconds": seconds, "peak_bytes": clock.peak_bytes()}
        if about["kernel"].startswith("K5") and way in (EAGER, STOCK):
            rows.append(row)  # Full attention: its work is another.
            continue
        rows.append(
            row
            | {
                "bytes_a_second": work.bytes / seconds,
                "flops_a_second": work.flops / seconds,
                "share_of_bandwidth": work.bytes / seconds / peak["bandwidth"],
                "share_of_flops": work.flops / seconds / peak["flops"],
                "share_of_link": work.link_bytes / seconds / peak["link"],
            }
        )
    return rows


def _timed(make: Callable[[], Job], clock: Any) -> float:
    """Seconds of a job, which is gone with this frame; what only its making took is no part of its memory."""
    job = make()
    clock.clear()
    return float(clock.seconds(job))


def step_row(case: StepCase, clock: Any, device: torch.device, peak: dict[str, float], repeats: int) -> dict[str, Any]:
    """A whole step: tokens a second and the most memory."""
    about = {"step": case.name, "model": case.preset, "tokens": case.tokens, "goal": case.goal}
    try:
        from foedus_model.presets import preset

        step = Step(preset(case.preset), case.tokens, device=device, dtype=torch.bfloat16, streamed=case.streamed)
        clock.clear()
        seconds = median_of(step.run, repeats, clock.synchronise)
    except Exception as error:  # As above; an import that this machine lacks is a reason, too.
        return about | {"seconds": None, "why": _reason(error)}
    row = about | {"seconds": seconds, "tokens_a_second": case.tokens / seconds, "peak_bytes": clock.peak_bytes()}
    step.close()
    row["path"] = step.path
    if case.streamed:
        shape = next(one for one in SHAPES if one.name == case.preset)
        size = shape.layers * (shape.gate_up_bytes + shape.down_bytes)
        row["share_of_link"] = row["tokens_a_second"] / link_bound(peak["link"], size, case.tokens)
    return row


def private_row(case: PrivateCase, clock: Any, device: torch.device, repeats: int) -> dict[str, Any]:
    """A private step: tokens a second, the time over that of a plain step of the same batch, the most memory."""
    tokens = case.units * case.tokens
    about = {"step": case.name, "model": case.preset, "tokens": tokens, "goal": case.goal}
    try:
        from foedus_model.presets import preset

        step = PrivateStep(preset(case.preset), case, device=device, dtype=torch.bfloat16)
        found = measured(step, clock, repeats)
    except Exception as error:  # As above.
        return about | {"seconds": None, "why": _reason(error)}
    return about | found | {"tokens_a_second": tokens / found["seconds"], "path": step.path}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CannotRunError) else first_line(error)


def table(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """The four tables of docs/benchmarks.md; a case without a row is not measured."""
    found = {(row["kernel"], row["model"], row["rows_an_expert"], row["way"]): row for row in rows}
    lines = _head("| kernel | model | rows an expert |", "| --- | --- | ---: |", WAYS)
    for kernel in KERNELS:
        for shape in SHAPES:
            for count in ROWS if kernel.by_rows else ROWS[-1:]:
                of = {way: found.get((kernel.name, shape.name, count, way)) for way in WAYS}
                name = count if kernel.by_rows else "any"
                lines.append(f"| {kernel.name} | {shape.name} | {name} | {_cells(of, kernel.name)} |")
    found = {(row["kernel"], row["tokens"], row["way"]): row for row in rows if row["rows_an_expert"] is None}
    lines += ["", *_head("| kernel | tokens |", "| --- | ---: |", RECORD_WAYS)]
    for kernel in RECORD_KERNELS:
        for tokens in RECORDS:
            of = {way: found.get((kernel.name, tokens, way)) for way in RECORD_WAYS}
            lines.append(f"| {kernel.name} | {tokens:,} | {_cells(of, kernel.name)} |")
    done = {row["step"]: row for row in steps}
    lines += ["", "| step | goal | tokens/s | memory |", "| --- | --- | ---: | ---: |"]
    for case in STEPS:
        row = done.get(case.name)
        if row is None or not row["seconds"]:
            lines.append(f"| {case.name} | {case.goal} | {NOT_MEASURED} | {NOT_MEASURED} |")
            continue
        speed = f"{row['tokens_a_second']:,.0f}"
        if "share_of_link" in row:
            speed += f" ({row['share_of_link']:.0%} of the link's bound)"
        lines.append(f"| {case.name} | {case.goal} | {speed} | {row['peak_bytes'] / 1e9:.2f} GB |")
    lines += [
        "",
        "| private step | goal | over a plain step | its gradients alone | tokens/s | memory | plain memory |",
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    lines += [_private_line(case, done.get(case.name)) for case in PRIVATE_STEPS]
    return "\n".join(lines) + "\n"


def _private_line(case: PrivateCase, row: dict[str, Any] | None) -> str:
    if row is None or not row["seconds"]:
        return f"| {case.name} | {case.goal} |{f' {NOT_MEASURED} |' * 5}"
    over, gradients = row["over_plain"], row["gradients_over_plain"]
    memory = " | ".join(f"{row[name] / 1e9:.2f} GB" for name in ("peak_bytes", "plain_peak_bytes"))
    return f"| {case.name} | {case.goal} | {over:.2f} | {gradients:.2f} | {row['tokens_a_second']:,.0f} | {memory} |"


WAYS_OF: dict[str, frozenset[str]] = {
    "K0 decode": frozenset({OURS, REFERENCE, EAGER}),
    "K1 experts, forward": frozenset(WAYS),
    "K2 experts, backward": frozenset(WAYS) - {THEIRS},
    "K3 norms": frozenset({OURS, REFERENCE, GROUPED}),
    "K3 weight gradient": frozenset({OURS, REFERENCE, GROUPED}),
    "K5 log-sparse, forward": frozenset({OURS, REFERENCE, EAGER}),
    "K5 log-sparse, backward": frozenset({OURS, REFERENCE, EAGER}),
    "K4 link": frozenset({OURS}),
} | {kernel.name: frozenset(RECORD_WAYS) for kernel in RECORD_KERNELS}
"""Which ways a kernel has; the others have ours and eager."""


def _head(places: str, rule: str, ways: tuple[str, ...]) -> list[str]:
    columns = [*(f"{way}, µs" for way in ways), "ours, GB/s", "ours, share of peak", "memory"]
    return [f"{places} {' | '.join(columns)} |", rule + " ---: |" * len(columns)]


def _cells(of: dict[str, dict[str, Any] | None], kernel: str) -> str:
    """The times of each way, then our bandwidth, share and memory."""
    cells = [_microseconds(row, way, kernel) for way, row in of.items()]
    ours = of[OURS]
    if ours is None or not ours["seconds"]:
        return " | ".join([*cells, *[NOT_MEASURED] * 3])
    bandwidth, memory = f"{ours['bytes_a_second'] / 1e9:,.0f}", f"{ours['peak_bytes'] / 1e9:.2f} GB"
    return " | ".join([*cells, bandwidth, _share(ours), memory])


def _microseconds(row: dict[str, Any] | None, way: str, kernel: str) -> str:
    if way not in WAYS_OF.get(kernel, frozenset({OURS, EAGER})):
        return "-"
    if row is None:
        return NOT_MEASURED
    if row["seconds"]:
        return f"{row['seconds'] * 1e6:,.0f}"
    return next((text for text in (NOT_INSTALLED, UNSUPPORTED) if row["why"].startswith(text)), NOT_MEASURED)


def _share(row: dict[str, Any]) -> str:
    if row["kernel"] == "K4 link":
        return f"{row['share_of_link']:.0%} of the link"
    if row["share_of_flops"] > row["share_of_bandwidth"]:
        return f"{row['share_of_flops']:.0%} of FLOP/s"
    return f"{row['share_of_bandwidth']:.0%} of bandwidth"


def require_cuda() -> torch.device:
    """The GPU, or the one line that says that there is none."""
    if not torch.cuda.is_available():
        sys.exit(
            "error: expected a CUDA device to measure on, got none that torch sees: run this on a machine with an "
            "NVIDIA GPU and a CUDA build of torch (--table prints the empty tables without one)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked before anything is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = [kernel.name for kernel in (*KERNELS, *RECORD_KERNELS)]
    names = [*kernels, "records", "steps", "private", *(case.name for case in (*STEPS, *PRIVATE_STEPS))]
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {'; '.join(names)}")
    shapes = [shape.name for shape in (*SHAPES, MOE_16E_32K)]
    parser.add_argument("--model", choices=shapes, help=f"only this shape; records are {MOE_16E_32K.name}'s")
    parser.add_argument("--repeats", type=int, default=20, help="turns of a kernel; a step has a quarter of them")
    parser.add_argument("--seconds", type=float, default=None, help="begin no further row after this long")
    parser.add_argument("--out", type=Path, help="a JSON file with every row, written as rows come")
    parser.add_argument("--table", action="store_true", help="print the empty tables and end")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.only or [] if name not in names]
    if unknown:
        parser.error(f"expected --only with names of rows ({'; '.join(names)}), got {', '.join(unknown)}")
    if found.repeats < 1:
        parser.error(f"expected --repeats of at least 1, got {found.repeats}")
    return found


def main(given: list[str] | None = None) -> None:
    """Measure everything that was asked for, print the tables, and one JSON object last."""
    arguments = parse(given)
    if arguments.table:
        sys.stdout.write(table([], []))
        return
    device = require_cuda()
    clock = CudaClock(device, arguments.repeats)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "peaks": peaks(clock, device),
        "rows": [],
        "steps": [],
    }
    clock.clear()
    begun = time.monotonic()

    def wanted(name: str, model: str, group: str | None = None) -> bool:
        late = arguments.seconds is not None and time.monotonic() - begun > arguments.seconds
        named = arguments.only is None or name in arguments.only or group in arguments.only
        return named and arguments.model in (None, model) and not late

    def keep(kind: str, rows: list[dict[str, Any]]) -> None:
        result[kind] += rows
        for row in rows:
            sys.stderr.write(f"{json.dumps(row)}\n")
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")

    _measure(result["peaks"], clock, device, wanted, keep, arguments.repeats)
    print(f"{result['device']}, torch {result['torch']}: ", end="")
    print(", ".join(f"{name} {value:.3g}/s" for name, value in result["peaks"].items()) + "\n")
    print(table(result["rows"], result["steps"]))
    print(json.dumps(result))


def _measure(
    peak: dict[str, float],
    clock: Any,
    device: torch.device,
    wanted: Callable[..., bool],
    keep: Callable[[str, list[dict[str, Any]]], None],
    repeats: int,
) -> None:
    """Every wanted row; memory is given back between cases, outside the frames that held it."""
    for kernel in KERNELS:
        for shape in SHAPES:
            for count in ROWS if kernel.by_rows else ROWS[-1:]:
                if wanted(kernel.name, shape.name):
                    keep("rows", kernel_rows(kernel, shape, count, clock, Place(device=device), peak))
                    clock.clear()
    for kernel in RECORD_KERNELS:
        for tokens in RECORDS:
            if wanted(kernel.name, MOE_16E_32K.name, "records"):
                keep("rows", record_rows(kernel, MOE_16E_32K, tokens, clock, Place(device=device), peak))
                clock.clear()
    for case in STEPS:
        if wanted(case.name, case.preset, "steps"):
            keep("steps", [step_row(case, clock, device, peak, max(1, repeats // 4))])
            clock.clear()
    for case in PRIVATE_STEPS:
        if wanted(case.name, case.preset, "private"):
            keep("steps", [private_row(case, clock, device, max(1, repeats // 4))])
            clock.clear()


if __name__ == "__main__":
    main()
