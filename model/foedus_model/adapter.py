"""LoRA on a frozen base, tied to one flat vector.

An adapted linear layer computes ``x W + b + (alpha / R) * B(A(x))`` (Hu et al. 2021), split so that the whole ``W +
BA`` is never built; adapted experts do the same for each expert's two matrices (`foedus_kernels.expert_lora`). In a
linear layer A and B are bias-free `nn.Linear` modules, which per-sample gradient tools can hook; in a layer of experts
they are stacks. The layout (`foedus_protocols.layout`) says which matrices exist, which train, and where each lies in
the vector; a layout that names something the model does not have is an error, because an adapter that silently trains
nothing looks like success.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.experts import Gate, PackedExperts
from foedus_kernels.weights import DenseWeights
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import EXPERTS, Layout, Tensor, Vector, fixed_tensors, initial_vector, unflatten
from torch import nn
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from foedus_model.experts import RoutedExperts
from foedus_model.linear import QuantisedLinear

_PREFIX = "base_model.model."
_SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


class LoraLinear(nn.Module):
    """A frozen linear layer, dense or quantised, and a low-rank addition to it."""

    def __init__(self, base: nn.Linear | QuantisedLinear, rank: int, scale: float) -> None:
        """Wrap `base`; both factors start at zero, in the base's compute type and place."""
        super().__init__()
        near = base.weight if isinstance(base, nn.Linear) else base.bias
        place = {"device": near.device, "dtype": near.dtype}
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


