"""``foedus model inspect``, ``manifest``, ``synthesise``: what a folder holds, its identity, and stand-ins for one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import UsageError
from foedus_protocols.manifest import (
    Manifest,
    layout_of,
    read_config,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foedus_model.presets import TINY

_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A base model, in the released layout or OpenAI's.")
    ] = TINY,
    quick: Annotated[bool, typer.Option("--quick", help="Read headers only; do not digest the files.")] = False,
    output: FormatOption = Format.text,
) -> None:
    """Verify a base model's files and say what it is: parts, bytes, types, layers, experts, digest."""
    found = read_manifest(folder) if quick else verify_manifest(folder)
    show(described(folder, found, verified=not quick), output)


def manifest(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A downloaded checkpoint in the released layout, or its original/.")
    ],
    source: Annotated[str, typer.Option(help="Where the files come from; kept in the manifest.")] = "",
    output: FormatOption = Format.text,
) -> None:
    """Write the manifest of a downloaded checkpoint, which makes it a base that a charter can name."""
    from foedus_model.build import check_folder

    # A folder that no model can be loaded from gets no manifest: nothing must name it as a base.
    check_folder(folder)
    written = write_manifest(folder, provenance={"source": source} if source else {})
    show(described(folder, written, verified=True), output)


def synthesise(
    preset: Annotated[str, typer.Option(help="Whose shape: gpt-oss-20b, gpt-oss-120b, moe-16e-32k, tiny.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    layers: Annotated[int | None, typer.Option(help="Only the first so many layers.")] = None,
    experts: Annotated[int | None, typer.Option(help="Only so many experts in each layer.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Only so many tokens.")] = None,
    layout: Annotated[str, typer.Option(help="released, or original for OpenAI's names.")] = "released",
    seed: Annotated[int, typer.Option(help="Makes the weights repeatable.")] = 0,
    output: FormatOption = Format.text,
) -> None:
    """Write RANDOM weights at a model's true shape, to measure speed and memory with. Not a trained model."""
    from foedus_model import synthesise as synthesis

    if layout not in ("released", "original"):
        raise UsageError(f"expected --layout released or original, got {layout!r}")
    config = synthesis.shaped(preset, layers=layers, experts=experts, vocabulary=vocabulary)
    synthesis.synthesise(out, config, seed=seed, layout=layout)
    show(described(out, read_manifest(out), verified=True), output)


def described(folder: Path, found: Manifest, *, verified: bool) -> dict[str, Any]:
    """What a base is, from its manifest, its configuration and the headers of its files.

    Raises:
        CheckpointError: The folder is not a complete base.
    """
    from foedus_model.checkpoint import read_contents
    from foedus_model.parts import by_part, type_name

    config, layout = read_config(folder), layout_of(folder)
    specs = read_contents(folder, found.weight_files, config, layout).specs
    parts = {
        name: {"bytes": part.bytes, "tensors": part.tensors, "dtypes": list(part.dtypes)}
        for name, part in by_part(specs).items()
    }
    return {
        "path": str(folder),
        "digest": found.digest,
        "verified": verified,
        "layout": layout,
        "quantisation": found.quantisation,
        "bytes": sum(entry.size for entry in found.files.values()),
        "files": len(found.files),
        "weight_files": len(found.weight_files),
        "tensors": len(specs),
        **{field: config.get(field) for field in _SHAPE},
        "layer_types": config.get("layer_types"),
        "dtypes": sorted({type_name(spec.dtype) for spec in specs.values()}),
        "parts": parts,
        "config_digest": found.config_digest,
        "tokenizer_digest": found.tokenizer_digest,
        "provenance": dict(found.provenance),
    }


def show(result: dict[str, Any], output: Format) -> None:
    """Print what `described` found."""
    emit(result, output, lambda console: _print(console, result))


def _print(console: Console, result: dict[str, Any]) -> None:
    from foedus_model.parts import in_units

    for name, value in result.items():
        if name == "layer_types" and isinstance(value, list) and all(isinstance(kind, str) for kind in value):
            value = ", ".join(f"{value.count(kind)} {kind}" for kind in dict.fromkeys(value))
        if name == "bytes":
            value = f"{value} ({in_units(value)})"
        if name == "parts":
            console.print(_table(value))
        elif isinstance(value, list):
            console.print(f"[bold]{name}[/bold]  {escape(', '.join(map(str, value)))}", soft_wrap=True)
        else:
            console.print(f"[bold]{name}[/bold]  {escape(str(value))}", soft_wrap=True)


def _table(parts: dict[str, dict[str, Any]]) -> Table:
    from foedus_model.parts import in_units

    table = Table("part", "bytes", "", "tensors", "types")
    for name, part in parts.items():
        table.add_row(
            name, f"{part['bytes']:,}", in_units(part["bytes"]), str(part["tensors"]), ", ".join(part["dtypes"])
        )
    total = sum(part["bytes"] for part in parts.values())
    table.add_row("all", f"{total:,}", in_units(total), str(sum(part["tensors"] for part in parts.values())), "")
    return table
