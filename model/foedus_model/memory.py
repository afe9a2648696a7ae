"""What loading a base needs of which memory, what the machine has, and the refusal where it is too little.

On a CPU the quantised bytes are not read into memory: they stay in the files, and the system keeps as many of their
pages as it has room for. They are no part of what is needed, but where they do not fit beside it every pass reads the
disk again, and loading says so. What is needed is what has to be converted to the compute type. On a GPU all of it has
to fit. Activations, adapters and optimisers come on top (`fit` computes a whole training step).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from foedus_protocols.errors import CheckpointError

from foedus_model.parts import in_units

_LOG = logging.getLogger(__name__)

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that loading takes.

    Attributes:
        host: Of the host's memory, for good.
        mapped: Of files that stay mapped; the system may drop and read them again.
        device: Of the GPU's memory; 0 on a CPU.
    """

    host: int
    mapped: int
    device: int


def needs_of(
    expected: Mapping[str, torch.Tensor],
    stored: frozenset[str],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    file_dtype: torch.dtype = torch.bfloat16,
) -> Needs:
    """What loading will take, before a file is opened.

    Args:
        expected: The model's tensors by name, of the right shapes (on meta).
        stored: Those that are kept as the file has them.
        device: Where the model will run.
        dtype: The compute type of the others.
        file_dtype: Their type in the files; the releases have bfloat16.
    """
    kept = sum(tensor.nbytes for name, tensor in expected.items() if name in stored)
    counts = [tensor.numel() for name, tensor in expected.items() if name not in stored]
    converted = sum(counts) * dtype.itemsize
    if torch.device(device).type != "cpu":
        # The largest tensor is there twice while it is converted.
        both = max(counts, default=0) * file_dtype.itemsize if dtype != file_dtype else 0
        return Needs(host=0, mapped=0, device=kept + converted + both)
    if dtype == file_dtype:
        return Needs(host=0, mapped=kept + converted, device=0)
    return Needs(host=converted, mapped=kept, device=0)


def require_memory(needs: Needs, *, path: Path, device: str | torch.device) -> None:
    """Refuse what cannot fit, and say where it will be slow.

    Raises:
        CheckpointError: The host or the GPU has less free than loading takes.
    """
    if needs.device:
        free = device_free(device)
        if free < needs.device:
            raise CheckpointError(
                f"expected {in_units(needs.device)} of free memory on {device} to load {path}, got {in_units(free)}; "
                "stop what else runs there, take a larger GPU or a smaller base, or run on the CPU "
                "(this is before activations: `foedus model fit` computes a whole training step)"
            )
        return
    free_host = host_free()
    if free_host is None:
        return
    if free_host < needs.host:
        raise CheckpointError(
            f"expected {in_units(needs.host)} of free host memory to load {path} for the CPU, got "
            f"{in_units(free_host)}; stop other programs, raise the limit of the container, or take a smaller base "
            f"(the {in_units(needs.mapped)} that stay in the files are not counted)"
        )
    if free_host - needs.host < needs.mapped:
        _LOG.warning(
            "%s of %s stay in its files, and %s of memory are left to keep them at hand: every pass reads the rest "
            "from the disk again",
            in_units(needs.mapped),
            path,
            in_units(free_host - needs.host),
        )


def device_free(device: str | torch.device) -> int:
    """Bytes that are free on a GPU, with what torch holds in reserve there."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + int(torch.cuda.memory_reserved(device)) - int(torch.cuda.memory_allocated(device))


def host_free() -> int | None:
    """Bytes that this process can still get from the host, or None where the system does not say (not Linux).

    The least of what the kernel calls available and what each control group above this process has left.
    """
    available = _field(_PROC / "meminfo", "MemAvailable:")
    if available is None:
        return None
    return min([available * 1024, *_cgroup_rooms()])


def _cgroup_rooms() -> list[int]:
    """What each control group over this process has left, by version 2 or the memory controller of version 1."""
    rooms: list[int] = []
    for line in _lines(_PROC / "self" / "cgroup"):
        _, controllers, inner = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS if controllers == "" else _CGROUPS / "memory"
        limit, used = (
            ("memory.max", "memory.current")
            if controllers == ""
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        group = root / inner.lstrip("/")
        for folder in (group, *group.parents):
            if folder != root and root not in folder.parents:
                break
            bounds = _number(folder / limit), _number(folder / used)
            if bounds[0] is not None and bounds[1] is not None:
                # Pages of files that nobody used lately are given back before anything fails.
                rooms.append(max(0, bounds[0] - bounds[1] + (_field(folder / "memory.stat", "inactive_file") or 0)))
    return rooms


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    """A file's number; None where there is no file, or no limit (``max``)."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
