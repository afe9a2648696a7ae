"""NF4 as bitsandbytes stores it: 64 values share one float32 scale, each value is one of 16 quantiles of a Gaussian.

Layout of a matrix with ``N`` outputs and ``K`` inputs, row-major over outputs::

    codes   uint8 [..., N, K/2]      two codes a byte, the earlier input in the *high* nibble (MXFP4 has it in the low)
    scales  float32 [..., N, K/64]   the largest magnitude of the group; a value is code book[code] * scale

(Dettmers et al. 2023, "QLoRA", appendix E.) The torch reference here gives bitsandbytes' bits in both directions. Where
bitsandbytes is installed and faster it decodes: on CUDA, and on a CPU to float32, or to bfloat16 where it has
AVX-512. A short probe compares its bits with the reference's first, so that a result never depends on what is
installed. Left out: double quantisation of the scales (`compress_statistics`), which saves 0.4 bits a value.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from foedus_kernels.weights import pick

GROUP = 64
CODE_BOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values; code 7 is zero."""

_TINY = 1e-38  # bitsandbytes divides by at least this.
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_Decoder = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Nf4Weights:
    """A frozen stack of matrices in NF4 (`weights.ExpertWeights`).

    Attributes:
        codes: uint8 [E, N, K/2].
        scales: float32 [E, N, K/64].

    Raises:
        ValueError: Shapes or types that do not belong together.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        """Check shapes and types."""
        _check_stored(self.codes, self.scales)
        if self.codes.dim() != 3:
            raise ValueError(f"expected a stack of codes [E, N, K/2], got the shape {tuple(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outs, pairs = self.codes.shape
        return experts, outs, 2 * pairs

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 4.5 bits a value."""
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales."""
        return self.codes, self.scales

    def decode(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The given experts, which ascend, in `dtype`: (len(experts), N, K), contiguous."""
        return decode(pick(self.codes, experts), pick(self.scales, experts), dtype)


