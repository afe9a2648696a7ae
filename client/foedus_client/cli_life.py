"""``foedus client pause|resume|leave|health``: a person's word to the running daemon, and a watcher's question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, printable
from foedus_protocols.errors import StateError, UsageError
from rich.console import Console

from foedus_client import life
from foedus_client.config import HOME_VARIABLE, Home, find_home
from foedus_client.health import problems_of
from foedus_client.lock import HomeLock
from foedus_client.receipts import open_ledger
from foedus_client.state import CharterRecord, ClientState

HomeOption = Annotated[
    Path | None, typer.Option("--home", help=f"The client's folder; default: {HOME_VARIABLE}, else ./foedus-client.")
]
_SIGNED = ("signed", "agreed")


def pause(
    reason: Annotated[str, typer.Option("--reason", help="For our own records; it is not sent.")] = "paused here",
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Train in no further round until `resume`: orders are answered without a vector, and the rest goes on.

    A round whose budget is reserved already still leaves; one that is being trained is given up and costs nothing.
    """
    place = _joined(home)
    with ClientState(place.state) as state:
        life.pause(state, reason)
    _say({"paused": True, "reason": reason}, "paused: no further round is trained until `foedus client resume`", output)


def resume(home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Train again, from the next order on."""
    place = _joined(home)
    with ClientState(place.state) as state:
        was = life.resume(state)
    _say({"paused": False, "was_paused": was}, "resumed" if was else "it was not paused", output)


def leave(
    run: Annotated[str, typer.Argument(help="The run, or its charter's digest (the first characters).", metavar="RUN")],
    reason: Annotated[str, typer.Option("--reason", help="For our own records; it is not sent.")] = "left here",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Leave a run for good: what its charter did not spend is free again, and nothing of ours joins it any more.

    It cannot be taken back. What was sent stays in the sums, and what was spent stays spent.
    """
    place = _joined(home)
    with ClientState(place.state) as state:
        record = _run(state, run)
        if not yes:
            _confirm(record)
        left = life.leave(state, open_ledger(place.ledger, state), record.digest, reason)
    text = f"run {left.run} ({printable(left.name)}) is left; its unspent budget is free"
    _say({"run": left.run, "charter": left.digest, "state": left.state}, text, output)


def health(home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Say whether the daemon does its work. The exit code is 0, or that of the gravest problem.

    12: not running, a full disk or a damaged file; 3: the policy cannot be read; 7: the ledger was changed; 4: the
    coordinator is out of reach for two minutes, or the certificate runs out; 6: a budget is spent.
    """
    place = find_home(home)
    found = problems_of(place)
    code = found[0].code if found else 0
    result = {
        "healthy": not found,
        "exit_code": code,
        "daemon": "running" if HomeLock.held(place.lock) else "stopped",
        "problems": [vars(one) for one in found],
    }
    text = "\n".join(f"{one.code}: {one.text}" for one in found) or "healthy"
    _say(result, text, output)
    raise typer.Exit(code)


def _run(state: ClientState, name: str) -> CharterRecord:
    """The charter of a run that we take part in.

    Raises:
        StateError: There is none, it is over or was left, or we have not signed it.
    """
    named = [record for record in state.charters() if record.run == name]
    record = named[-1] if named else state.charter(name)
    if record.state not in _SIGNED:
        hint = "; `foedus client charter refuse` is for what is not signed" if record.state == "offered" else ""
        raise StateError(f"expected a run that we take part in, {record.run} is {record.state}{hint}")
    return record


def _confirm(record: CharterRecord) -> None:
    if not sys.stdin.isatty():
        raise UsageError("expected --yes: leaving a run cannot be taken back, and there is no terminal to ask at")
    question = f"Leave {record.run} ({printable(record.name)}) for good?"
    if not typer.confirm(question, err=True):
        raise typer.Exit(0)


def _joined(home: Path | None) -> Home:
    place = find_home(home)
    place.membership()
    place.make()
    return place


def _say(result: dict[str, Any], text: str, output: Format) -> None:
    def render(console: Console) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    emit(result, output, render)
