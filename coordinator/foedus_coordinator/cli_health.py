"""`foedus coordinator health`: for monitors, systemd and containers. The exit code says what is wrong."""

from __future__ import annotations

from dataclasses import asdict

import typer
from foedus_protocols.console import Format, FormatOption, emit, printable, progress_console
from rich.console import Console
from rich.markup import escape

from foedus_coordinator.cli_common import HomeOption, open_home
from foedus_coordinator.config import DEFAULT_HOME


def health(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """Whether the coordinator is well: 0, or 12 (process, disk, database), 7 (certificate), 4 (ports), 11 (a run)."""
    from foedus_coordinator.health import look

    checks = look(open_home(home))
    failed = [one for one in checks if not one.ok]
    code = failed[0].exit_code if failed else 0
    result = {"healthy": not failed, "exit_code": code, "checks": [asdict(one) for one in checks]}

    def show(console: Console) -> None:
        for one in checks:
            if one.ok:  # The others go to standard error, where a service manager looks.
                console.print(f"[green]ok[/green] {one.name}: {escape(printable(one.detail))}", soft_wrap=True)

    emit(result, output, show)
    for one in failed:
        progress_console.print(f"{one.name}: {printable(one.detail)}", markup=False, highlight=False, soft_wrap=True)
    if code:
        raise typer.Exit(code)
