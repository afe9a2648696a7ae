"""LoRA on a frozen base, tied to one flat vector.

An adapted linear layer computes ``x W + b + (alpha / R) * B(A(x))`` (Hu et al. 2021), split so that the whole ``W +
BA`` is never built. A and B are bias-free `nn.Linear` modules, which per-sample gradient tools can hook. The layout
(`foedus_protocols.layout`) says which matrices exist, which train, and where each lies in the vector; a layout that
names something the model does not have is an error, because an adapter that silently trains nothing looks like success.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import Layout, Tensor, Vector, fixed_tensors, initial_vector, unflatten
from torch import nn
from transformers import GptOssForCausalLM

_PREFIX = "base_model.model."
_SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank addition to it."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Wrap `base`; both factors start at zero, in the base's type and place."""
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        self.scale = scale
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs [..., in] -> [..., out]."""
        # The scale is applied to the R columns in the middle, the smallest tensor on the way.
        return self.base(inputs) + self.lora_B(self.lora_A(inputs) * self.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttachedAdapter:
    """A model with an adapter in it.

    Attributes:
        model: The adapted model, the object that was passed to `attach`.
        layout: Where each matrix lies in the vector.
        trained: The trained parameters in layout order: the only ones that require a gradient.
    """

    model: GptOssForCausalLM
    layout: Layout
    trained: list[nn.Parameter]

    def load_vector(self, vector: Vector) -> None:
        """Set the trained matrices.

        Args:
            vector: float32 (d,).

        Raises:
            CheckpointError: A wrong length or type, or a value that is not finite.
        """
        matrices = unflatten(self.layout, vector)
        if not bool(np.isfinite(vector).all()):
            raise CheckpointError("expected a finite adapter vector, got values that are not")
        with torch.no_grad():
            for tensor, parameter in zip(self.layout.trained(), self.trained, strict=True):
                parameter.copy_(torch.from_numpy(matrices[tensor.name].copy()))

    def vector(self) -> Vector:
        """The trained matrices as one float32 vector (d,), a copy."""
        flat = torch.cat([parameter.detach().float().reshape(-1) for parameter in self.trained])
        return flat.cpu().numpy()


def attach(
    model: GptOssForCausalLM,
    layout: Layout,
    *,
    seed: str,
    alpha: float,
    rank: int,
    fixed: Mapping[str, Vector] | None = None,
) -> AttachedAdapter:
    """Put an adapter into a frozen base, with zero trained matrices: it changes nothing until a vector is loaded.

    Args:
        model: A model of `build.load_base`; changed in place, nothing of its own becomes trainable.
        layout: What to attach; `layout.attention_layout` of the model's configuration.
        seed: The public seed of the matrices that do not train.
        alpha: Numerator of the scale alpha / R.
        rank: R.
        fixed: The matrices that do not train, where a folder brings them; they follow from `seed` otherwise.

    Returns:
        The model with its trained parameters in layout order.

    Raises:
        CheckpointError: The layout names a layer that the model does not have, does not fit its shapes, or gives a
            layer one factor only; or the model already holds an adapter or trainable parameters.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        raise CheckpointError(f"expected a frozen base, got trainable parameters such as {trainable[0]}")
    wrapped = {path: _wrapped(model, path, rank, alpha / rank) for path in _target_paths(layout)}
    values = fixed_tensors(layout, seed) if fixed is None else fixed
    parameters: dict[str, nn.Parameter] = {}
    for tensor in layout.tensors:
        path, factor = _split(tensor)
        parameters[tensor.name] = _factor(wrapped[path], factor, tensor)
    for tensor in layout.fixed():
        with torch.no_grad():
            parameters[tensor.name].copy_(torch.from_numpy(values[tensor.name].copy()))
    for path, module in wrapped.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    model.requires_grad_(False)
    trained = [parameters[tensor.name].requires_grad_(True) for tensor in layout.trained()]
    adapter = AttachedAdapter(model=model, layout=layout, trained=trained)
    adapter.load_vector(initial_vector(layout, seed))
    return adapter


def _target_paths(layout: Layout) -> list[str]:
    """The module paths that a layout adapts, each of which must have both factors."""
    factors: dict[str, set[str]] = {}
    for tensor in layout.tensors:
        path, factor = _split(tensor)
        factors.setdefault(path, set()).add(factor)
    for path, found in factors.items():
        if found != {"A", "B"}:
            raise CheckpointError(f"expected both LoRA factors for {path}, got only lora_{found.pop()}")
    return list(factors)


def _split(tensor: Tensor) -> tuple[str, str]:
    """PEFT's tensor name -> (module path in the base, factor)."""
    for factor, suffix in _SUFFIXES.items():
        if tensor.name.startswith(_PREFIX) and tensor.name.endswith(suffix):
            return tensor.name[len(_PREFIX) : -len(suffix)], factor
    raise CheckpointError(f"expected a LoRA matrix of a linear layer, got {tensor.name}: not supported")


def _wrapped(model: nn.Module, path: str, rank: int, scale: float) -> LoraLinear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"the adapter names {path}, which the base does not have") from error
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"the adapter names {path}, a {type(module).__name__} and not a plain linear layer; "
            "load the base afresh if it already holds an adapter"
        )
    return LoraLinear(module, rank, scale)


def _factor(module: LoraLinear, factor: str, tensor: Tensor) -> nn.Parameter:
    weight = (module.lora_A if factor == "A" else module.lora_B).weight
    if weight.shape != tensor.shape:
        raise CheckpointError(f"{tensor.name}: expected the shape {tuple(weight.shape)}, got {tensor.shape}")
    return weight
