"""Prints the peak of memory of training steps over the memory before them, measured by the kernel, as JSON.

    python step_peak.py TOKENS RANK TARGETS[+checkpointing] ...

A process of its own with large blocks from `mmap`, so that what a step frees goes back and a peak is the step's.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from foedus_model.adapter import attach
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint
from foedus_model.presets import TINY
from foedus_model.recompute import recompute_layers
from foedus_protocols.layout import adapter_layout
from torch.nn import functional


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _peak(way: str, tokens: int, rank: int) -> int:
    targets, _, remedy = way.partition("+")
    model = load_base(TINY)
    layout = adapter_layout(open_checkpoint(TINY).config, targets=targets, rank=rank)
    adapted = attach(model, layout, seed="ab" * 32, alpha=rank, rank=rank)
    if remedy:
        recompute_layers(model)

    def step(length: int) -> None:
        ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(1))
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[0, :-1]).float()
        losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        torch.autograd.grad(losses.sum(), adapted.trained)

    step(256)  # Pages of the files, buffers of the libraries.
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(tokens)
    return _status("VmHWM") - before


if __name__ == "__main__":
    tokens, rank = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({way: _peak(way, tokens, rank) for way in sys.argv[3:]}))
