"""What an organisation's environment says of how its process trains, and of nothing but training.

Device, threads and paths, which a model that only reads has too, are in `foedus_model.switches`. These settings change
speed, memory and rounding, never what is promised: they are each organisation's own, and no charter can set or forbid
them (`docs/operations.md`).
"""

from __future__ import annotations

import os

from foedus_model.switches import is_number, units_a_pass
from foedus_protocols.errors import ConfigError

_MOST_UNITS = 64


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


def units_a_forward() -> int:
    """FOEDUS_UNITS_A_FORWARD units share a forward in private runs, where that changes no bit; one without it.

    Raises:
        ConfigError: Not a number from 1 to 64.
    """
    value = os.environ.get("FOEDUS_UNITS_A_FORWARD") or "1"
    if not is_number(value, _MOST_UNITS):
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
    count = units_a_pass()
    if count is not None and units_a_forward() > 1:
        raise ConfigError(
            "expected FOEDUS_STREAMING or FOEDUS_UNITS_A_FORWARD, got both: leave out the second, streamed units share "
            "each layer already"
        )
    return count