class ExpertLoraModule(nn.Module):
    """The low-rank pairs of a layer's experts, P = E for a pair each or P = 1 for one that they share.

    Attributes:
        gate_up_proj_A: [P, R, K].
        gate_up_proj_B: [P, 2N, R].
        down_proj_A: [P, R, N].
        down_proj_B: [P, K, R].
    """

    gate_up_proj_A: nn.Parameter
    gate_up_proj_B: nn.Parameter
    down_proj_A: nn.Parameter
    down_proj_B: nn.Parameter

    def __init__(
        self, gate_up: tuple[int, int, int], rank: int, scale: float, *, shared: bool, like: torch.Tensor
    ) -> None:
        """Make pairs of zeros.

        Args:
            gate_up: (E, 2N, K) of the layer.
            rank: R.
            scale: alpha / R.
            shared: One pair for all experts.
            like: Gives the compute type and the place.
        """
        super().__init__()
        experts, twice, ins = gate_up
        pairs = 1 if shared else experts
        for name, outs, width in (("gate_up_proj", twice, ins), ("down_proj", ins, twice // 2)):
            self.register_parameter(f"{name}_A", nn.Parameter(like.new_zeros(pairs, rank, width)))
            self.register_parameter(f"{name}_B", nn.Parameter(like.new_zeros(pairs, outs, rank)))
        self.scale = scale

    def forward(self) -> ExpertLora:
        """The pairs as the kernels take them."""
        return ExpertLora(self.gate_up_proj_A, self.gate_up_proj_B, self.down_proj_A, self.down_proj_B, self.scale)


class DenseExperts(RoutedExperts):
    """transformers' dense experts with room for an adapter: the same parameters under the same names."""

    def __init__(self, base: GptOssExperts) -> None:
        """Take over the parameters of `base`."""
        super().__init__(Gate(alpha=base.alpha, limit=base.limit))
        self.gate_up_proj, self.gate_up_proj_bias = base.gate_up_proj, base.gate_up_proj_bias  # (E, K, 2N), (E, 2N)
        self.down_proj, self.down_proj_bias = base.down_proj, base.down_proj_bias  # (E, N, K), (E, K)

    def packed(self) -> PackedExperts:
        """The layer's frozen matrices, as the kernels take them."""
        gate_up, down = (DenseWeights(matrix.mT) for matrix in (self.gate_up_proj, self.down_proj))
        return PackedExperts(gate_up, self.gate_up_proj_bias, down, self.down_proj_bias)


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
        layout: What to attach; `layout.adapter_layout` of the model's configuration.
        seed: The public seed of the matrices that do not train.
        alpha: Numerator of the scale alpha / R.
        rank: R.
        fixed: The matrices that do not train, where a folder brings them; they follow from `seed` otherwise.

    Returns:
        The model with its trained parameters in layout order.

    Raises:
        CheckpointError: The layout names a layer that the model does not have, does not fit its shapes, or gives a
            layer only some of its matrices, or nothing at all; or the model already holds an adapter or trainable
            parameters. The model is then as it was.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        raise CheckpointError(f"expected a frozen base, got trainable parameters such as {trainable[0]}")
    sites = _sites(layout)
    values = fixed_tensors(layout, seed) if fixed is None else fixed
    adapted = {path: _adapted(model, path, tensors, rank, alpha / rank) for path, tensors in sites.items()}
    parameters: dict[str, nn.Parameter] = {}
    for path, tensors in sites.items():
        for inner, tensor in tensors.items():
            parameters[tensor.name] = _parameter(adapted[path], inner, tensor)
    for tensor in layout.fixed():
        with torch.no_grad():
            parameters[tensor.name].copy_(torch.from_numpy(values[tensor.name].copy()))
    for path, module in adapted.items():
        _install(model, path, module)
    model.requires_grad_(False)
    trained = [parameters[tensor.name].requires_grad_(True) for tensor in layout.trained()]
    adapter = AttachedAdapter(model=model, layout=layout, trained=trained)
    adapter.load_vector(initial_vector(layout, seed))
    return adapter


def _sites(layout: Layout) -> dict[str, dict[str, Tensor]]:
    """By module path in the base, the tensors that adapt it, under the names that they have in its adapter.

    Raises:
        CheckpointError: There is none, one is no LoRA matrix, or a module gets only some of its matrices.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    for tensor in layout.tensors:
        path, inner = _split(tensor)
        sites.setdefault(path, {})[inner] = tensor
    for path, found in sites.items():
        stacked = any(len(tensor.shape) == 3 for tensor in found.values())
        missing = (_EXPERT_MATRICES if stacked else _LINEAR_MATRICES) - found.keys()
        if missing:
            raise CheckpointError(
                f"expected both LoRA factors for {path}, got only {', '.join(sorted(found))}: "
                f"missing {', '.join(sorted(missing))}"
            )
    if not sites:
        raise CheckpointError("expected an adapter with at least one matrix, got an empty one")
    return sites


_LINEAR_MATRICES = frozenset({"lora_A.weight", "lora_B.weight"})
_EXPERT_MATRICES = frozenset(f"{name}_{factor}" for name in EXPERTS for factor in _SUFFIXES)


def _split(tensor: Tensor) -> tuple[str, str]:
    """PEFT's tensor name -> (module path in the base, name in the module that adapts it)."""
    for factor, suffix in _SUFFIXES.items():
        if not (tensor.name.startswith(_PREFIX) and tensor.name.endswith(suffix)):
            continue
        path = tensor.name[len(_PREFIX) : -len(suffix)]
        if len(tensor.shape) == 2:
            return path, suffix[1:]
        for name, place in EXPERTS.items():
            if path.endswith(f".{place}"):
                return path.removesuffix(place) + "experts", f"{name}_{factor}"
    raise CheckpointError(f"expected a LoRA matrix of a linear layer or of experts, got {tensor.name}: not supported")


def _adapted(
    model: nn.Module, path: str, tensors: Mapping[str, Tensor], rank: int, scale: float
) -> LoraLinear | ExpertLoraModule:
    """The module that adapts the one at a path; nothing in the model changes yet."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"the adapter names {path}, which the base does not have") from error
    stack = next((tensor.shape[0] for tensor in tensors.values() if len(tensor.shape) == 3), None)
    if stack is None and isinstance(module, nn.Linear | QuantisedLinear):
        return LoraLinear(module, rank, scale)
    if stack is not None and isinstance(module, RoutedExperts | GptOssExperts):
        if getattr(module, "lora", None) is not None:
            raise CheckpointError(
                f"expected {path} without an adapter, it already holds an adapter: load the base afresh"
            )
        shape = module.gate_up_proj.mT.shape if isinstance(module, GptOssExperts) else module.packed().gate_up.shape
        return ExpertLoraModule(
            (shape[0], shape[1], shape[2]), rank, scale, shared=stack == 1, like=module.gate_up_proj_bias
        )
    wanted = "plain linear layer" if stack is None else "layer of experts"
    raise CheckpointError(
        f"the adapter names {path}, a {type(module).__name__} and not a {wanted}; "
        "load the base afresh if it already holds an adapter"
    )


def _install(model: nn.Module, path: str, adapted: LoraLinear | ExpertLoraModule) -> None:
    """Put a module's adapter where the model calls it."""
    parent, _, child = path.rpartition(".")
    place = model.get_submodule(parent)
    if isinstance(adapted, LoraLinear):
        setattr(place, child, adapted)
        return
    experts = model.get_submodule(path)
    if isinstance(experts, GptOssExperts):
        experts = DenseExperts(experts)
        setattr(place, child, experts)
    experts.lora = adapted


def _parameter(module: nn.Module, inner: str, tensor: Tensor) -> nn.Parameter:
    parameter = module.get_parameter(inner)
    if parameter.shape != tensor.shape:
        raise CheckpointError(f"{tensor.name}: expected the shape {tuple(parameter.shape)}, got {tensor.shape}")
    return parameter
