"""The parts of a gpt-oss by its tensors' names, and what each takes: what loading, inspecting and memory speak of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from foedus_model.shards import TensorSpec

PARTS = ("experts", "expert biases", "attention", "router", "embeddings", "head", "norms")
"""Experts are their matrices, with scales where they are quantised; attention has its biases and sinks."""


def part_of(name: str) -> str:
    """The part that a released tensor belongs to; ``other`` for a name that no gpt-oss has."""
    if ".mlp.experts." in name:
        return "expert biases" if name.endswith("_bias") else "experts"
    if ".self_attn." in name:
        return "attention"
    if ".mlp.router." in name:
        return "router"
    if "norm" in name:
        return "norms"
    return {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}.get(name, "other")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of a checkpoint takes.

    Attributes:
        bytes: Bytes as stored.
        tensors: How many tensors.
        dtypes: Their types, sorted.
    """

    bytes: int
    tensors: int
    dtypes: tuple[str, ...]


def by_part(specs: Mapping[str, TensorSpec]) -> dict[str, Part]:
    """What each part takes, in the order of `PARTS`; absent parts are left out."""
    groups: dict[str, list[TensorSpec]] = {}
    for name, spec in specs.items():
        groups.setdefault(part_of(name), []).append(spec)
    return {
        part: Part(
            bytes=sum(spec.nbytes for spec in groups[part]),
            tensors=len(groups[part]),
            dtypes=tuple(sorted({type_name(spec.dtype) for spec in groups[part]})),
        )
        for part in (*PARTS, "other")
        if part in groups
    }


def bytes_by_part(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Bytes of named tensors by part."""
    found = by_part({name: TensorSpec.of(tensor) for name, tensor in tensors})
    return {part: entry.bytes for part, entry in found.items()}


def type_name(dtype: torch.dtype) -> str:
    """A type as people write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def in_units(count: int) -> str:
    """Bytes for people, in decimal units as files are sold: ``10.2 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
