"""The experts module of a quantised gpt-oss: stored codes as buffers, in place of transformers' `GptOssExperts`.

`RoutedExperts` is what every layer of experts of ours does, over whatever matrices it holds (`adapter.DenseExperts` is
the other). The quantised one's buffers carry the names of the checkpoint, so that loading is an assignment. Nothing
here is trainable and nothing decoded outlives a call. A dense checkpoint without an adapter keeps transformers' module.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from foedus_kernels.backend import DEQUANTISED, Choice, choose
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.weights import ExpertWeights
from foedus_protocols.errors import ConfigError
from torch import nn

from foedus_model.codecs import codec

_LOG = logging.getLogger(__name__)


class RoutedExperts(nn.Module):
    """Experts over frozen matrices, with the call signature of transformers' module.

    Attributes:
        lora: A module whose call returns the layer's `ExpertLora`, or None.
        row_multiple: As `experts_torch` takes it: 16 where several units share a forward, else 1.
        elsewhere: Where the matrices lie for a forward if not in this module (`streaming.py`): from the ids of experts
            to the matrices and the ids that they have there. The adapter must then be one that all experts share.
        path: As `experts_torch` takes it; `choose_path` sets it for a run.
    """

    def __init__(self, gate: Gate) -> None:
        """Without an adapter yet."""
        super().__init__()
        self.gate = gate
        self.lora: nn.Module | None = None
        self.row_multiple = 1
        self.elsewhere: Callable[[torch.Tensor], tuple[PackedExperts, torch.Tensor]] | None = None
        self.path = DEQUANTISED

    @property
    def quantisation(self) -> str:
        """What stores the matrices, as a manifest says it."""
        return "dense"

    def packed(self) -> PackedExperts:
        """The layer's frozen matrices, as the kernels take them."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts: hidden_states [T, K], router_indices and routing_weights [T, top-k] -> [T, K]."""
        lora: ExpertLora | None = self.lora() if self.lora is not None else None
        packed, ids = (self.packed(), router_indices) if self.elsewhere is None else self.elsewhere(router_indices)
        return experts_torch(
            *(hidden_states, ids, routing_weights, packed, self.gate, lora),
            row_multiple=self.row_multiple,
            path=self.path,
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
        super().__init__(gate_of(config))
        self._codec = codec(quantisation)
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        for name, outs, ins in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            for stored, tensor in self._codec.empty(name, (experts, outs, ins)).items():
                self.register_buffer(stored, tensor)
            self.register_buffer(f"{name}_bias", torch.empty(experts, outs))

    @property
    def quantisation(self) -> str:
        """What stores the matrices, as a manifest says it."""
        return self._codec.name

    def packed(self) -> PackedExperts:
        """The layer's frozen matrices, as the kernels take them."""
        return self.pack(self.stored(), self.gate_up_proj_bias, self.down_proj_bias)

    def stored(self) -> dict[str, torch.Tensor]:
        """The matrices as they are stored, [E, ...] each, by the names of the checkpoint."""
        names = [f"{name}_{suffix}" for name in ("gate_up_proj", "down_proj") for suffix, _, _ in self._codec.parts]
        return {name: self.get_buffer(name) for name in names}

    def pack(
        self, stored: Mapping[str, torch.Tensor], gate_up_bias: torch.Tensor, down_bias: torch.Tensor
    ) -> PackedExperts:
        """Matrices stored as this layer's are, with the biases beside them, as the kernels take them."""
        gate_up, down = (self._weights(stored, name) for name in ("gate_up_proj", "down_proj"))
        return PackedExperts(gate_up, gate_up_bias, down, down_bias)

    def _weights(self, stored: Mapping[str, torch.Tensor], name: str) -> ExpertWeights:
        first, second = (stored[f"{name}_{suffix}"] for suffix, _, _ in self._codec.parts)
        return self._codec.weights(first, second)


def gate_of(config: Any) -> Gate:
    """The activation's constants: gpt-oss's own where the configuration does not name them.

    transformers 5.17 has them in its experts' code and no field for them; a later one fills and checks its fields.

    Raises:
        ValueError: A constant that is no number above 0.
    """
    own = Gate()
    return Gate(
        alpha=_constant("swiglu_alpha", getattr(config, "swiglu_alpha", own.alpha)),
        limit=_constant("swiglu_limit", getattr(config, "swiglu_limit", own.limit)),
    )


def _constant(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise ValueError(f"expected {name} as a number above 0, got {value!r}")
    return float(value)


def choose_path(
    model: nn.Module,
    *,
    rows: int,
    device: torch.device | str | None = None,
    wanted: str | None = None,
    interpreted: bool = False,
) -> Choice | None:
    """Choose how a model's experts multiply, for the whole of a run, and say in the log which way and why.

    Args:
        model: With layers of `RoutedExperts`; changed in place.
        rows: The most tokens that one forward of the run can have. No batch is looked at.
        device: Where it runs; None where its parameters lie. Experts that stream lie elsewhere.
        wanted: ``fused`` or ``dequantised``; None takes what `foedus_kernels.backend.choose` does.
        interpreted: Allow ``fused`` on a CPU by way of Triton's interpreter: for tests.

    Returns:
        The choice; None where the model has no such layer, since transformers' own module then runs.

    Raises:
        ConfigError: The wanted path is none, or cannot run here.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    if not layers:
        return None
    norm = next(parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight"))
    try:
        choice = choose(
            device=norm.device if device is None else device,
            codec=layers[0].quantisation,
            dtype=norm.dtype,
            rows=rows,
            wanted=wanted,
            interpreted=interpreted,
        )
    except ValueError as error:
        raise ConfigError(f"experts: {error}") from error
    for layer in layers:
        layer.path = choice.path
    _LOG.info("experts: %s, since %s", choice.path, choice.why)
    return choice
