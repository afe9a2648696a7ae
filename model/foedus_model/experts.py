"""The experts module of a quantised gpt-oss: packed bytes as buffers, in place of transformers' `GptOssExperts`.

The buffers carry the names of the checkpoint, so that loading is an assignment. Nothing here is trainable and nothing
decoded outlives a call.
"""

from __future__ import annotations

from typing import Any

import torch
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.mxfp4 import GROUP
from foedus_protocols.errors import CheckpointError
from torch import nn


class Mxfp4Experts(nn.Module):
    """Routed experts over MXFP4 weights, with the call signature of transformers' module."""

    def __init__(self, config: Any) -> None:
        """Make empty buffers of the configuration's shapes.

        Raises:
            CheckpointError: A width is not a multiple of the MXFP4 group.
        """
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        if hidden % GROUP or inner % GROUP:
            raise CheckpointError(f"MXFP4 needs widths that are multiples of {GROUP}, got {hidden} and {inner}")
        self.gate = Gate(alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        for name, outs, ins in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            groups = ins // GROUP
            self.register_buffer(f"{name}_blocks", torch.empty(experts, outs, groups, GROUP // 2, dtype=torch.uint8))
            self.register_buffer(f"{name}_scales", torch.empty(experts, outs, groups, dtype=torch.uint8))
            self.register_buffer(f"{name}_bias", torch.empty(experts, outs))

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts: hidden_states [T, K], router_indices and routing_weights [T, top-k] -> [T, K]."""
        packed = PackedExperts(
            self.gate_up_proj_blocks,
            self.gate_up_proj_scales,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_scales,
            self.down_proj_bias,
        )
        return experts_torch(hidden_states, router_indices, routing_weights, packed, self.gate)
