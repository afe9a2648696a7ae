"""``foedus model``: look at base models, continue text with one, pretrain the small one.

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import UsageError
from foedus_protocols.manifest import Manifest, read_config, verify_manifest, write_manifest
from rich.console import Console
from rich.markup import escape

from foedus_model.presets import TINY

app = typer.Typer(no_args_is_help=True, help="Base models and variants: pretrain, inspect, generate.")

NOT_PRIVATE = "NOT PRIVATE: this variant was trained without differential privacy; it may repeat training records."


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
    show(described(out, verify_manifest(out), verified=True), output)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("expected a prompt by --prompt TEXT or --prompt-file FILE, and only one of them")
    if prompt is not None:
        return prompt
    try:
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a text file in UTF-8 at {prompt_file}, got: {error}") from error
