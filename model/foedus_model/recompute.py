"""Gradient checkpointing: keep each layer's input, and compute the layer again in the backward pass.

A layer's activations then live while its own backward runs, so a step holds one layer's and every layer's input
(Chen et al. 2016, "Training deep nets with sublinear memory cost") for about a third more arithmetic. The second
forward runs the same operations on the same tensors: gradients are equal to the bit wherever operations are
deterministic.

transformers' own switch acts in training mode alone, and training here is in evaluation mode (no dropout), so layers
are wrapped from outside. Offloading what is kept to the host is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_WRAPPED = "_foedus_recomputed"


def recompute_layers(model: nn.Module) -> None:
    """Have every decoder layer computed again in the backward pass, from now on.

    Args:
        model: A `GptOssForCausalLM`, with an adapter or without; changed in place. A second call changes nothing.

    A forward without gradients, or one that fills a cache (which a second pass would fill twice), runs as before.
    """
    for layer in model.model.layers:
        if not hasattr(layer, _WRAPPED):
            layer.forward = _recomputed(layer.forward)
            setattr(layer, _WRAPPED, True)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)
        # Nothing draws random numbers: there is no generator's state to put back.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
