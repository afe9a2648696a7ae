"""MXFP4 as gpt-oss stores it: 32 values share one power-of-two scale, each value is a 4-bit float.

Layout of a matrix with ``N`` outputs and ``K`` inputs, row-major over outputs::

    blocks  uint8 [..., N, K/32, 16]   two e2m1 codes a byte, the earlier input in the low nibble
    scales  uint8 [..., N, K/32]       e8m0: the group's 32 values are multiplied by 2^(scale - 127)

(OCP Microscaling Formats specification 1.0.) Decoding is exact in bfloat16 and float32 and is not in float16, which is
therefore refused. This is the torch reference, and the path of a CPU: a table from a group's scale and a byte to the
byte's two values, one gather. It runs on CUDA as well; a Triton kernel that never writes the decoded values is the
heavier alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from foedus_kernels import backend
from foedus_kernels.weights import computes_here, pick

GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS = 127

# The largest scale byte whose group stays finite (6 * 2^125 does, 6 * 2^126 does not) and the smallest whose half is
# still a normal number in bfloat16 and float32. Trained weights sit near 120.
LARGEST_SCALE = 252
SMALLEST_SCALE = 2

_LARGEST_CODE_EXPONENT = 2  # 4 = 2^2 is the largest power of two among the codes.
_FLOAT64_BIAS = 1023
_BYTES = GROUP // 2  # Of a group.
# Groups decoded at once on a CPU: their indices and values, 1 MiB in bfloat16, stay in a cache, and calls are few.
DECODE_GROUPS = 1 << 13
# The two values of a byte as one element, because a gather of single elements is vectorised and one of rows is not.
_PAIR = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@dataclass(frozen=True, eq=False)
class Mxfp4Weights:
    """A stack of matrices in the released layout (`weights.ExpertWeights`).

    Attributes:
        blocks: uint8 [E, N, K/32, 16].
        scales: uint8 [E, N, K/32].

    Raises:
        ValueError: A wrong shape or type.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        """Check the shapes and the types."""
        check_packed(self.blocks, self.scales)
        if self.scales.dim() != 3:
            raise ValueError(f"expected scales [E, N, K/{GROUP}] of a stack, got {tuple(self.scales.shape)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K), of the decoded stack."""
        experts, outs, groups = self.scales.shape
        return experts, outs, groups * GROUP

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales: 17 for 32 values."""
        return self.blocks.nbytes + self.scales.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The codes and the scales."""
        return self.blocks, self.scales

    def decode(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The given experts' matrices, exactly: (len(experts), N, K)."""
        return decode(pick(self.blocks, experts), pick(self.scales, experts), dtype)


def decode(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode MXFP4 exactly.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G]. Bytes from 2 to 252, which is checked when a checkpoint is opened, not here.
        dtype: `torch.float32`, `torch.bfloat16`, or `torch.float64` (by way of float32).

    Returns:
        [..., G * 32] in `dtype`, contiguous.

    Raises:
        ValueError: A wrong shape or type, or a dtype in which the values are not exact.
    """
    chosen = decode_torch if computes_here(blocks) else _operator
    if dtype == torch.float64:
        return chosen(blocks, scales, torch.float32).double()
    return chosen(blocks, scales, dtype)


def decode_torch(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference of `decode`, for float32 and bfloat16."""
    check_packed(blocks, scales)
    _check_exact(dtype)
    codes, groups = blocks.reshape(-1, _BYTES), scales.reshape(-1, 1)  # (G, 16), (G, 1) over all leading axes
    table = _pair_table(dtype, blocks.device)
    values = torch.empty(groups.shape[0] * GROUP, dtype=dtype, device=blocks.device)
    pairs = values.view(table.dtype)  # (G * 16,)
    size = DECODE_GROUPS if blocks.device.type == "cpu" else max(1, groups.shape[0])
    for start in range(0, groups.shape[0], size):
        stop = min(start + size, groups.shape[0])
        entries = codes[start:stop].to(torch.int32).add_(groups[start:stop].to(torch.int32) << 8)  # (size, 16)
        torch.index_select(table, 0, entries.view(-1), out=pairs[start * _BYTES : stop * _BYTES])
    return values.view(*scales.shape[:-1], scales.shape[-1] * GROUP)  # (..., K)


# An operator, so that tracers see its shape and another device brings a kernel of its own. Defined by its schema, since
# a call by way of `torch.library.custom_op` costs four times as much.
torch.library.define("foedus::mxfp4_decode", "(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor")
torch.library.impl("foedus::mxfp4_decode", "default", decode_torch)
_operator = torch.ops.foedus.mxfp4_decode.default


def _decode_on_cuda(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """K0 in Triton where the machine can, which has the reference's bits."""
    code = backend.device_code("mxfp4", blocks.device)
    return decode_torch(blocks, scales, dtype) if code is None else code.decode(blocks, scales, dtype)


torch.library.impl("foedus::mxfp4_decode", "cuda", _decode_on_cuda)


@torch.library.register_fake("foedus::mxfp4_decode")
def _(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_packed(blocks, scales)
    _check_exact(dtype)
    return scales.new_empty(*scales.shape[:-1], scales.shape[-1] * GROUP, dtype=dtype)


def encode(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a dense matrix to MXFP4.

    Each group takes the scale 2^(floor(log2 max|x|) - 2), or the next larger one where that makes the group's squared
    error smaller (the first clips values above 6 units, the second never clips). Values round to the nearest code, ties
    to the even mantissa. A matrix that is already on the grid comes back unchanged.

    Args:
        dense: [..., K], floating point and finite, K a multiple of 32.

    Returns:
        blocks uint8 [..., K/32, 16] and scales uint8 [..., K/32].

    Raises:
        ValueError: K is not a multiple of 32, or a value is not finite or beyond the largest group.
    """
    if dense.shape[-1] % GROUP:
        raise ValueError(f"MXFP4 stores groups of {GROUP} inputs, got {dense.shape[-1]} inputs")
    groups = dense.detach().float().unflatten(-1, (-1, GROUP))  # (..., G, 32)
    largest = groups.abs().amax(-1)  # (..., G)
    if not bool(torch.isfinite(largest).all()) or bool((largest > 2.0**126).any()):
        raise ValueError("expected finite weights below 2^126, got others: they cannot be stored as MXFP4")
    _, exponent = torch.frexp(largest)  # largest = m * 2^exponent, m in [0.5, 1)
    tight = (exponent - 1 - _LARGEST_CODE_EXPONENT + SCALE_BIAS).clamp(SMALLEST_SCALE, LARGEST_SCALE - 1)
    tight = torch.where(largest == 0, SCALE_BIAS, tight).to(torch.uint8)
    wide = tight + 1
    codes, error = _round_groups(groups, tight)
    wide_codes, wide_error = _round_groups(groups, wide)
    better = wide_error < error
    scales = torch.where(better, wide, tight)
    codes = torch.where(better.unsqueeze(-1), wide_codes, codes)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales


def _round_groups(groups: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., G, 32) of the nearest values at given scales, and the squared error (..., G)."""
    unit = _scale_values(scales).unsqueeze(-1)
    scaled = groups / unit
    magnitude = scaled.abs().clamp_(max=6.0)
    # The spacing of e2m1 is 1/2 below 2, 1 from 2 to 4 and 2 above; `round` takes ties to the even multiple.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    levels = torch.tensor(E2M1[:8], device=groups.device)
    codes = torch.searchsorted(levels, rounded.contiguous()).to(torch.uint8)
    codes |= torch.signbit(groups).to(torch.uint8) << 3
    error = (rounded - scaled.abs()).mul_(unit).square_().sum(-1)
    return codes, error


def _scale_values(scales: torch.Tensor) -> torch.Tensor:
    """2^(scale - 127) in float32, by placing the byte where the format keeps its exponent."""
    return (scales.to(torch.int32) << 23).view(torch.float32)


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For each scale and byte the byte's two values, lower nibble first, seen as one element: (65536,).

    512 KiB in float32, of which a matrix touches 2 KiB for each of its scales. On Zen 5 (2026-11-26, stacks of 960 x
    480 and 5760 x 2880) 1.2 to 1.3 times as fast in float32, and 1.4 in bfloat16, as a table from two bytes to four
    values with a product after it.
    """
    entries = torch.arange(1 << 16, device=device)
    values = torch.tensor(E2M1, dtype=torch.float64, device=device)
    scales = ((entries >> 8) - SCALE_BIAS + _FLOAT64_BIAS << 52).view(torch.float64)
    pairs = torch.stack([values[(entries >> shift) & 15] * scales for shift in (0, 4)], dim=-1)  # (65536, 2)
    return pairs.to(dtype).view(_PAIR[dtype]).squeeze(-1)


def _check_exact(dtype: torch.dtype) -> None:
    if dtype not in _PAIR:
        raise ValueError(f"MXFP4 decodes exactly to float32 and bfloat16, not to {dtype}")


def check_packed(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"expected uint8 blocks and scales, got {blocks.dtype} and {scales.dtype}")
    if blocks.shape != (*scales.shape, GROUP // 2):
        raise ValueError(
            f"expected blocks of shape {(*scales.shape, GROUP // 2)} for scales of shape {tuple(scales.shape)}, "
            f"got {tuple(blocks.shape)}"
        )
