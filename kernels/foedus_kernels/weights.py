"""What a layer of experts asks of its frozen matrices, whatever codec stores them.

A codec is a value: it holds the stored tensors of a stack of matrices and decodes the experts that a call names. The
grouped product (`experts.py`) knows this protocol and no codec. `DenseWeights` stores the matrices as they are;
`mxfp4.py` holds the released layout, and other codecs have their own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class ExpertWeights(Protocol):
    """A frozen stack of matrices [E, N, K], N outputs and K inputs, in some codec.

    A codec's constructor takes the tensors that `tensors` returns, in that order and nothing else, so that an operator
    of `torch.library` can pass them apart from the class.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K), of the decoded stack."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the stack takes as it is stored."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors: what is loaded, moved between devices, and never trained."""
        ...

    def decode(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The matrices of the given experts, which ascend: (len(experts), N, K), contiguous, in `dtype`."""
        ...


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """Matrices stored as they are.

    Attributes:
        values: Floating point [E, N, K].

    Raises:
        ValueError: Not a stack of matrices of a floating type.
    """

    values: torch.Tensor

    def __post_init__(self) -> None:
        """Check the shape and the type."""
        if self.values.dim() != 3 or not self.values.is_floating_point():
            raise ValueError(
                f"expected a floating point stack [E, N, K], got {self.values.dtype} {tuple(self.values.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outs, ins = self.values.shape
        return experts, outs, ins

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.values.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The stack itself."""
        return (self.values,)

    def decode(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The given experts in `dtype`; no copy where they are neighbours and have that type already."""
        return pick(self.values, experts).to(dtype).contiguous()


def pick(stack: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """The given experts of a stack, which ascend: a view where they are neighbours, else a copy."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return stack[experts[0] : experts[-1] + 1]
    return stack.index_select(0, torch.tensor(list(experts), device=stack.device))


def computes_here(stored: torch.Tensor) -> bool:
    """Whether a tensor has values on a CPU and nothing traces the call, so that a decoder need not be an operator.

    The dispatcher takes 10 to 18 us of a call; decoding one matrix of 16 x 64 takes 17 (int8) to 75 (mxfp4) without it
    (one core, 2026-11-25).
    """
    return type(stored) is torch.Tensor and stored.device.type == "cpu" and not torch.compiler.is_compiling()


_CODECS: dict[str, Callable[..., ExpertWeights]] = {}


def codec_of(stack: ExpertWeights) -> str:
    """The name of a stack's codec, by which `codec` makes it again from its tensors inside an operator."""
    kind = type(stack)
    name = f"{kind.__module__}.{kind.__qualname__}"
    _CODECS.setdefault(name, kind)
    return name


def codec(name: str, tensors: Sequence[torch.Tensor]) -> ExpertWeights:
    """The stack that `codec_of` named.

    Raises:
        ValueError: No stack of this codec was met.
    """
    if name not in _CODECS:
        raise ValueError(f"expected a codec among {sorted(_CODECS)}, got {name!r}; `codec_of` makes one known")
    return _CODECS[name](*tensors)
