"""A layer of experts forward by OpenAI's `triton_kernels`, where that package can be imported: K1's rival.

It lives in Triton's repository (``python/triton_kernels``; the project of this name on PyPI is another one), is
nobody's dependency here, and its interface changes between versions. Three are known:

- of Triton 3.4 and 3.5: `matmul_ogs`, whose routing is made by the module `routing`;
- of Triton 3.6: `matmul_ogs`, with the metadata of ragged tensors in its routing;
- after it: `matmul`, which takes these metadata and plain indices, and leaves the sum over a token's experts to
  `reduce`. Layouts are objects from some version on, and pairs of a class and its options before.

Weights take the layout that the package itself proposes for the card. That and the routing are made before the clock
runs, which is to its advantage. Its output is compared with the reference's once: a version that reads indices or
scales otherwise is not supported, and never a figure. Left out: its lower-precision activations, and its backward,
which it does not have for these weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from types import ModuleType
from typing import Any

import torch
from foedus_kernels.experts import PackedExperts
from foedus_kernels.mxfp4 import Mxfp4Weights

NOT_INSTALLED = "not installed"
UNSUPPORTED = "version not supported"
# RMS of the difference over the reference's own. Rounding to bfloat16, which keeps 8 bits, between the products costs
# less than 0.01, rows in a wrong order 1.4.
_FARTHEST = 0.05


class CannotRunError(Exception):
    """A way that this machine cannot measure; the text is what its row says."""


def missing() -> str | None:
    """Why there is nothing to call, or None."""
    return NOT_INSTALLED if importlib.util.find_spec("triton_kernels") is None else None


def checked_forward(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    packed: PackedExperts,
    reference: Callable[[], torch.Tensor],
) -> Callable[[], torch.Tensor]:
    """The layer's forward as the installed version computes it, after one call that equalled the reference.

    Args:
        hidden: (T, K).
        ids: Experts of each token, (T, top_k).
        weights: Of these experts, (T, top_k).
        packed: The layer.
        reference: What makes the output that its own must equal, (T, K).

    Raises:
        CannotRunError: A version of another interface, or of another result.
        torch.OutOfMemoryError: No fault of a version's.
    """
    try:
        forward = _forward(hidden, ids, weights, packed)
        found = forward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Whatever an unknown interface raises is that version's row, and not the bench's end.
        raise CannotRunError(f"{UNSUPPORTED}: {first_line(error)}") from error
    wanted = reference()
    if found.shape != wanted.shape:
        raise CannotRunError(f"{UNSUPPORTED}: its output is {tuple(found.shape)}, not {tuple(wanted.shape)}")
    apart = float((found.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())
    if not apart <= _FARTHEST:  # NaN is no result either.
        raise CannotRunError(f"{UNSUPPORTED}: its output differs from the reference's by {apart:.0%} (RMS)")
    return forward


def first_line(error: Exception) -> str:
    """An exception in at most 160 characters of one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"triton_kernels.{name}")


def _has(name: str) -> bool:
    return importlib.util.find_spec(f"triton_kernels.{name}") is not None


