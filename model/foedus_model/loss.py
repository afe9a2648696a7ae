"""The losses of records' tokens: what a step differentiates, a score adds up, an evaluation reports and `fit` counts.

Records are one right-padded batch: attention is causal and padding comes last, so no token of a record sees it, and
padding has no loss. Hidden states of answer tokens alone meet the head, whose logits exist a few rows at a time
(`foedus_kernels.cross_entropy`). Left out: how a unit's token losses are weighed, which is the private step's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from foedus_kernels.cross_entropy import cross_entropy_torch
from numpy.typing import NDArray

UnitLoss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Losses of a unit's answer tokens (N,), the record of each (N,), and how many records -> the unit's loss, a number."""


class Record(Protocol):
    """One example: tokens, and which of them are answer tokens that the model should predict."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 (T,)."""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """bool (T,): True where the token carries loss. The first token has no context and never does."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded records: tokens, and where their answers are."""

    tokens: torch.Tensor  # int64 (B, T)
    answers: torch.Tensor  # bool (B, T - 1): position t predicts an answer token at t + 1


def batch_of(records: Sequence[Record], device: torch.device) -> Batch | None:
    """Right-padded records, or None where none of them has an answer token."""
    longest = max((len(record.tokens) for record in records), default=0)
    if longest < 2:
        return None
    tokens = np.zeros((len(records), longest), np.int64)
    answers = np.zeros((len(records), longest - 1), np.bool_)
    for row, record in enumerate(records):
        tokens[row, : len(record.tokens)] = record.tokens
        answers[row, : max(0, len(record.tokens) - 1)] = record.loss_mask[1:]
    if not answers.any():
        return None
    return Batch(tokens=torch.from_numpy(tokens).to(device), answers=torch.from_numpy(answers).to(device))


def device_of(model: Any) -> torch.device:
    """Where a model computes, and so where its tokens have to be: what comes before its head may wait on the host."""
    found: torch.device = model.lm_head.weight.device
    return found


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each answer token in nats, and its record. Logits are made at these only, some rows a time."""
    owners, places = torch.nonzero(batch.answers, as_tuple=True)  # (N,), (N,)
    return losses_at(model, batch.tokens, owners, places), owners


def losses_at(model: Any, tokens: torch.Tensor, owners: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`token_losses` at N given places, for tensors without values too (``meta``), where no mask can be counted.

    Args:
        model: A causal language model of transformers with a frozen head.
        tokens: int64 [B, T].
        owners: int64 [N], the row of each.
        places: int64 [N], the position of each; it predicts the token after it.

    Returns:
        [N], in nats.
    """
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # (B, T, K)
    return head_losses(model, hidden, tokens, owners, places)


def head_losses(
    model: Any, hidden: torch.Tensor, tokens: torch.Tensor, owners: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """`losses_at` from the model's last hidden states, after its norm: [B, T, K] -> [N]."""
    return cross_entropy_torch(hidden[owners, places], model.lm_head.weight, tokens[owners, places + 1])
