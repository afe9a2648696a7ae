"""``foedus model quantize``: a base -> the same base in 4 or 8 bits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from rich.console import Console
from rich.markup import escape


class Target(StrEnum):
    """What a base can be rounded to."""

    mxfp4 = "mxfp4"
    nf4 = "nf4"
    int8 = "int8"


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A base model with its manifest.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    to: Annotated[Target, typer.Option("--to", help="mxfp4: experts. nf4, int8: experts and attention.")],
    requantise: Annotated[
        bool, typer.Option("--requantise", help="Take a base that is rounded already; errors add up.")
    ] = False,
    output: FormatOption = Format.text,
) -> None:
    """Round a base's large matrices to 4 or 8 bits, one tensor at a time, and say what that changed."""
    from foedus_model.checkpoint import open_checkpoint
    from foedus_model.quantize import convert

    opened = open_checkpoint(source)
    made = convert(opened, out, to=to.value, requantise=requantise)
    result: dict[str, Any] = {
        "path": str(out),
        "digest": made.digest,
        "quantisation": to.value,
        "source": opened.digest,
        "source_quantisation": opened.manifest.quantisation,
        "source_bytes": made.source_bytes,
        "bytes": made.bytes,
        "relative_errors": dict(made.errors),
    }
    emit(result, output, lambda console: _print(console, result))


def _print(console: Console, result: dict[str, Any]) -> None:
    from foedus_model.parts import in_units

    console.print(
        f"{escape(result['path'])}: {result['source_quantisation']} to {result['quantisation']}, "
        f"{in_units(result['source_bytes'])} to {in_units(result['bytes'])}",
        soft_wrap=True,
    )
    for part, error in result["relative_errors"].items():
        console.print(f"  rounding moved {part} by {100 * error:.2f} % of their norm")
    console.print(f"[bold]digest[/bold]  {result['digest']}", soft_wrap=True)
