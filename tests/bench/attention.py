"""Attention on a CPU by length: eager and sinks-by-rescale, full and sliding, beside log-sparse.

Forward and backward of one layer's attention, in core-seconds (one thread, medians of interleaved turns, since only
neighbours on a noisy machine compare), and the most memory that its tensors held at once. Eager is transformers' own
function with its own mask; it stops where its n x n tensors would not fit. Exponents p are of the fit t = a n^p from
4,096 tokens on; beside them stands the exponent of the tiles that log-sparse attention multiplies, which is what
n log n amounts to over these lengths. The make target keeps freed memory in the process: page faults of fresh memory
else cost up to a third of the time, the more the longer.

    make bench            or    PYTHONPATH=tests python tests/bench/attention.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from foedus_kernels.log_sparse import count_tiles, log_sparse_torch, tile_count
from foedus_kernels.sink import sink_attention_torch
from foedus_kernels.stock import band
from support.attention import peak_bytes
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

HEADS, KV_HEADS, WIDTH, WINDOW = 4, 1, 64, 128
SCALE = WIDTH**-0.5
Inputs = list[torch.Tensor]


def inputs_of(length: int) -> Inputs:
    """Random q, k, v and sinks of one row."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, HEADS, length, WIDTH), (1, KV_HEADS, length, WIDTH), (1, KV_HEADS, length, WIDTH), (HEADS,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """transformers' reference, with the mask that it is always given."""
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=sinks, training=False)
    mask = band(q.shape[2], k.shape[2], None, q)[None, None]
    return eager_attention_forward(module, q, k, v, mask, scaling=SCALE)[0]


JOBS: dict[str, Callable[..., torch.Tensor]] = {
    "eager": eager,
    "full": lambda *x: sink_attention_torch(*x, scale=SCALE),
    "sliding": lambda *x: sink_attention_torch(*x, scale=SCALE, window=WINDOW),
    "log-sparse": lambda *x: log_sparse_torch(*x, scale=SCALE),
}


def step(job: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    """Forward and backward."""
    out = job(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def core_seconds(jobs: list[str], inputs: Inputs, repeats: int) -> dict[str, float]:
    """Medians of turns in which every job runs once; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name in jobs:
            start = time.process_time()
            step(JOBS[name], inputs)
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(length: int, repeats: int, longest: dict[str, int]) -> dict[str, Any]:
    """Core-seconds and peak bytes of each job, and the tiles of log-sparse attention."""
    jobs = {name: job for name, job in JOBS.items() if length <= longest.get(name, length)}
    inputs = inputs_of(length)
    # Eager apart: what it leaves of caches and memory made its neighbours up to twice as slow.
    seconds = core_seconds([name for name in jobs if name != "eager"], inputs, repeats)
    seconds |= core_seconds([name for name in jobs if name == "eager"], inputs, repeats)
    with count_tiles() as tiles:
        log_sparse_torch(*inputs, scale=SCALE)
    if tiles.forward != tile_count(length):
        raise ValueError(f"expected {tile_count(length)} tiles at {length} tokens, counted {tiles.forward}")
    return {
        "tokens": length,
        "seconds": seconds,
        "bytes": {name: peak_bytes(lambda job=job: step(job, inputs)) for name, job in jobs.items()},  # type: ignore[misc]
        "tiles": tiles.forward,
    }


def exponent(lengths: list[int], values: list[float]) -> float:
    """p of the least-squares fit values = a lengths^p."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def exponents(rows: list[dict[str, Any]], fit_from: int) -> dict[str, dict[str, float]]:
    """Of the time and the memory of each job that ran at three lengths or more, and of the tiles."""
    found: dict[str, dict[str, float]] = {}
    long = [row for row in rows if row["tokens"] >= fit_from]
    for name in JOBS:
        used = [row for row in (rows if name == "eager" else long) if name in row["seconds"]]
        if len(used) >= 3:
            lengths = [row["tokens"] for row in used]
            found[name] = {kind: exponent(lengths, [row[kind][name] for row in used]) for kind in ("seconds", "bytes")}
    lengths = [row["tokens"] for row in long]
    found["tiles"] = {"seconds": exponent(lengths, [row["tiles"] for row in long])}
    return found


def main() -> None:
    """Print the tables as Markdown, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="up to 4,096 tokens only, and exponents from 1,024 on")
    parser.add_argument("--longest-eager", type=int, default=4096, help="eager's tensors are n x n")
    parser.add_argument("--longest-full", type=int, default=16384, help="its time grows like n^2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [1024, 2048, 4096] if arguments.quick else [1024, 2048, 4096, 8192, 16384, 32768]
    longest = {"eager": arguments.longest_eager, "full": arguments.longest_full}
    print(
        f"Attention, forward and backward, {HEADS} heads on {KV_HEADS} key head, width {WIDTH}, float32, one thread\n"
    )
    print("| tokens | tiles | " + " | ".join(f"{name} core-s" for name in JOBS) + " | ", end="")
    print(" | ".join(f"{name} MB" for name in JOBS) + " | full / log-sparse |")
    print("| ---: " * (3 + 2 * len(JOBS)) + "|")
    rows = []
    for length in lengths:
        row = measure(length, arguments.repeats, longest)
        rows.append(row)
        times = [f"{row['seconds'][name]:.3f}" if name in row["seconds"] else "-" for name in JOBS]
        sizes = [f"{row['bytes'][name] / 1e6:,.1f}" if name in row["bytes"] else "-" for name in JOBS]
        gain = f"{row['seconds']['full'] / row['seconds']['log-sparse']:.2f}" if "full" in row["seconds"] else "-"
        print(f"| {length:,} | {row['tiles']:,} | " + " | ".join(times + sizes) + f" | {gain} |", flush=True)
    found = exponents(rows, 1024 if arguments.quick else 4096)
    print("\n| | exponent of time | of memory |\n| --- | ---: | ---: |")
    for name, fit in found.items():
        print(f"| {name} | {fit['seconds']:.2f} | " + (f"{fit['bytes']:.2f} |" if "bytes" in fit else "- |"))
    print(json.dumps({"attention": rows, "exponents": found}))


if __name__ == "__main__":
    main()
