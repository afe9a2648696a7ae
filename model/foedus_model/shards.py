"""Safetensors files: what one holds without reading it, and how one of any size is written with one tensor in memory.

The format (github.com/huggingface/safetensors, README): eight bytes of header length, a JSON header with each tensor's
type, shape and place, and the tensors' bytes. The library writes a file from a dictionary of all its tensors; a shard
of a large model would then have to be in memory twice. `write_file` writes the same bytes as the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError
from safetensors import SafetensorError, safe_open

SHARD_BYTES = 4_800_000_000
"""The released files' limit (transformers, convert_gpt_oss_weights_to_hf.py)."""

_TYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I8", "U8", "BOOL"]  # As the library sorts: wide types first.


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's type and shape, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The type and shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


Make = Callable[[str], torch.Tensor]
"""Returns the tensor of a name when its turn to be written comes."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped.

    Raises:
        CheckpointError: It is truncated, or something else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a complete safetensors file ({error}); fetch it again") from error


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """What a file holds, from its header.

    Raises:
        CheckpointError: Not a complete safetensors file, or a type that no gpt-oss has.
    """
    specs = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
            piece = file.get_slice(name)
            dtype = _TYPES.get(piece.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: {name} has the type {piece.get_dtype()}, expected {', '.join(_TYPES)}")
            specs[name] = TensorSpec(dtype, tuple(piece.get_shape()))
    return specs


def plan_shards(
    specs: Mapping[str, TensorSpec], shard_bytes: int = SHARD_BYTES, layout: str = "released"
) -> dict[str, list[str]]:
    """File names and the tensors in each: one file, or as many as the limit asks for, named as the published ones.

    Args:
        specs: All tensors, in the order in which they fill the files.
        shard_bytes: The most that a file holds, unless one tensor is larger.
        layout: ``released``, or ``original``, whose files are counted in another way.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    if layout == "original":
        count = len(shards)
        return {f"model--{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(shards, 1)}
    last = len(shards) - 1  # Released files count from 0 and say the last number, not how many there are.
    return {f"model-{number:05d}-of-{last:05d}.safetensors": names for number, names in enumerate(shards)}


def write_file(path: Path, specs: Mapping[str, TensorSpec], make: Make) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    Args:
        path: The file.
        specs: What it will hold.
        make: Called once for each name, in the file's order.

    Raises:
        ValueError: `make` returned another type or shape than `specs` says.
    """
    order = sorted(specs, key=lambda name: (_ORDER.index(_NAMES[specs[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = make(name)
            if TensorSpec.of(tensor) != specs[name]:
                raise ValueError(f"{name}: expected {specs[name]}, got {TensorSpec.of(tensor)}")
            file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
