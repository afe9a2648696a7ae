"""``foedus model``: look at base models, continue text with one, pretrain the small one.

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import UsageError
from foedus_protocols.manifest import Manifest, read_config, verify_manifest, write_manifest
from rich.console import Console
from rich.markup import escape

from foedus_model.cli_generate import generate
from foedus_model.presets import TINY

app = typer.Typer(no_args_is_help=True, help="Base models and variants: pretrain, inspect, generate.")

app.command()(generate)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A base model.")] = TINY,
    output: FormatOption = Format.text,
) -> None:
    """Verify a base model's files against its manifest and say what it is."""
    result = _described(folder, verify_manifest(folder), read_config(folder))
    emit(result, output, lambda console: _print_fields(console, result))


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A downloaded checkpoint in the released layout.")],
    source: Annotated[str, typer.Option(help="Where the files come from; kept in the manifest.")] = "",
    output: FormatOption = Format.text,
) -> None:
    """Write the manifest of a downloaded checkpoint, which makes it a base that a charter can name."""
    from foedus_model.checkpoint import require_safetensors

    require_safetensors(folder)
    written = write_manifest(folder, provenance={"source": source} if source else {})
    result = _described(folder, written, read_config(folder))
    emit(result, output, lambda console: _print_fields(console, result))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="A new or empty folder for the finished base.")],
    work: Annotated[Path, typer.Option(help="Where the run keeps its state; run again to continue.")],
    output: FormatOption = Format.text,
) -> None:
    """Pretrain the small base from the text of this Python installation; resumable."""
    import torch

    from foedus_model import pretrain as pretraining

    if out.exists() and any(out.iterdir()):
        raise UsageError(f"expected a new or empty folder for the finished base, got {out}")
    model = pretraining.pretrain(
        work, device="cuda" if torch.cuda.is_available() else "cpu", quiet=output is Format.json
    )
    pretraining.ship(model, work, out)
    result = _described(out, verify_manifest(out), read_config(out))
    emit(result, output, lambda console: _print_fields(console, result))


def _described(folder: Path, found: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    shape = ("num_hidden_layers", "hidden_size", "num_local_experts", "num_experts_per_tok", "vocab_size")
    return {
        "path": str(folder),
        "digest": found.digest,
        "quantisation": found.quantisation,
        "bytes": sum(entry.size for entry in found.files.values()),
        "files": len(found.files),
        **{field: config.get(field) for field in shape},
        "config_digest": found.config_digest,
        "tokenizer_digest": found.tokenizer_digest,
        "provenance": dict(found.provenance),
    }


def _print_fields(console: Console, result: dict[str, Any]) -> None:
    for name, value in result.items():
        console.print(f"[bold]{name}[/bold]  {escape(str(value))}", soft_wrap=True)
