"""Prints the peak of memory of training steps over the memory before them, measured by the kernel, as JSON.

    python step_peak.py TOKENS RANK TARGETS[+fused][+checkpointing]|loss ...

`loss` is the loss alone, of hidden states 128 wide and 4,096 words.

A process of its own with large blocks from `mmap`, so that what a step frees goes back and a peak is the step's.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from foedus_kernels.cross_entropy import cross_entropy_torch
from foedus_model.adapter import attach
from foedus_model.attention import fuse_attention
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint
from foedus_model.loss import Batch, token_losses
from foedus_model.presets import TINY
from foedus_model.recompute import recompute_layers
from foedus_protocols.layout import adapter_layout


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _step(way: str, rank: int) -> Callable[[int], None]:
    if way == "loss":
        return _loss
    targets, *remedies = way.split("+")
    model = load_base(TINY)
    layout = adapter_layout(open_checkpoint(TINY).config, targets=targets, rank=rank)
    adapted = attach(model, layout, seed="ab" * 32, alpha=rank, rank=rank)
    if "fused" in remedies:
        fuse_attention(model)
    if "checkpointing" in remedies:
        recompute_layers(model)

    def step(length: int) -> None:
        ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(1))
        answers = torch.ones(1, length - 1, dtype=torch.bool)
        losses, _ = token_losses(model, Batch(tokens=ids, answers=answers))
        torch.autograd.grad(losses.sum(), adapted.trained)

    return step


def _loss(rows: int) -> None:
    hidden, head = torch.zeros(rows, 128, requires_grad=True), torch.zeros(4096, 128)
    losses = cross_entropy_torch(hidden, head, torch.zeros(rows, dtype=torch.int64))
    torch.autograd.grad(losses.sum(), hidden)


def _peak(way: str, tokens: int, rank: int) -> int:
    step = _step(way, rank)
    step(256)  # Pages of the files, buffers of the libraries.
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(tokens)
    return _status("VmHWM") - before


if __name__ == "__main__":
    tokens, rank = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({way: _peak(way, tokens, rank) for way in sys.argv[3:]}))
