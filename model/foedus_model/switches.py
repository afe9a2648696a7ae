"""What the environment says of how a process's model runs: device, threads, paths. One reader for each switch.

Whatever loads a model reads them here: a client's worker, the demo's comparison, `foedus model generate` and
`evaluate`. Those that only training has are the client's (`foedus_client.switches`). They change speed, memory and
rounding, never what is promised: they are each organisation's own, and no charter can set or forbid them
(`docs/operations.md`). An empty value is none.
"""

from __future__ import annotations

import os

import torch
from foedus_kernels.backend import CAPABILITY, PATHS
from foedus_protocols.errors import ConfigError
from foedus_protocols.memory import keep_freed_memory

_COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_THREADS = 1024
_MOST_STREAMED = 4096


def default_device() -> torch.device:
    """A GPU where there is one, unless FOEDUS_DEVICE says otherwise.

    Raises:
        ConfigError: No device of torch's, or a CUDA device that is not here.
    """
    named = os.environ.get("FOEDUS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
    except RuntimeError as error:
        raise ConfigError(
            f"expected FOEDUS_DEVICE=cpu, cuda or cuda:1, got {named!r}: correct the environment"
        ) from error
    here = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= here:
        raise ConfigError(
            f"expected the CUDA device of FOEDUS_DEVICE={named}, got {here} CUDA devices here: correct the environment"
        )
    return device


def compute_type(device: torch.device) -> torch.dtype:
    """What a model computes in: FOEDUS_DTYPE, or without it bfloat16 on a GPU and float32 on a CPU.

    The experts' kernels are made for bfloat16, which the released weights are in; a GPU without products in it
    (compute capability below 8.0) takes float32. Whatever is chosen, a unit's gradient is converted to float32 before
    it is clipped, and what is clipped is what is summed: the promise does not rest on this setting. Rounding does.

    Raises:
        ConfigError: Neither float32 nor bfloat16.
    """
    named = os.environ.get("FOEDUS_DTYPE") or ("bfloat16" if _multiplies_bfloat16(device) else "float32")
    if named not in _COMPUTE_TYPES:
        raise ConfigError(f"expected FOEDUS_DTYPE=float32 or bfloat16, got {named!r}: correct the environment")
    return _COMPUTE_TYPES[named]


def threads() -> int | None:
    """FOEDUS_THREADS; None without it.

    Raises:
        ConfigError: Not a number from 1 to 1024.
    """
    value = os.environ.get("FOEDUS_THREADS")
    if not value:
        return None
    if not is_number(value, _MOST_THREADS):
        raise ConfigError(f"expected FOEDUS_THREADS from 1 to {_MOST_THREADS}, got {value!r}: correct the environment")
    return int(value)


def set_threads() -> None:
    """FOEDUS_THREADS threads; torch's own choice without it.

    Raises:
        ConfigError: Not a number from 1 to 1024.
    """
    wanted = threads()
    if wanted is not None:
        torch.set_num_threads(wanted)


def prepare_process() -> None:
    """Set this process up for a model: threads, memory, and how products are added up.

    torch lets cuBLAS add the parts of a product in bfloat16, and how many parts there are follows from its rows. In
    float32 they may still be split by rows; where that changes a bit, the packed path's check finds it.

    Raises:
        ConfigError: As `threads`.
    """
    set_threads()
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def fused_attention() -> bool:
    """Whether FOEDUS_ATTENTION asks for attention in linear memory (``fused``); ``eager`` without it.

    Gradients differ by rounding, as between a CPU and a GPU: each organisation's own affair.

    Raises:
        ConfigError: Neither fused nor eager.
    """
    value = os.environ.get("FOEDUS_ATTENTION") or "eager"
    if value not in ("fused", "eager"):
        raise ConfigError(f"expected FOEDUS_ATTENTION=fused or eager, got {value!r}: correct the environment")
    return value == "fused"


def experts_path() -> str | None:
    """The path of the experts that FOEDUS_EXPERTS asks for; None without it: device, codec and shape then choose.

    Gradients differ by rounding, as between a CPU and a GPU: each organisation's own affair.

    Raises:
        ConfigError: Neither fused nor dequantised.
    """
    value = os.environ.get("FOEDUS_EXPERTS") or None
    if value is not None and value not in PATHS:
        raise ConfigError(f"expected FOEDUS_EXPERTS=fused or dequantised, got {value!r}: correct the environment")
    return value


def units_a_pass() -> int | None:
    """FOEDUS_STREAMING: layers stream from the host, and so many units share a pass of training; None without it.

    Whoever does not train streams with any number: a forward brings each layer once.

    Raises:
        ConfigError: Not a number from 1 to 4096.
    """
    value = os.environ.get("FOEDUS_STREAMING") or "off"
    if value == "off":
        return None
    if not is_number(value, _MOST_STREAMED):
        raise ConfigError(
            f"expected FOEDUS_STREAMING from 1 to {_MOST_STREAMED}, or off, got {value!r}: correct the environment"
        )
    return int(value)


def is_number(value: str, most: int) -> bool:
    """Whether a text is a number from 1 to `most`; however long it is."""
    return value.isascii() and value.isdigit() and len(value) <= len(str(most)) and 1 <= int(value) <= most


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU with products in bfloat16."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= CAPABILITY
