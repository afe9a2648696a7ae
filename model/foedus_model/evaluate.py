"""Losses of rows of tokens under a model: the one measurement that every figure of an evaluation is made of.

A row is tokens with a mark on those that are predicted. Its loss is the sum of their cross-entropies in nats, which is
also minus the log-likelihood of the marked text; accuracy by likelihood (as in Brown et al. 2020, section 2.4) compares
it between rows that differ in their answers only. Rows are right-padded: attention is causal, so no token sees padding.

Left out: answers that are generated and then read; they would measure the format as much as the knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

_BATCH_TOKENS = 4096


class Row(Protocol):
    """Tokens, and which of them are predicted."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 (T,)."""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """bool (T,); the first token has no context and never is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLosses:
    """What `row_losses` gives.

    Attributes:
        nats: Sum of the cross-entropies of each row's predicted tokens.  # float64 (rows,)
        tokens: How many there are.  # int64 (rows,)
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]


def row_losses(model: Any, rows: Sequence[Row], *, batch_tokens: int = _BATCH_TOKENS) -> RowLosses:
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
def _measure(model: Any, rows: Sequence[Row]) -> NDArray[np.float64]:
    """One forward.  # float64 (rows,)"""
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    marked = np.zeros((len(rows), longest - 1), np.bool_)  # Position t predicts t + 1.
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
        marked[place, : len(row.tokens) - 1] = row.loss_mask[1:]
    inputs, answers = torch.from_numpy(tokens).to(model.device), torch.from_numpy(marked).to(model.device)
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state  # (B, T, K)
    logits = model.lm_head(hidden[:, :-1][answers]).float()  # (N, vocabulary): at predicted tokens only
    losses = F.cross_entropy(logits, inputs[:, 1:][answers], reduction="none").double()  # (N,)
    owners = torch.nonzero(answers)[:, 0]  # (N,)
    sums = torch.zeros(len(rows), dtype=torch.float64, device=losses.device).index_add_(0, owners, losses)
    return np.asarray(sums.cpu().numpy(), np.float64)
