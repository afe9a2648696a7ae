"""``foedus model``: the model package's commands, and `evaluate`, which reads data files as training does."""

from __future__ import annotations

import typer
from foedus_model import cli

from foedus_client.cli_evaluate import evaluate

app = typer.Typer(no_args_is_help=True, help="Base models and variants: pretrain, inspect, generate, evaluate.")

app.add_typer(cli.app)
app.command()(evaluate)
