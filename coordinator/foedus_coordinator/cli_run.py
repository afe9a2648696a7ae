"""`foedus coordinator run`: start runs, look at them, hold them up and end them.

Commands write what they want into the database; the run's thread in `foedus coordinator up` acts on it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.manifest import read_config, verify_manifest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foedus_coordinator.cli_common import HomeOption, open_home, table, when
from foedus_coordinator.config import DEFAULT_HOME
from foedus_coordinator.storage import Wish

if TYPE_CHECKING:
    from foedus_protocols.charter import Charter

# What reads charters brings the accountant along, a second of imports, so the commands that need it import it.

run_app = typer.Typer(no_args_is_help=True, help="Start runs, look at them, hold them up and end them.")

_NAME_CHARACTERS = 55  # An envelope's run id has 64 characters at most: name, dash, eight of the charter's digest.
_SHORT = 8


@run_app.command()
def template(output: FormatOption = Format.text) -> None:
    """Print a commented charter to start from: `foedus coordinator run template > charter.toml`."""
    from foedus_protocols.charter_draft import charter_template

    text = charter_template()
    emit(
        {"toml": text},
        output,
        lambda console: console.print(text, end="", markup=False, highlight=False, soft_wrap=True),
    )


@run_app.command()
def start(
    charter: Annotated[Path, typer.Argument(help="The terms, as TOML.")],
    base: Annotated[Path, typer.Option(help="The base model's folder; only its manifest and configuration are used.")],
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Draw up a charter, sign it, and offer it to its participants. `up` does the rest."""
    from foedus_protocols.charter import sign_charter
    from foedus_protocols.charter_draft import draft, read_draft

    opened = open_home(home)
    manifest = verify_manifest(base)
    config = read_config(base)
    drawn = draft(
        read_draft(charter),
        federation=opened.config.federation,
        roster=opened.members.roster(),
        base_digest=manifest.digest,
        base_config=config,
        base_name=base.resolve().name,
        now=int(time.time()),
    )
    run = run_id(drawn)
    opened.files.put_bytes(drawn.canonical())
    opened.storage.add_run(
        run,
        charter_digest=drawn.digest,
        operator_signature=sign_charter(opened.operator_key, drawn.digest),
        base_config=json.dumps(config).encode(),
        orgs=[participant.id for participant in drawn.participants],
        files=[drawn.digest],
    )
    result = {"run": run, "charter": drawn.digest, **_terms(drawn)}

    def show(console: Console) -> None:
        console.print(f"Run [bold]{run}[/bold] is offered; charter {drawn.digest}", soft_wrap=True)
        columns = ("id", "unit", "units_at_most", "sampling_prob", "expected_units", "noise_multiplier", "weight")
        rows = ([str(one[name]) for name in columns] for one in result["participants"])
        console.print(table(columns, rows))
        if not drawn.private:
            console.print("[bold red]NOT PRIVATE[/bold red]: mode none adds no noise and promises nothing.")

    emit(result, output, show)


@run_app.command("list")
def list_runs(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """All runs."""
    from foedus_coordinator import views

    opened = open_home(home)
    result = {"runs": [views.run_line(opened, row) for row in opened.storage.runs()]}
    emit(result, output, lambda console: console.print(run_table(result["runs"])))


@run_app.command()
def show(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """One run: who signed, its rounds, what was spent and measured."""
    from foedus_coordinator import views

    opened = open_home(home)
    result = views.run_detail(opened, opened.storage.run(run))

    emit(result, output, lambda console: _render(result, console))


def _render(result: dict[str, Any], console: Console) -> None:
    """One run for people."""
    console.print(f"Run [bold]{result['run']}[/bold]: {escape(result['doing'])}", soft_wrap=True)
    if result["extends"]:
        console.print(f"goes on from run {result['extends']}", soft_wrap=True)
    if not result["coordinator_running"] and result["state"] != "finished":
        console.print("[bold]The coordinator is not running.[/bold]")
    if trouble := result["trouble"]:
        console.print(
            f"[bold red]In trouble[/bold red] since {when(trouble['since'])}: {escape(trouble['error'])}. "
            f"Tried {trouble['tries']} times, tries again at {when(trouble['again_at'])}",
            soft_wrap=True,
        )
    for org, answer in result["answers"].items():
        console.print(f"  {org}: charter {answer}; {result['organisations'][org]}", soft_wrap=True)
    if result["waiting_until"] is not None:
        console.print(f"waits until {when(result['waiting_until'])} at the latest")
    rows = (
        [str(one["round"]), one["state"], ", ".join(one["missing"]) or "-", f"{sum(one['seconds'].values()):.1f}"]
        for one in result["round_list"]
    )
    console.print(table(("round", "state", "missing", "seconds"), rows))
    if result["private"]:
        spent = "" if result["epsilon"] is None else f"{result['epsilon']:.3f} spent of "
        console.print(f"epsilon {spent}{result['epsilon_agreed']:g}, delta {result['delta']:g}")
    else:
        console.print("[bold red]NOT PRIVATE[/bold red]")
    if result["loss_before"] is not None and result["loss_after"] is not None:
        console.print(f"held-out loss {result['loss_before']:.4f} before, {result['loss_after']:.4f} after")
    console.print(f"{result['bytes_up']:,} bytes up, {result['bytes_down']:,} down")
    if result["variant"]:
        console.print(f"variant after {result['released_after']} closed rounds: {result['variant']}", soft_wrap=True)


@run_app.command()
def pause(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Let the open round finish and open no further one, until `resume`."""
    _wish(run, "pause", None, home, output)


@run_app.command()
def resume(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Let a paused run go on."""
    _wish(run, None, None, home, output)


@run_app.command()
def stop(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    reason: Annotated[str, typer.Option(help="Why; the participants read it.")] = "stopped by the operator",
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """End a run for good: the open round fails, and the adapter of the last closed one is published."""
    _wish(run, "stop", reason, home, output)


def _wish(run: str, wish: Wish | None, reason: str | None, home: Path, output: Format) -> None:
    """Write down what is wanted of a run, and say what comes of it."""
    opened = open_home(home)
    changed = opened.storage.wish(run, wish, reason)
    running = opened.is_locked()
    result = {"run": run, "wish": wish, "changed": changed, "coordinator_running": running}

    def show(console: Console) -> None:
        done = {"pause": "opens no further round", "stop": "ends", None: "goes on"}[wish]
        console.print(f"Run [bold]{run}[/bold] {done}" + ("" if changed else ", as it did before"), soft_wrap=True)
        if not running:
            console.print("The coordinator is not running: this takes effect with the next `foedus coordinator up`.")

    emit(result, output, show)


def run_id(charter: Charter) -> str:
    """The id of a charter's run."""
    return f"{charter.name[:_NAME_CHARACTERS]}-{charter.digest[:_SHORT]}"


def run_table(runs: list[dict[str, Any]]) -> Table:
    """Runs, a line each."""
    rows = ([one["run"], one["outcome"] or one["state"], f"{one['rounds_closed']}/{one['rounds']}"] for one in runs)
    return table(("run", "state", "rounds"), rows)


def _terms(charter: Charter) -> dict[str, Any]:
    return {
        "private": charter.private,
        "rounds": charter.privacy.rounds,
        "epsilon": charter.privacy.epsilon,
        "delta": charter.privacy.delta,
        "participants": [
            participant.model_dump(mode="json", exclude={"signing_key"}) for participant in charter.participants
        ],
    }
