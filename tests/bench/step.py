"""The per-unit private step on a CPU, beside its peers, on the shape of `tiny`.

Three questions, each answered by medians of interleaved repetitions in one process, since machines are noisy and only
ratios between neighbours count:

* forward and backward of one record on MXFP4 experts against transformers' `grouped_mm` on the same weights, dense;
* the private step, one unit a forward, against one plain backward of the batch's mean loss over the same tokens;
* the same against Opacus' per-sample hooks on the same model.

    make bench
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from foedus_client import training
from foedus_client.checks import SyntheticRecord, SyntheticUnit
from foedus_client.privacy import clip_to_grid, grid
from foedus_model.adapter import AttachedAdapter, attach
from foedus_model.build import load_base
from foedus_model.presets import TINY
from foedus_protocols.layout import attention_layout
from foedus_protocols.manifest import read_config
from opacus import GradSampleModule
from torch.nn import functional
from transformers import AutoModelForCausalLM, Mxfp4Config

RANK = 16


def medians(repeats: int, **jobs: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each job: medians of `repeats` turns in which every job runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000.0 * statistics.median(values) for name, values in seconds.items()}


def adapted(model: Any) -> AttachedAdapter:
    """A model with the default private adapter."""
    return attach(model, attention_layout(read_config(TINY), rank=RANK), seed="bench", alpha=32.0, rank=RANK)


def dense_base() -> Any:
    """The library's model over the same weights, decoded to fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    return model.float().eval().requires_grad_(False)


def units_of(count: int, tokens: int) -> list[SyntheticUnit]:
    """Units of one record each; every token but the first is learned."""
    words = np.random.default_rng(0).integers(0, 4096, (count, tokens)).astype(np.int32)
    mask = np.arange(tokens) > 0
    return [SyntheticUnit(records=[SyntheticRecord(tokens=row, loss_mask=mask)]) for row in words]


def batch_mean(adapter: AttachedAdapter, tokens: torch.Tensor) -> None:
    """What a trainer without privacy does: one backward of the mean over all tokens."""
    logits = adapter.model(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    torch.autograd.grad(loss, adapter.trained)


def private(adapter: AttachedAdapter, units: list[SyntheticUnit]) -> None:
    """Gradient, clip and integer sum of each unit."""
    length = training.vector_length(adapter)
    step = grid(0.1, 0.15, length)
    total = np.zeros(length, np.int64)
    for unit in units:
        gradient = training.unit_gradient(adapter, unit.records)
        total += clip_to_grid(gradient, l2_clip_norm=0.15, step=step).values


def opacus_step(wrapped: Any, tokens: torch.Tensor, trained: list[torch.nn.Parameter]) -> None:
    """Per-sample gradients by hooks, then norms and the clipped sum."""
    logits = wrapped(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none").mean(1)
    losses.mean().backward()
    norms = torch.stack([one.grad_sample.flatten(1).norm(dim=1) for one in trained]).norm(dim=0)  # (U,)
    factors = (0.15 / (norms + 1e-6)).clamp(max=1.0)
    for one in trained:
        torch.einsum("u,u...->...", factors, one.grad_sample)
    wrapped.zero_grad()


def main() -> None:
    """Print the tables as Markdown, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packed, dense, hooked = adapted(load_base(TINY)), adapted(dense_base()), adapted(load_base(TINY))
    wrapped = GradSampleModule(hooked.model, batch_first=True, loss_reduction="mean")
    rows = []
    for count, tokens in ((8, 64), (8, 256), (4, 512), (2, 1024)):
        units = units_of(count, tokens)
        batch = torch.from_numpy(np.stack([unit.records[0].tokens for unit in units]).astype(np.int64))
        found = medians(
            arguments.repeats,
            mxfp4_record=lambda units=units: training.unit_gradient(packed, units[0].records),
            dense_record=lambda units=units: training.unit_gradient(dense, units[0].records),
            private_step=lambda units=units: private(packed, units),
            batch_mean=lambda batch=batch: batch_mean(packed, batch),
            opacus_hooks=lambda batch=batch: opacus_step(wrapped, batch, hooked.trained),
        )
        rows.append({"units": count, "tokens": tokens, **found})
    print("| units x tokens | one record: MXFP4 / dense | private step / plain batch | private step / Opacus hooks |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['units']} x {row['tokens']} | {row['mxfp4_record'] / row['dense_record']:.2f} "
            f"| {row['private_step'] / row['batch_mean']:.2f} | {row['private_step'] / row['opacus_hooks']:.2f} |"
        )
    print(json.dumps({"threads": arguments.threads, "torch": torch.__version__, "milliseconds": rows}))


if __name__ == "__main__":
    main()
