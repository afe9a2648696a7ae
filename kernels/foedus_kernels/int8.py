"""Symmetric 8-bit integers: 64 values along the inputs share one bfloat16 scale.

Layout of a matrix with ``N`` outputs and ``K`` inputs, row-major over outputs::

    codes   int8 [..., N, K]          from -127 to 127
    scales  bfloat16 [..., N, K/64]   a value is code * scale

A code has 7 bits and a scale 8, so the product is exact in float32, and a bfloat16 decode rounds it once. At 8.25 bits
a value this is closer to Gaussian weights (0.60 % in the root mean square) than bitsandbytes' block-wise 8-bit code
(0.95 % with the same groups, 1.08 % with its 256; it spends its codes near zero, for optimiser states) and than one
scale a row (0.79 %); and it decodes several times as fast, being one cast and one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foedus_kernels.weights import computes_here, pick

GROUP = 64
LARGEST_CODE = 127

_SMALLEST_SCALE = 2.0**-126  # The smallest normal number of bfloat16: some devices flush what lies below.
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class Int8Weights:
    """A frozen stack of matrices in 8 bits (`weights.ExpertWeights`).

    Attributes:
        codes: int8 [E, N, K].
        scales: bfloat16 [E, N, K/64].

    Raises:
        ValueError: Shapes or types that do not belong together.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        """Check shapes and types."""
        _check_stored(self.codes, self.scales)
        if self.codes.dim() != 3:
            raise ValueError(f"expected a stack of codes [E, N, K], got the shape {tuple(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outs, ins = self.codes.shape
        return experts, outs, ins

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 8.25 bits a value."""
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales."""
        return self.codes, self.scales

    def decode(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The given experts, which ascend, in `dtype`: (len(experts), N, K), contiguous."""
        return decode(pick(self.codes, experts), pick(self.scales, experts), dtype)


def encode(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a dense matrix to 8 bits.

    The scale is the group's largest magnitude over 127, rounded up to a bfloat16, so that no code is clipped.

    Args:
        dense: [..., K], floating point and finite, K a multiple of 64.

    Returns:
        codes int8 [..., K] and scales bfloat16 [..., K/64]. A decoded value is off by at most half its scale, and so by
        at most 1/252 of its group's largest magnitude (below 2^-119 of which the scale stays at 2^-126).

    Raises:
        ValueError: K is not a multiple of 64, or a value is not finite or above 2^126.
    """
    if dense.shape[-1] == 0 or dense.shape[-1] % GROUP:
        raise ValueError(f"int8 stores groups of {GROUP} inputs, got {dense.shape[-1]} inputs")
    groups = dense.detach().float().unflatten(-1, (-1, GROUP))  # (..., G, 64)
    largest = groups.abs().amax(-1)  # (..., G)
    if not bool(torch.isfinite(largest).all()) or bool((largest > 2.0**126).any()):
        raise ValueError("expected finite weights below 2^126, got others: they cannot be stored as int8")
    scales = _rounded_up((largest / LARGEST_CODE).clamp(min=_SMALLEST_SCALE))
    codes = torch.round(groups / scales.float().unsqueeze(-1)).clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes.to(torch.int8).flatten(-2), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode 8-bit values: exact in float32 and float64, rounded once in bfloat16.

    Args:
        codes: int8 [..., K].
        scales: bfloat16 [..., K/64].
        dtype: float32, bfloat16 or float64.

    Returns:
        [..., K] in `dtype`, contiguous.

    Raises:
        ValueError: A wrong shape or type, or another `dtype`.
    """
    return (decode_torch if computes_here(codes) else _operator)(codes, scales, dtype)


def decode_torch(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference of `decode`."""
    _check_decoded(codes, scales, dtype)
    values = codes.contiguous().to(dtype).view(*scales.shape, GROUP)  # (..., G, 64), a copy
    return values.mul_(scales.to(dtype).unsqueeze(-1)).flatten(-2)  # (..., K)


# An operator by its schema, as MXFP4's is.
torch.library.define("foedus::int8_decode", "(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor")
torch.library.impl("foedus::int8_decode", "default", decode_torch)
_operator = torch.ops.foedus.int8_decode.default


@torch.library.register_fake("foedus::int8_decode")
def _(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check_decoded(codes, scales, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 to the next bfloat16 that is not smaller: the upper half of the bits, plus one if any is cut."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _check_decoded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
    _check_stored(codes, scales)
    if dtype not in _DTYPES:
        raise ValueError(f"int8 decodes to float32, bfloat16 and float64, not to {dtype}")


def _check_stored(codes: torch.Tensor, scales: torch.Tensor) -> None:
    if codes.dtype != torch.int8 or scales.dtype != torch.bfloat16:
        raise ValueError(f"expected int8 codes and bfloat16 scales, got {codes.dtype} and {scales.dtype}")
    if codes.shape != (*scales.shape[:-1], scales.shape[-1] * GROUP):
        raise ValueError(
            f"expected codes of shape {(*scales.shape[:-1], scales.shape[-1] * GROUP)} for scales of shape "
            f"{tuple(scales.shape)}, got {tuple(codes.shape)}"
        )
