"""Which way a run's experts multiply: over decoded matrices or over packed bytes. Chosen once, with the reason.

``dequantised`` decodes a few matrices at a time and calls the library's grouped product (`grouped.py`): every device,
every codec. ``fused`` is device code in Triton that decodes inside the product and writes no decoded matrix
(`device/experts.py`): MXFP4 on a GPU.

By arithmetic, for 128 experts of which a token has four, on an H200: writing and reading a layer's matrices in bfloat16
takes 107 ms a pass of the whole model beside 15 ms for the packed bytes. A forward of 2,048 tokens is then bound at
5,000 tokens/s dequantised and 25,000 fused, one of 8,192 at 12,000 to 22,000 and 25,000, and from 16,384 on the two
meet, where the library's product is the better one. Not measured.

The choice is a function of the device, the codec and the most rows that a forward of the run can have, and never of a
batch: the two ways round differently, and one privacy unit's arithmetic may not depend on who shares its batch. It
travels as an argument of the operators (`experts.py`), because autograd's threads see no context variable.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_LOG = logging.getLogger(__name__)

DEQUANTISED = "dequantised"
FUSED = "fused"
PATHS = (DEQUANTISED, FUSED)

# Rows of hidden states, before experts are chosen. Between 8K, up to which fused is ahead by arithmetic, and 16K, where
# the two meet, either is sound; the library's product is taken, which is the better tuned one. Not measured.
FUSED_BELOW = 8192

_CODEC = "mxfp4"
CAPABILITY = (8, 0)
"""The least of a GPU: products in bfloat16, and asynchronous copies to shared memory."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which way, and why.

    Attributes:
        path: One of `PATHS`.
        why: For a log: the end of "experts: fused, since ...".
    """

    path: str
    why: str


def choose(
    *,
    device: torch.device | str,
    codec: str,
    dtype: torch.dtype,
    rows: int,
    wanted: str | None = None,
    interpreted: bool = False,
) -> Choice:
    """Choose for a whole run.

    Args:
        device: Where the model runs.
        codec: What stores the experts: ``mxfp4``, ``nf4``, ``int8`` or ``dense``.
        dtype: What it computes in. Kernels in float32 have no tensor cores and small tiles, for which they decode a
            matrix again every few rows: fused only where it is wanted.
        rows: The most rows of hidden states that a forward of the run can have.
        wanted: One of `PATHS`, which then runs or is refused; None leaves the choice to this function.
        interpreted: Let ``fused`` be wanted on a CPU, where Triton's interpreter runs it: for tests, minutes a layer.

    Raises:
        ValueError: A wanted path that is none, or that cannot run here; says what is missing.
    """
    device = torch.device(device)
    if wanted is not None and wanted not in PATHS:
        raise ValueError(f"expected a path among {PATHS}, got {wanted!r}")
    if rows < 0:
        raise ValueError(f"expected a number of rows, got {rows}")
    missing = _missing(device, codec, interpreted=interpreted and wanted == FUSED)
    if wanted == FUSED and missing is not None:
        raise ValueError(f"expected what the fused path needs, got {missing}: take {DEQUANTISED}")
    if wanted is not None:
        return Choice(path=wanted, why="it was asked for")
    if missing is not None:
        return Choice(path=DEQUANTISED, why=missing)
    if dtype != torch.bfloat16:
        return Choice(path=DEQUANTISED, why=f"it computes in {dtype}, and the kernels are made for bfloat16")
    if rows >= FUSED_BELOW:
        return Choice(path=DEQUANTISED, why=f"a forward has up to {rows:,} rows, {FUSED_BELOW:,} and more")
    return Choice(path=FUSED, why=f"a forward has at most {rows:,} rows, fewer than {FUSED_BELOW:,}, on {device}")


def interpreting() -> bool:
    """Whether Triton, once imported, interprets: the variable that it looks at."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _missing(device: torch.device, codec: str, *, interpreted: bool) -> str | None:
    """What the fused path lacks here, or None."""
    if codec != _CODEC:
        return f"experts in {codec}, and its kernels read {_CODEC}"
    return missing_for_kernels(device, interpreted=interpreted)


def missing_for_kernels(device: torch.device, *, interpreted: bool = False) -> str | None:
    """What device code in Triton lacks on a device, whatever it computes; None where it runs.

    `interpreted`: whether Triton's interpreter may stand in for a GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "no Triton, which its kernels are written in (pip install triton)"
    if device.type == "cpu":
        if not interpreted:
            return "the device cpu, and its kernels run on a GPU"
        return None if interpreting() else "no interpreter: TRITON_INTERPRET=1 has to be set before Triton is imported"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the device {device} without CUDA, and its kernels run on a CUDA device"
    if interpreting():
        return "TRITON_INTERPRET=1 in the environment, under which nothing is compiled for a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"a GPU of compute capability {capability}, and its kernels need {CAPABILITY}"
    return _missing_to_compile()


def _missing_to_compile() -> str | None:
    """What Triton lacks to compile at a kernel's first launch (its `runtime/build.py`, `runtime/cache.py`), or None."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler, which Triton asks for at a kernel's first launch (install gcc, or name one in CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # As Triton takes it.
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"no Python.h in {headers}, which Triton compiles against (install this Python's headers, python3-dev)"
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return f"no place for compiled kernels, {cache} cannot be written (name another in TRITON_CACHE_DIR)"
    return None


@cache
def device_code(name: str, device: torch.device) -> ModuleType | None:
    """The module `foedus_kernels.device.NAME`, or None where it cannot run; asked once a device, and said once."""
    missing = missing_for_kernels(device)
    _LOG.info("%s on %s: %s", name, device, "in Triton" if missing is None else f"by the reference: {missing}")
    return importlib.import_module(f"foedus_kernels.device.{name}") if missing is None else None
