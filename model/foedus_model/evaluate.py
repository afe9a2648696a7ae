"""Losses of rows of tokens under a model: the one measurement that every figure of an evaluation is made of.

A row is tokens with a mark on those that are predicted. Its loss is the sum of their cross-entropies in nats, which is
also minus the log-likelihood of the marked text; accuracy by likelihood (as in Brown et al. 2020, section 2.4) compares
it between rows that differ in their answers only. Rows are right-padded: attention is causal, so no token sees padding.

Left out: answers that are generated and then read; they would measure the format as much as the knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_model.loss import Record, batch_of, device_of, token_losses

_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLosses:
    """What `row_losses` gives.

    Attributes:
        nats: Sum of the cross-entropies of each row's predicted tokens.  # float64 (rows,)
        tokens: How many there are.  # int64 (rows,)
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]


def row_losses(model: Any, rows: Sequence[Record], *, batch_tokens: int = _BATCH_TOKENS) -> RowLosses:
    """Measure rows, those of like length together.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        rows: What to measure; a row without predicted tokens counts as nothing.
        batch_tokens: At most so many tokens a forward, padding included, but at least one row.
    """
    nats = np.zeros(len(rows), np.float64)
    counts = np.array([int(np.count_nonzero(row.loss_mask[1:])) for row in rows], np.int64)
    order = sorted((number for number in range(len(rows)) if counts[number]), key=lambda one: len(rows[one].tokens))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(rows[order[end]].tokens) <= batch_tokens:
            end += 1
        chosen = order[start:end]
        nats[chosen] = _measure(model, [rows[number] for number in chosen])
        start = end
    return RowLosses(nats=nats, tokens=counts)


@torch.inference_mode()
def _measure(model: Any, rows: Sequence[Record]) -> NDArray[np.float64]:
    """One forward.  # float64 (rows,)"""
    batch = batch_of(rows, device_of(model))
    if batch is None:
        return np.zeros(len(rows), np.float64)
    losses, owners = token_losses(model, batch)  # (N,), (N,)
    sums = torch.zeros(len(rows), dtype=torch.float64, device=losses.device).index_add_(0, owners, losses.double())
    return np.asarray(sums.cpu().numpy(), np.float64)
