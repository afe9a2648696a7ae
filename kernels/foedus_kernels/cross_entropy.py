"""Cross-entropy of a vocabulary's head without its logits: the torch reference, forward and backward.

With hidden states x and the head's matrix W the logits are ``x W^T``, [T, V]: at gpt-oss's 201,088 tokens 1.65 GB in
float32 for 2,048 positions, and as much again for their gradient. Here a few rows' logits exist at a time. Where a
gradient is to come, the forward makes each row's ``(softmax - one-hot) W``, a row of K numbers, while its logits are
there; the backward multiplies it by the row's upstream gradient. The head is frozen and gets no gradient.

The idea is Liger's and Apple's "cut cross-entropy" (Wijmans et al. 2024); torch's `linear_cross_entropy` with options
is the library's form, from 2.13 on. Left out: device code that keeps a tile of logits on the chip, and a trained head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# Logits alive at once, in elements, at least one row. A row's bits may depend on how many rows a product has, and this
# many depend on V alone.
CHUNK_ELEMENTS = 1 << 24


def cross_entropy_torch(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each row in nats.

    Args:
        hidden: [T, K], float32 or bfloat16; float64 for gradient checks.
        head: The head's matrix in the same type, frozen.  # (V, K)
        targets: int64 [T], each in [0, V).

    Returns:
        [T], in float32 (float64 for float64). Logits are made in the type of `hidden` and taken to that of the loss, as
        ``cross_entropy((hidden @ head.T).float(), targets, reduction="none")`` does. Differentiable once in `hidden`.

    Raises:
        ValueError: Shapes or types that do not fit, or a head that requires a gradient: none is computed.
    """
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
        raise ValueError(
            f"expected hidden states (T, K) and a head (V, K) of one type, got {hidden.dtype} {tuple(hidden.shape)} "
            f"and {head.dtype} {tuple(head.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"expected int64 targets ({hidden.shape[0]},), got {targets.dtype} {tuple(targets.shape)}")
    if head.requires_grad:
        raise ValueError("expected a frozen head, got one that requires a gradient: none is computed")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    losses, _ = cross_entropy_forward(hidden, head, targets, needs_grad)
    return losses


@torch.library.custom_op("foedus::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy_torch` as an operator: losses [T], and each row's gradient [T, K] or nothing, (0, K)."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(hidden.shape[0], dtype=exact)
    slopes = hidden.new_empty(hidden.shape[0] if needs_grad else 0, hidden.shape[1])
    size = max(1, CHUNK_ELEMENTS // head.shape[0])
    for start in range(0, hidden.shape[0], size):
        rows, chosen = hidden[start : start + size], targets[start : start + size]
        logits = (rows @ head.T).to(exact)  # (t, V)
        losses[start : start + size] = functional.cross_entropy(logits, chosen, reduction="none")
        if needs_grad:
            slope = torch.softmax(logits, 1)  # (t, V)
            del logits
            slope[torch.arange(chosen.shape[0], device=slope.device), chosen] -= 1.0
            slopes[start : start + size] = slope.to(hidden.dtype) @ head
            del slope
    return losses, slopes


@cross_entropy_forward.register_fake
def _(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(hidden.shape[0], dtype=exact)
    return losses, hidden.new_empty(hidden.shape[0] if needs_grad else 0, hidden.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: torch.Tensor | None, _: object) -> tuple[torch.Tensor | None, ...]:
    (slopes,) = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    return (slopes * grad.unsqueeze(1)).to(slopes.dtype), None, None, None


cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)
