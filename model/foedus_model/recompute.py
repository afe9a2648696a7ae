"""Gradient checkpointing: keep each layer's input, and compute the layer again in the backward pass.

A layer's activations then live while its own backward runs, so a step holds one layer's and every layer's input
(Chen et al. 2016, "Training deep nets with sublinear memory cost") for about a third more arithmetic. The second
forward runs the same operations on the same tensors: gradients are equal to the bit wherever operations are
deterministic.

transformers' own switch acts in training mode alone, and training here is in evaluation mode (no dropout), so layers
are wrapped from outside. What is kept can wait on the host, so that a step of long texts holds one layer's input on the
device instead of all (120b: 207 KB a token). Copies to the host are not hidden behind the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

_KEPT = "_foedus_recomputed"
"""What a wrapped layer calls its own forward, and whether its input waits on the host."""


def recompute_layers(model: nn.Module, *, offload: bool = False) -> None:
    """Have every decoder layer computed again in the backward pass, from now on.

    Args:
        model: A `GptOssForCausalLM`, with an adapter or without; changed in place. A second call changes nothing but
            where inputs wait.
        offload: Keep the layers' inputs on the host.

    A forward without gradients, or one that fills a cache (which a second pass would fill twice), runs as before.
    """
    for layer in model.model.layers:
        own, _ = getattr(layer, _KEPT, (layer.forward, offload))
        layer.forward = _recomputed(own, offload)
        setattr(layer, _KEPT, (own, offload))


@contextmanager
def kept(layer: nn.Module) -> Iterator[None]:
    """Run a layer without computing it again, for a caller that does so itself."""
    found = getattr(layer, _KEPT, None)
    if found is None:
        yield
        return
    wrapped, layer.forward = layer.forward, found[0]
    try:
        yield
    finally:
        layer.forward = wrapped


def _recomputed(forward: Callable[..., Any], offload: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)
        # Nothing draws random numbers: there is no generator's state to put back.
        again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if not offload:
            return again(*args, **kwargs)
        with save_on_cpu(pin_memory=args[0].is_cuda):  # The layer's input; what is kept inside has hooks of its own.
            return again(*args, **kwargs)

    return run