def encode(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a dense matrix to NF4, with the bits of ``bitsandbytes.functional.quantize_4bit(blocksize=64)``.

    Args:
        dense: [..., K], floating point and finite, K a multiple of 64.

    Returns:
        codes uint8 [..., K/2] and scales float32 [..., K/64]. A decoded value is off by at most 0.152 of its group's
        largest magnitude (half the widest gap of the code book); Gaussian weights by 9.2 % in the root mean square.

    Raises:
        ValueError: K is not a multiple of 64, or a value is not finite in float32.
    """
    if dense.shape[-1] == 0 or dense.shape[-1] % GROUP:
        raise ValueError(f"NF4 stores groups of {GROUP} inputs, got {dense.shape[-1]} inputs")
    groups = dense.detach().float().unflatten(-1, (-1, GROUP))  # (..., G, 64)
    scales = groups.abs().amax(-1)  # (..., G)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("expected finite weights, got others: they cannot be stored as NF4")
    scaled = groups * (1.0 / scales.clamp(min=_TINY)).unsqueeze(-1)
    book = torch.tensor(CODE_BOOK, device=dense.device)
    # A value in the middle of two codes takes the lower one.
    codes = torch.bucketize(scaled.clamp_(-1, 1), (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
    return ((codes[..., 0::2] << 4) | codes[..., 1::2]).flatten(-2), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode NF4: the code book's value times the scale in float32, rounded once to `dtype`.

    Args:
        codes: uint8 [..., K/2].
        scales: float32 [..., K/64].
        dtype: float32 or bfloat16; float64 (the float32 values, for gradient checks).

    Returns:
        [..., K] in `dtype`, contiguous; the same bits with and without bitsandbytes.

    Raises:
        ValueError: A wrong shape or type, or another `dtype`.
    """
    _check_stored(codes, scales)
    if dtype not in _DTYPES:
        raise ValueError(f"NF4 decodes to float32, bfloat16 and float64, not to {dtype}")
    chosen = decode_torch if _has_no_values(codes) else _decoder(dtype, codes.device.type)
    return chosen(codes, scales, dtype)


def decode_torch(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The reference of `decode`: a table from two bytes to four values, one gather, one product."""
    if codes.storage_offset() % 2:
        codes = codes.clone()  # A memory-mapped tensor may start at an odd byte.
    words = codes.contiguous().view(torch.uint16).reshape(-1).to(torch.int32)
    # A table is kept for later calls, and one of a fake tensor's would be of no use to them.
    table = codes.new_empty(1 << 16, dtype=torch.complex128) if _has_no_values(codes) else _quad_table(codes.device)
    values = table.index_select(0, words).view(torch.float32).view(*scales.shape, GROUP)
    return values.mul_(scales.unsqueeze(-1)).flatten(-2).to(dtype)  # (..., K)


@cache
def _decoder(dtype: torch.dtype, device: str) -> _Decoder:
    """bitsandbytes where it is there, faster, and gives the reference's bits; else the reference.

    On one core of a Zen-class CPU without AVX-512 (2026-11): float32 1.7 Gelem/s against the reference's 1.1, bfloat16
    0.6 against 0.9; with AVX-512 bfloat16 4.8.
    """
    if dtype == torch.float64:
        return decode_torch
    if device == "cpu" and dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return decode_torch
    if not _has_native_library(device):
        return decode_torch
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat_interleave(2).view(-1, GROUP // 2)  # (16, 32)
    scales = torch.logspace(-20, 10, codes.shape[0], device=device).unsqueeze(-1)  # (16, 1)
    same = torch.equal(_decode_library(codes, scales, dtype), decode_torch(codes, scales, dtype))
    return _decode_library if same else decode_torch


def _has_no_values(codes: torch.Tensor) -> bool:
    """Whether a tensor has a shape alone, so that bitsandbytes' bits cannot be compared on its device."""
    return codes.is_meta or is_fake(codes)


def _decode_library(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape = [*codes.shape[:-1], 2 * codes.shape[-1]]
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes.contiguous().view(-1, 1), scales.contiguous().view(-1), GROUP, "nf4", shape, dtype
    )


def _has_native_library(device: str) -> bool:
    """Whether bitsandbytes is installed with compiled code for the device: its fallback is slower than ours."""
    library = _bitsandbytes()
    if library is None or device not in ("cpu", "cuda"):
        return False
    native = library.cextension.lib
    if device == "cuda":
        return bool(getattr(native, "compiled_with_cuda", False))
    return not isinstance(native, library.cextension.ErrorHandlerMockBNBNativeLibrary)


@cache
def _bitsandbytes() -> Any:
    try:
        with _no_network():
            import bitsandbytes
    except (ImportError, OSError):
        return None
    return bitsandbytes


@contextmanager
def _no_network() -> Iterator[None]:
    """Keep bitsandbytes' import from fetching a kernel of the hub, which it does where `kernels` is installed."""
    absent = "kernels" not in sys.modules
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # It warns that nothing was fetched.
    if absent:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        if absent:
            del sys.modules["kernels"]


@cache
def _quad_table(device: torch.device) -> torch.Tensor:
    """For each pair of bytes its four values in the order of the inputs, seen as one element: (65536,)."""
    words = torch.arange(1 << 16, device=device)
    book = torch.tensor(CODE_BOOK, device=device)
    quads = torch.stack([book[(words >> shift) & 15] for shift in (4, 0, 12, 8)], dim=-1)  # (65536, 4)
    return quads.view(torch.complex128).squeeze(-1)


def _check_stored(codes: torch.Tensor, scales: torch.Tensor) -> None:
    if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError(f"expected uint8 codes and float32 scales, got {codes.dtype} and {scales.dtype}")
    if codes.shape != (*scales.shape[:-1], scales.shape[-1] * (GROUP // 2)):
        raise ValueError(
            f"expected codes of shape {(*scales.shape[:-1], scales.shape[-1] * (GROUP // 2))} for scales of shape "
            f"{tuple(scales.shape)}, got {tuple(codes.shape)}"
        )
