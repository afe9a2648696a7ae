"""What every `foedus coordinator` command leans on: the home option, opening it, tables and moments for people."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from foedus_coordinator.config import HOME_VARIABLE, Home

HomeOption = Annotated[Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's folder.")]


def open_home(home: Path) -> Home:
    """The coordinator in a folder.

    Raises:
        ConfigError: There is none, or its settings are malformed.
    """
    opened = Home(home)
    _ = opened.config  # Says at once, and with what to do, where there is no coordinator.
    return opened


def table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> Table:
    """A table for people."""
    made = Table(*columns)
    for row in rows:
        made.add_row(*row)
    return made


def when(moment: float | None) -> str:
    """A moment for people."""
    return "never" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"
