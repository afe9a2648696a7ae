"""What an organisation's environment says of how its process trains: device, threads, memory, paths.

These settings change speed, memory and rounding, never what is promised: they are each organisation's own, and no
charter can set or forbid them (`docs/operations.md`).
"""

from __future__ import annotations

import os

import torch
from foedus_kernels.backend import PATHS
from foedus_protocols.errors import ConfigError

_MOST_THREADS = 1024
_MOST_UNITS = 64
_MOST_STREAMED = 4096


def default_device() -> torch.device:
    """A GPU where there is one, unless FOEDUS_DEVICE says otherwise.

    Raises:
        ConfigError: No device of torch's.
    """
    named = os.environ.get("FOEDUS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(named)
    except RuntimeError as error:
        raise ConfigError(
            f"expected FOEDUS_DEVICE=cpu, cuda or cuda:1, got {named!r}: correct the environment"
        ) from error


def set_threads() -> None:
    """FOEDUS_THREADS threads; torch's own choice without it.

    Raises:
        ConfigError: Not a number from 1 to 1024.
    """
    value = os.environ.get("FOEDUS_THREADS")
    if not value:
        return
    if not _is_number(value, _MOST_THREADS):
        raise ConfigError(f"expected FOEDUS_THREADS from 1 to {_MOST_THREADS}, got {value!r}: correct the environment")
    torch.set_num_threads(int(value))


def checkpointing() -> str:
    """FOEDUS_CHECKPOINTING: ``on`` computes activations again instead of keeping them, ``offload`` has the layers'
    inputs wait on the host besides; ``off`` without it.

    The bits of a step are the same with and without, so it is each organisation's own affair and in no charter.

    Raises:
        ConfigError: Nothing of these.
    """
    value = os.environ.get("FOEDUS_CHECKPOINTING") or "off"
    if value not in ("on", "offload", "off"):
        raise ConfigError(f"expected FOEDUS_CHECKPOINTING=on, offload or off, got {value!r}: correct the environment")
    return value


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


def units_a_forward() -> int:
    """FOEDUS_UNITS_A_FORWARD units share a forward in private runs, where that changes no bit; one without it.

    Raises:
        ConfigError: Not a number from 1 to 64.
    """
    value = os.environ.get("FOEDUS_UNITS_A_FORWARD") or "1"
    if not _is_number(value, _MOST_UNITS):
        raise ConfigError(
            f"expected FOEDUS_UNITS_A_FORWARD from 1 to {_MOST_UNITS}, got {value!r}: correct the environment"
        )
    return int(value)


def units_streamed() -> int | None:
    """FOEDUS_STREAMING units share a pass over experts that stream from the host; None without it.

    Gradients are the same bits with and without on a CPU, and up to rounding on a GPU, where `checks.streaming_check`
    compares them before a private run: each organisation's own affair, and in no charter.

    Raises:
        ConfigError: Not a number from 1 to 4096, or several units a forward beside it.
    """
    value = os.environ.get("FOEDUS_STREAMING") or "off"
    if value == "off":
        return None
    if not _is_number(value, _MOST_STREAMED):
        raise ConfigError(
            f"expected FOEDUS_STREAMING from 1 to {_MOST_STREAMED}, or off, got {value!r}: correct the environment"
        )
    if units_a_forward() > 1:
        raise ConfigError(
            "expected FOEDUS_STREAMING or FOEDUS_UNITS_A_FORWARD, got both: leave out the second, streamed units share "
            "each layer already"
        )
    return int(value)


def _is_number(value: str, most: int) -> bool:
    """Whether a text is a number from 1 to `most`; however long it is."""
    return value.isascii() and value.isdigit() and len(value) <= len(str(most)) and 1 <= int(value) <= most