def _forward(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, packed: PackedExperts
) -> Callable[[], torch.Tensor]:
    """The two products, whose weights and routing are ready."""
    experts, top_k = packed.gate_up.shape[0], ids.shape[1]
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # (S,): which row of (T, top_k) stands at each place when experts are in order.
    counts = torch.bincount(flat, minlength=experts).to(torch.int32)  # (E,)
    gammas = weights.flatten()[order].float()
    products = _module("matmul") if _has("matmul") else _module("matmul_ogs")
    warps = 4 if len(hidden) <= 512 else 8  # As the package's own bench chooses for the layout of scales.
    gate_up, gate_up_config = _stored(packed.gate_up, products, warps)
    down, down_config = _stored(packed.down, products, warps)
    gate_up_bias, down_bias = packed.gate_up_bias.float(), packed.down_bias.float()
    activation = _activation(products)

    if not hasattr(products, "matmul_ogs"):
        rows = _module("tensor").make_ragged_tensor_metadata(counts, len(flat))
        gather, scatter = (order // top_k).to(torch.int32), order.to(torch.int32)
        reduce = _module("reduce").reduce

        def by_metadata() -> torch.Tensor:
            inner = products.matmul(
                *(hidden, gate_up, gate_up_bias),
                a_ragged_metadata=rows,
                gather_indx=gather,
                precision_config=gate_up_config,
                fused_activation=activation,
            )
            out = products.matmul(
                *(inner, down, down_bias),
                a_ragged_metadata=rows,
                scatter_indx=scatter,
                precision_config=down_config,
                gammas=gammas,
            )
            return reduce(out.view(len(hidden), top_k, -1), dim=1)[0]

        return by_metadata

    routing, gather, scatter = _routing(products, order, counts, gammas, top_k)

    def by_routing() -> torch.Tensor:
        inner = products.matmul_ogs(
            *(hidden, gate_up, gate_up_bias, routing),
            gather_indx=gather,
            precision_config=gate_up_config,
            fused_activation=activation,
        )
        return products.matmul_ogs(
            *(inner, down, down_bias, routing),
            scatter_indx=scatter,
            precision_config=down_config,
            gammas=gammas,
        )

    return by_routing


def _stored(stack: Mxfp4Weights, products: ModuleType, warps: int) -> tuple[Any, Any]:
    """A stack's bytes in the package's layout, and the configuration that has their scales."""
    blocks, scales = stack.tensors()
    tensors, layouts = _module("tensor"), _module("tensor_details.layout")
    codes = tensors.wrap_torch_tensor(blocks.flatten(-2).mT, dtype=tensors.FP4)  # (E, K, N), contiguous in K
    value = _laid_out(tensors, codes, layouts.make_default_matmul_mxfp4_w_layout)
    choose = partial(layouts.make_default_matmul_mxfp4_w_scale_layout, num_warps=warps)
    scale = _laid_out(tensors, tensors.wrap_torch_tensor(scales.mT), choose)  # (E, K / 32, N)
    known = {field.name for field in fields(products.PrecisionConfig)}
    options = {"b_mx_scale" if "b_mx_scale" in known else "weight_scale": scale}
    if "b_microblock_size" in known:
        options["b_microblock_size"] = 32
    return value, products.PrecisionConfig(**options)


def _laid_out(tensors: ModuleType, tensor: Any, choose: Callable[..., Any]) -> Any:
    """The tensor in the layout that is chosen for the card, along the axis of K."""
    chosen = choose(mx_axis=-2)
    if not isinstance(chosen, tuple):
        return tensors.convert_layout(tensor, chosen)
    kind, options = choose(mx_axis=1)  # Versions with pairs count axes from the front.
    return tensors.convert_layout(tensor, kind, **options)


def _activation(products: ModuleType) -> Any:
    """The clamped SwiGLU of interleaved columns, two of which become one."""
    function, names, values = _module("swiglu").swiglu_fn, ("alpha", "limit"), (1.702, 7.0)
    if "reduction_n" in {field.name for field in fields(products.FnSpecs)}:
        return products.FusedActivation(products.FnSpecs("swiglu", function, names, reduction_n=2), values)
    return products.FusedActivation(products.FnSpecs("swiglu", function, names), values, 2)


def _routing(
    products: ModuleType, order: torch.Tensor, counts: torch.Tensor, gammas: torch.Tensor, top_k: int
) -> tuple[Any, Any, Any]:
    """What `matmul_ogs` takes: routing, and the indices that gather tokens' rows and scatter them back."""
    tensors, experts = _module("tensor"), len(counts)
    if hasattr(tensors, "make_ragged_tensor_metadata"):
        kinds = products
        rows = tensors.make_ragged_tensor_metadata(counts, len(order))
    else:
        kinds = _module("routing")
        rows = kinds.compute_expt_data_torch(counts, experts, len(order))
    source, target = order.to(torch.int32), order.argsort().to(torch.int32)
    return (
        kinds.RoutingData(gammas, counts, experts, top_k, rows),
        kinds.GatherIndx(src_indx=source, dst_indx=target),
        kinds.ScatterIndx(src_indx=target, dst_indx=source),
    )
