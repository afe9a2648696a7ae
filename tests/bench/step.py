"""The per-unit private step on a CPU, beside its peers, on the shape of `tiny`.

Four questions, each answered by medians of interleaved repetitions in one process (CPU time), since machines are noisy
and only ratios between neighbours count. For adapters of attention, of a layer's experts together, and of each expert:

* the private step, one unit a forward, against one plain backward of the batch's mean loss over the same tokens;
* the same with all units in one forward, and whether private runs may take that path on this machine;
* Opacus' per-sample hooks and its ghost clipping on the same model (attention only: neither knows experts);
* forward and backward of one record on MXFP4 experts against transformers' `grouped_mm` on the same weights, dense.

    make bench
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from foedus_client import training
from foedus_client.packed import Packing, packing_for
from foedus_client.privacy import StepTerms, grid
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from foedus_model.adapter import AttachedAdapter, attach
from foedus_model.build import load_base
from foedus_model.presets import TINY
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_config
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch.nn import functional
from transformers import AutoModelForCausalLM, Mxfp4Config

RANK = 16
CLIP = 0.15
TERMS = StepTerms(
    l2_clip_norm=CLIP, noise_multiplier=1.0, sampling_prob=1.0, expected_units=8.0, max_records_per_unit=1
)
TARGETS = ("attention", "experts-shared", "experts")
SHAPES = ((8, 64), (4, 512))  # (units, tokens)
QUICK = ((4, 64),)


def medians(repeats: int, **jobs: Callable[[], object]) -> dict[str, float]:
    """CPU milliseconds of each job: medians of `repeats` turns in which every job runs once.

    Time of the processor and not of the clock: it waits for nobody else's work, though it shares caches with it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if turn:  # The first turn warms up.
                seconds[name].append(time.process_time() - start)
    return {name: 1000.0 * statistics.median(values) for name, values in seconds.items()}


def adapted(model: Any, targets: str = "attention") -> AttachedAdapter:
    """A model with an adapter whose A is frozen, the default of private runs."""
    layout = adapter_layout(read_config(TINY), targets=targets, rank=RANK)
    return attach(model, layout, seed="bench", alpha=32.0, rank=RANK)


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


def private(adapter: AttachedAdapter, units: list[SyntheticUnit], packing: Packing | None = None) -> None:
    """Gradient, clip and integer sum of each unit, as a private run makes them."""
    step = grid(TERMS.noise_stddev, CLIP, training.vector_length(adapter))
    training.clipped_sum(adapter, units, terms=TERMS, step=step, rng=os.urandom, packing=packing)


def losses_of(wrapped: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Each unit's mean loss (U,), by Opacus' module."""
    logits = wrapped(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none").mean(1)


def opacus_hooks(wrapped: Any, tokens: torch.Tensor, trained: list[torch.nn.Parameter]) -> None:
    """Per-sample gradients by hooks, then norms and the clipped sum."""
    losses_of(wrapped, tokens).mean().backward()
    norms = torch.stack([one.grad_sample.flatten(1).norm(dim=1) for one in trained]).norm(dim=0)  # (U,)
    factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
    for one in trained:
        torch.einsum("u,u...->...", factors, one.grad_sample)
    wrapped.zero_grad()


def opacus_ghost(wrapped: Any, tokens: torch.Tensor) -> None:
    """Norms in a first backward, the clipped sum by a second."""
    losses = losses_of(wrapped, tokens)
    losses.mean().backward(retain_graph=True)
    wrapped.zero_grad()
    wrapped.disable_hooks()
    (losses * wrapped.get_clipping_coef()).sum().backward()
    wrapped.enable_hooks()
    wrapped.zero_grad()


def peers() -> dict[str, Callable[[torch.Tensor], None]]:
    """Opacus' two ways on the attention adapter, each with a model of its own."""
    hooked, ghostly = adapted(load_base(TINY)), adapted(load_base(TINY))
    hooks = GradSampleModule(hooked.model, batch_first=True, loss_reduction="mean")
    ghost = GradSampleModuleFastGradientClipping(
        ghostly.model, batch_first=True, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    return {
        "opacus_hooks": lambda tokens: opacus_hooks(hooks, tokens, hooked.trained),
        "opacus_ghost": lambda tokens: opacus_ghost(ghost, tokens),
    }


def measured(
    adapter: AttachedAdapter,
    count: int,
    tokens: int,
    repeats: int,
    others: dict[str, Callable[[torch.Tensor], None]],
) -> dict[str, Any]:
    """Milliseconds of a plain backward, of both private ways and of the peers, and whether packing is allowed."""
    units = units_of(count, tokens)
    batch = torch.from_numpy(np.stack([unit.records[0].tokens for unit in units]).astype(np.int64))
    forced = Packing(units=count, lengths=frozenset({tokens}))  # No charter and no setting can make one.
    found: dict[str, Any] = medians(
        repeats,
        plain=lambda: batch_mean(adapter, batch),
        one_a_forward=lambda: private(adapter, units),
        packed=lambda: private(adapter, units, forced),
        **{name: lambda job=job: job(batch) for name, job in others.items()},
    )
    allowed = packing_for(adapter, units=count, max_tokens=tokens)
    return found | {"allowed": allowed is not None and tokens in allowed.lengths}


def one_record(repeats: int, shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Forward and backward of one record: MXFP4 experts beside transformers' dense ones."""
    ours, dense = adapted(load_base(TINY)), adapted(dense_base())
    rows = []
    for _, tokens in shapes:
        records = units_of(1, tokens)[0].records
        found = medians(
            repeats,
            mxfp4=lambda records=records: training.unit_gradient(ours, records),
            dense=lambda records=records: training.unit_gradient(dense, records),
        )
        rows.append({"tokens": tokens, **found})
    return rows


def _line(row: dict[str, Any]) -> str:
    over = [
        f"{row[name] / row['plain']:.2f}" if name in row else "-"
        for name in ("one_a_forward", "packed", "opacus_hooks", "opacus_ghost")
    ]
    return (
        f"| {row['targets']} | {row['units']} x {row['tokens']} | {row['plain']:.0f} | {over[0]} | {over[1]} "
        f"| {'yes' if row['allowed'] else 'no'} | {over[2]} | {over[3]} |"
    )


def main() -> None:
    """Print the tables as Markdown, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", metavar="UNITSxTOKENS", help="these shapes alone")
    parser.add_argument("--quick", action="store_true", help="one small shape, two repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats, shapes = (2, QUICK) if arguments.quick else (arguments.repeats, SHAPES)
    if arguments.shape:
        shapes = tuple((int(units), int(tokens)) for units, tokens in (one.split("x") for one in arguments.shape))
    print("Times over one plain backward of the same batch:\n")
    print(
        "| adapter | units x tokens | plain, CPU-ms | one unit a forward | all in one | allowed in private runs here "
        "| Opacus hooks | Opacus ghost |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for targets in TARGETS:
        adapter = adapted(load_base(TINY), targets)
        others = peers() if targets == "attention" else {}
        for count, tokens in shapes:
            found = measured(adapter, count, tokens, repeats, others)
            rows.append({"targets": targets, "units": count, "tokens": tokens, **found})
            print(_line(rows[-1]), flush=True)
    records = one_record(repeats, shapes)
    print("\n| tokens | one record: MXFP4 / dense |\n| --- | --- |")
    for row in records:
        print(f"| {row['tokens']} | {row['mxfp4'] / row['dense']:.2f} |")
    print(json.dumps({"threads": arguments.threads, "torch": torch.__version__, "steps": rows, "records": records}))


if __name__ == "__main__":
    main()
