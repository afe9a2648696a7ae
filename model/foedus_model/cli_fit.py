"""``foedus model fit``: does a training step fit a GPU, and what would make it fit."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import UsageError
from rich.console import Console
from rich.table import Table

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}


class ComputeType(StrEnum):
    """What a step is computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def fit(
    tokens: Annotated[int, typer.Option(help="Tokens of the longest record.")],
    preset: Annotated[str | None, typer.Option(help="gpt-oss-20b, gpt-oss-120b, moe-16e-32k or tiny.")] = None,
    model: Annotated[Path | None, typer.Option(help="A base model's folder, in place of a preset.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU's memory, such as 8GiB or 80GB.")] = None,
    answers: Annotated[int | None, typer.Option(help="Tokens that have a loss; all but the first by default.")] = None,
    targets: Annotated[str, typer.Option(help="attention, experts-shared or experts.")] = "attention",
    rank: Annotated[
        int | None, typer.Option(min=1, max=1024, help="The adapter's rank; default: a charter's own.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Adapted layers, such as 0,2; default: all.")] = None,
    dtype: Annotated[
        ComputeType,
        typer.Option(help="What is computed in; clients take bfloat16 on a GPU that multiplies it, else float32."),
    ] = ComputeType.float32,
    output: FormatOption = Format.text,
) -> None:
    """Say whether a training step of one unit fits, with its bytes by part and by remedy. Takes up to a minute."""
    import torch
    from foedus_protocols.charter_draft import default_rank
    from foedus_protocols.layout import parse_layers
    from foedus_protocols.manifest import read_config

    from foedus_model import presets
    from foedus_model.fit import fit as traced

    if (preset is None) == (model is None):
        raise UsageError("expected either --preset or --model, got both or neither; give one")
    config = presets.preset(preset) if preset is not None else read_config(model or Path())
    limit = None if gpu is None else parse_size(gpu)
    rank = default_rank(targets, config) if rank is None else rank
    adapted = parse_layers(layers)
    found = traced(
        config, tokens=tokens, answers=answers, limit=limit, dtype=getattr(torch, dtype), targets=targets, rank=rank,
        layers=adapted,
    )  # fmt: skip
    result: dict[str, Any] = {
        "model": preset or str(model),
        "tokens": tokens,
        "dtype": str(dtype),
        "targets": targets,
        "rank": rank,
        "layers": None if adapted is None else list(adapted),
        "limit": limit,
        "fits": None if limit is None else any(one.fits for one in found.remedies),
        "weights": dict(found.weights),
        "adapter": found.adapter,
        "driver_assumed": found.driver,
        "activations": found.activations,
        "activations_with_fused_attention": found.fused,
        "activations_with_both": found.checkpointed,
        "layer_inputs": found.kept,
        "remedies": [{"name": one.name, "bytes": one.bytes, "fits": one.fits} for one in found.remedies],
        "streaming": None
        if found.stream is None
        else {
            "ring": found.stream.ring_bytes,
            "link_a_pass": found.stream.link_bytes,
            "host_a_unit": found.stream.host_peak,
        },
    }
    emit(result, output, lambda console: _print(console, result))


def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``80GB``, ``512MiB``.

    Raises:
        UsageError: Not a size above 0.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?(GiB|MiB|GB|MB)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise UsageError(f"expected a size such as 8GiB or 80GB, got {text!r}")
    return size


def _print(console: Console, result: dict[str, Any]) -> None:
    from foedus_model.parts import in_units

    parts = Table("part", "bytes", "")
    rows = {f"weights: {part}": count for part, count in result["weights"].items()} | {
        "adapter, gradients": result["adapter"],
        "driver (assumed)": result["driver_assumed"],
        "activations": result["activations"],
        "activations, fused attention": result["activations_with_fused_attention"],
        "activations, fused attention and checkpointing": result["activations_with_both"],
    }
    for name, count in rows.items():
        parts.add_row(name, f"{count:,}", in_units(count))
    console.print(parts)
    ways = Table("way", "peak", "fits")
    for one in result["remedies"]:
        fits = "" if one["fits"] is None else "yes" if one["fits"] else "no"
        ways.add_row(one["name"], in_units(one["bytes"]), fits)
    console.print(ways)
    if result["streaming"] is not None:
        ring, link, host = (in_units(result["streaming"][name]) for name in ("ring", "link_a_pass", "host_a_unit"))
        console.print(
            f"Streamed, {link} cross the link in each pass, through a ring of {ring}; for each unit of such a pass "
            f"{host} wait on the host. FOEDUS_STREAMING says how many units share a pass (docs/tuning.md).",
            soft_wrap=True,
        )
    if result["fits"] is not None:
        verdict = "fits" if result["fits"] else "does not fit"
        console.print(
            f"A step of {result['tokens']} tokens in {result['dtype']} {verdict} {in_units(result['limit'])} "
            "in this version.",
            soft_wrap=True,
        )
