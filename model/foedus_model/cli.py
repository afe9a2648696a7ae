"""``foedus model``: look at base models, continue text with one, pretrain the small one.

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from foedus_protocols.console import Format, FormatOption
from foedus_protocols.errors import UsageError
from foedus_protocols.manifest import verify_manifest

from foedus_model.cli_fit import fit
from foedus_model.cli_generate import generate
from foedus_model.cli_inspect import described, inspect, manifest, show, synthesise
from foedus_model.cli_quantize import quantize

app = typer.Typer(no_args_is_help=True, help="Base models and variants: pretrain, inspect, generate.")

app.command()(fit)
app.command()(generate)
app.command()(inspect)
app.command()(manifest)
app.command()(quantize)
app.command()(synthesise)


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
