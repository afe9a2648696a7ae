"""A frozen linear layer whose matrix stays quantised.

The matrix is decoded for the product and again for the gradient of the input; nothing decoded outlives a call. (A
layer of 120b's attention decoded is 27 MB for q; keeping all would undo the quantisation.) There is no gradient
for the matrix or the bias. The product is torch's; the fused kernels of bitsandbytes are the heavier alternative,
and round differently for one row than for many.
"""

from __future__ import annotations

from typing import Any

import torch
from foedus_kernels.weights import ExpertWeights
from foedus_protocols.errors import CheckpointError
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from foedus_model.codecs import codec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class QuantisedLinear(nn.Module):
    """``x W^T + b`` over a quantised W.

    The buffers are named after the matrix, ``weight_codes`` and ``weight_scales`` (``weight_blocks`` for MXFP4); the
    bias is in the compute type.
    """

    def __init__(self, in_features: int, out_features: int, quantisation: str) -> None:
        """Make empty buffers.

        Raises:
            CheckpointError: An unknown quantisation, or `in_features` is not a multiple of its group.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._codec = codec(quantisation)
        stored = self._codec.empty("weight", (out_features, in_features))
        self._names = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs [..., K] -> [..., N]."""
        return _Linear.apply(inputs, self.bias, self._weights())

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in `dtype`: (N, K)."""
        return self._weights().decode((0,), dtype)[0]

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        return f"in_features={self.in_features}, out_features={self.out_features}, quantisation={self._codec.name}"

    def _weights(self) -> ExpertWeights:
        first, second = (self.get_buffer(name).unsqueeze(0) for name in self._names)
        return self._codec.weights(first, second)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        ctx.weights = weights  # Frozen: not a tensor that autograd has to watch.
        return functional.linear(inputs, weights.decode((0,), inputs.dtype)[0], bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grad @ ctx.weights.decode((0,), grad.dtype)[0], None, None


def quantise_linears(model: nn.Module, quantisation: str) -> None:
    """Swap q, k, v, o of every layer for empty `QuantisedLinear`, where this quantisation stores them.

    Args:
        model: A `GptOssForCausalLM` on the meta device, changed in place.
        quantisation: ``nf4`` and ``int8`` swap; ``mxfp4`` and ``dense`` keep the attention dense.

    Raises:
        CheckpointError: An unknown quantisation, an odd width, or a layer without a bias.
    """
    if quantisation == "dense" or not codec(quantisation).linears:
        return
    for layer in model.model.layers:
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            if linear.bias is None:
                raise CheckpointError(f"expected {name} with a bias for {quantisation}, got a model without")
            setattr(layer.self_attn, name, QuantisedLinear(linear.in_features, linear.out_features, quantisation))
