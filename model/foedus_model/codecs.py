"""The quantisations by name: how each stores a matrix, under which names, and what encodes and decodes it.

``mxfp4`` keeps the released bytes of gpt-oss's experts. ``nf4`` and ``int8`` are for models that ship dense, and store
the attention's linear layers as well. ``dense`` is no codec: transformers' own modules hold such weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from foedus_kernels import int8, mxfp4, nf4
from foedus_kernels.weights import ExpertWeights
from foedus_protocols.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store matrices [..., N, K], in groups along the K inputs.

    Attributes:
        name: As the manifest says it.
        group: Inputs that share a scale.
        linears: Whether the attention's linear layers are stored like the experts.
        encode: A dense tensor [..., N, K] -> the stored tensors, in the order of `parts`. Raises ValueError.
        weights: The stored tensors of a stack [E, N, K] -> what decodes it.
        parts: Of each stored tensor its name's suffix, its type, and its trailing shape for K inputs.
    """

    name: str
    group: int
    linears: bool
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    weights: Callable[[torch.Tensor, torch.Tensor], ExpertWeights]
    parts: tuple[tuple[str, torch.dtype, Callable[[int], tuple[int, ...]]], ...]

    def empty(self, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Empty stored tensors of a matrix or stack of `shape` [..., N, K], by name.

        Raises:
            CheckpointError: K is not a multiple of the group.
        """
        *outs, ins = shape
        if ins == 0 or ins % self.group:
            raise CheckpointError(
                f"{name}: expected inputs in multiples of {self.group} for {self.name}, got {ins}; "
                "take another quantisation"
            )
        return {f"{name}_{suffix}": torch.empty(*outs, *tail(ins), dtype=dtype) for suffix, dtype, tail in self.parts}


CODECS = {
    codec.name: codec
    for codec in (
        Codec(
            name="mxfp4",
            group=mxfp4.GROUP,
            linears=False,
            encode=mxfp4.encode,
            weights=mxfp4.Mxfp4Weights,
            parts=(
                ("blocks", torch.uint8, lambda ins: (ins // mxfp4.GROUP, mxfp4.GROUP // 2)),
                ("scales", torch.uint8, lambda ins: (ins // mxfp4.GROUP,)),
            ),
        ),
        Codec(
            name="nf4",
            group=nf4.GROUP,
            linears=True,
            encode=nf4.encode,
            weights=nf4.Nf4Weights,
            parts=(
                ("codes", torch.uint8, lambda ins: (ins // 2,)),
                ("scales", torch.float32, lambda ins: (ins // nf4.GROUP,)),
            ),
        ),
        Codec(
            name="int8",
            group=int8.GROUP,
            linears=True,
            encode=int8.encode,
            weights=int8.Int8Weights,
            parts=(
                ("codes", torch.int8, lambda ins: (ins,)),
                ("scales", torch.bfloat16, lambda ins: (ins // int8.GROUP,)),
            ),
        ),
    )
}


def codec(name: str) -> Codec:
    """A codec by its name.

    Raises:
        CheckpointError: Nothing stores weights under this name.
    """
    found = CODECS.get(name)
    if found is None:
        raise CheckpointError(f"expected weights stored as {', '.join(CODECS)}, got {name!r}: not supported")
    return found
