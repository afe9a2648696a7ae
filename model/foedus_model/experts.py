"""The experts module of a quantised gpt-oss: stored codes as buffers, in place of transformers' `GptOssExperts`.

`RoutedExperts` is what every layer of experts of ours does, over whatever matrices it holds (`adapter.DenseExperts` is
the other). The quantised one's buffers carry the names of the checkpoint, so that loading is an assignment. Nothing
here is trainable and nothing decoded outlives a call. A dense checkpoint without an adapter keeps transformers' module.
"""

from __future__ import annotations

from typing import Any

import torch
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.weights import ExpertWeights
from torch import nn

from foedus_model.codecs import codec


class RoutedExperts(nn.Module):
    """Experts over frozen matrices, with the call signature of transformers' module.

    Attributes:
        lora: A module whose call returns the layer's `ExpertLora`, or None.
        row_multiple: As `experts_torch` takes it: 16 where several units share a forward, else 1.
    """

    def __init__(self, gate: Gate) -> None:
        """Without an adapter yet."""
        super().__init__()
        self.gate = gate
        self.lora: nn.Module | None = None
        self.row_multiple = 1

    def packed(self) -> PackedExperts:
        """The layer's frozen matrices, as the kernels take them."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts: hidden_states [T, K], router_indices and routing_weights [T, top-k] -> [T, K]."""
        lora: ExpertLora | None = self.lora() if self.lora is not None else None
        return experts_torch(
            *(hidden_states, router_indices, routing_weights, self.packed(), self.gate, lora),
            row_multiple=self.row_multiple,
        )


class QuantisedExperts(RoutedExperts):
    """Experts over quantised weights."""

    def __init__(self, config: Any, quantisation: str) -> None:
        """Make empty buffers of the configuration's shapes.

        Args:
            config: A `GptOssConfig`.
            quantisation: ``mxfp4``, ``nf4`` or ``int8``.

        Raises:
            CheckpointError: Another quantisation, or a width that is not a multiple of its group.
        """
        super().__init__(Gate(alpha=config.swiglu_alpha, limit=config.swiglu_limit))
        self._codec = codec(quantisation)
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        for name, outs, ins in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            for stored, tensor in self._codec.empty(name, (experts, outs, ins)).items():
                self.register_buffer(stored, tensor)
            self.register_buffer(f"{name}_bias", torch.empty(experts, outs))

    def packed(self) -> PackedExperts:
        """The layer's frozen matrices, as the kernels take them."""
        return PackedExperts(
            self._weights("gate_up_proj"), self.gate_up_proj_bias, self._weights("down_proj"), self.down_proj_bias
        )

    def _weights(self, name: str) -> ExpertWeights:
        first, second = (self.get_buffer(f"{name}_{suffix}") for suffix, _, _ in self._codec.parts)
        return self._codec.weights(first, second)
