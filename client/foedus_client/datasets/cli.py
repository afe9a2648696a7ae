"""``foedus data check``: what training would read, before anything is registered. It writes nothing."""

from __future__ import annotations

import secrets
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.manifest import TOKENIZER_FILE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foedus_client.datasets.load import Report, load_dataset
from foedus_client.datasets.readers import Row, read_rows, stem
from foedus_client.datasets.units import RECORD, parse_columns, parse_units

app = typer.Typer(no_args_is_help=True, help="Look at data files before anything is trained.")

_SHOWN = 20


@app.callback()
def _data() -> None:
    """Look at data files before anything is trained."""


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="JSONL, CSV or TSV files, plain or gzipped.", metavar="FILE...")],
    unit: Annotated[
        list[str] | None,
        typer.Option(
            "--unit", help="FIELD that is the privacy unit, NAME=FIELD for one file among several, or record."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="FILE:question=COLUMN,context=COLUMN,answer=COLUMN, or FILE:text=COLUMN."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest record.")] = 256,
    max_records_per_unit: Annotated[
        int, typer.Option("--max-records-per-unit", help="Most records of one unit in a step.")
    ] = 4,
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of the base model whose tokenizer counts; default: tiny.")
    ] = None,
    output: FormatOption = Format.text,
) -> None:
    """Print records, tokens, units, and which rows are truncated or rejected and why."""
    options = unit or ask_units(files)
    dataset = load_dataset(
        files,
        units=parse_units(options),
        columns=parse_columns(columns or []),
        tokenizer_path=(base or shipped_base()) / TOKENIZER_FILE,
        max_tokens=max_tokens,
        max_records_per_unit=max_records_per_unit,
        split_key=secrets.token_bytes(32),
    )
    result = {
        **asdict(dataset.report),
        "max_tokens": max_tokens,
        "max_records_per_unit": max_records_per_unit,
    }
    emit(result, output, lambda console: _render(console, dataset.report, result))


def shipped_base() -> Path:
    """The folder of the base model that the package carries."""
    return Path(str(resources.files("foedus_model"))) / "tiny"


def ask_units(files: list[Path]) -> list[str]:
    """Ask a person for each file's privacy unit; nothing where there is nobody to ask.

    Returns:
        ``--unit`` options, one a file.
    """
    if not sys.stdin.isatty():
        return []
    answers = []
    for path in files:
        first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
        fields = ", ".join(first.values) if first else "none found"
        progress_console.print(
            f"{path.name}: which column holds one value per person, patient or matter? All records that share it are "
            f"protected together. Columns: {escape(fields)}; {RECORD} protects single records.",
            highlight=False,
        )
        answers.append(f"{stem(path)}={typer.prompt('unit', err=True)}")
    return answers


def _render(console: Console, report: Report, result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, rows in report.rows.items():
        table.add_row(f"rows in {escape(name)}", f"{rows:,}")
    table.add_row("records", f"{report.records:,}")
    table.add_row("tokens", f"{report.tokens:,}, of which {report.answer_tokens:,} are learned")
    table.add_row("units", f"{report.units:,}, the largest of {report.largest_unit:,} records")
    table.add_row(f"truncated to {result['max_tokens']} tokens", f"{len(report.truncated):,} records")
    cut = f"{report.units_over_cap:,} units have more: a step leaves out {report.records_over_cap:,} of their records"
    table.add_row(f"at most {result['max_records_per_unit']} records a unit", cut)
    table.add_row("rejected", f"{len(report.rejected):,} rows")
    console.print(table)
    for item in report.rejected[:_SHOWN]:
        console.print(f"rejected {item.file}, line {item.line}: {item.reason}", markup=False, highlight=False)
    for record in report.truncated[:_SHOWN]:
        text = f"truncated {record.file}, line {record.line}: {record.length} tokens to {record.kept}"
        console.print(text, markup=False, highlight=False)
    hidden = max(0, len(report.rejected) - _SHOWN) + max(0, len(report.truncated) - _SHOWN)
    if hidden:
        console.print(f"and {hidden:,} more: --format json lists all")
