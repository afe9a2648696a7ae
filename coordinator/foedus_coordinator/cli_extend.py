"""`foedus coordinator run extend`: offer everybody to go on with an ended run for some more rounds.

What comes of it is a run of its own, under a charter of its own that everybody signs (`charter_extension.py`). It
starts from the ended run's last adapter and optimiser state, and its promise includes what is already spent.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import StateError
from rich.console import Console

from foedus_coordinator.cli_common import HomeOption, open_home, table
from foedus_coordinator.cli_run import run_app, run_id
from foedus_coordinator.config import DEFAULT_HOME, Home
from foedus_coordinator.storage import RunRow

if TYPE_CHECKING:
    from foedus_protocols.charter import Charter
    from foedus_protocols.charter_extension import Cost
    from foedus_protocols.messages import History

_DAY_SECONDS = 86_400


@run_app.command()
def extend(
    run: Annotated[str, typer.Argument(help="The id of a run that is complete or stopped.")],
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="How many rounds more.")],
    valid_days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="From now; by default as long as the run's own charter was.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Ask every participant of an ended run to sign new terms for more rounds, what is spent included."""
    from foedus_protocols.charter import Charter, sign_charter
    from foedus_protocols.charter_extension import draft_extension

    from foedus_coordinator.chain import first_charter

    opened = open_home(home)
    row = opened.storage.run(run)
    _require_ended(row)
    _require_newest(opened, run)
    old = Charter.parse(opened.files.path(row.charter_digest).read_bytes())
    history, opened_rounds = _history(opened, row)
    opened_rounds += _rounds_of_failed(opened, run)
    if not history.rounds:
        raise StateError(f"expected a run with a closed round to go on from, {run} has none: start a run of its own")
    progress_console.print(f"replaying {len(history.rounds)} closed rounds of {run}", markup=False, highlight=False)
    adapter = _replayed(opened, old, run, history)
    first = first_charter(old, opened.files)
    drawn, costs = draft_extension(
        old,
        first=first,
        run=run,
        history=opened.files.put_bytes(history.encode()),
        adapter=adapter,
        opened=opened_rounds,
        rounds=rounds,
        roster=opened.members.roster(),
        now=int(time.time()),
        valid_seconds=old.expires - old.not_before if valid_days is None else valid_days * _DAY_SECONDS,
    )
    opened.files.put_bytes(drawn.canonical())
    offered = run_id(drawn)
    opened.storage.add_run(
        offered,
        charter_digest=drawn.digest,
        operator_signature=sign_charter(opened.operator_key, drawn.digest),
        base_config=row.base_config,
        orgs=[participant.id for participant in drawn.participants],
        files=_files(opened, drawn),
        extends=run,
    )
    # A run that ended just now erases what only ended runs name: before the line above, this file was such a one.
    opened.files.put_bytes(history.encode())
    result = _result(drawn, costs, run=offered, first=first)
    emit(result, output, lambda console: _show(result, console))


def _require_ended(row: RunRow) -> None:
    """Only a run that everybody was told the end of has a last adapter, and nothing left to spend."""
    if row.state != "finished":
        raise StateError(
            f"expected an ended run, {row.id} is {row.state}: wait for its end, or end it with "
            f"`foedus coordinator run stop {row.id}`, then extend it"
        )
    if row.outcome not in ("complete", "stopped"):
        raise StateError(
            f"expected a run that is complete or stopped, {row.id} is {row.outcome} ({row.reason}): "
            "start a run of its own"
        )


def _require_newest(home: Home, run: str) -> None:
    """A run is gone on with once: two branches would each leave out what the other one spends.

    An extension that failed or was refused spends nothing more, and what it spent is counted (`_rounds_of_failed`).
    """
    for other in home.storage.runs():
        if other.extends == run and (other.state != "finished" or other.outcome in ("complete", "stopped")):
            raise StateError(
                f"expected a run that was not extended yet, {run} goes on as {other.id}: extend that one instead"
            )


def _rounds_of_failed(home: Home, run: str) -> int:
    """Rounds that extensions of a run opened before they failed: spent, though no later run goes on from them."""
    return sum(len(home.storage.rounds(other.id)) for other in home.storage.runs() if other.extends == run)


def _history(home: Home, row: RunRow) -> tuple[History, int]:
    """The closed rounds of an ended run, and how many it opened."""
    from foedus_protocols.messages import History

    from foedus_coordinator.chain import closed_rounds

    rounds = home.storage.rounds(row.id)
    return History(charter_digest=row.charter_digest, rounds=closed_rounds(rounds)), len(rounds)


def _replayed(home: Home, charter: Charter, run: str, history: History) -> str:
    """The ended run's last adapter, recomputed from its sums: what is offered is what follows from them."""
    from foedus_coordinator.chain import Chain

    chain = Chain(charter, run=run, files=home.files)
    chain.follow(history.rounds)
    return chain.digest


def _files(home: Home, drawn: Charter) -> list[str]:
    """What the participants may pull for the new run: its charter, and all that leads to its first adapter."""
    from foedus_protocols.charter import Charter
    from foedus_protocols.messages import MAX_HISTORY_BYTES, History

    found, charter = {drawn.digest}, drawn
    while charter.extends is not None:
        before = History.decode(home.files.read(charter.extends.history, max_bytes=MAX_HISTORY_BYTES))
        found |= {charter.extends.charter, charter.extends.history, *(entry.sum_digest for entry in before.rounds)}
        charter = Charter.parse(home.files.path(charter.extends.charter).read_bytes())
    return sorted(found)


def _result(charter: Charter, costs: dict[str, Cost], *, run: str, first: Charter) -> dict[str, Any]:
    extends = charter.extends
    spent = 0 if extends is None else extends.rounds_spent
    return {
        "run": run,
        "charter": charter.digest,
        "extends": None if extends is None else extends.run,
        "rounds": charter.privacy.rounds,
        "rounds_spent": spent,
        "private": charter.private,
        "epsilon": charter.privacy.epsilon,
        "epsilon_first": first.privacy.epsilon,
        "delta": charter.privacy.delta,
        "participants": [
            {"id": org, "epsilon_rdp": one.filter, "epsilon_pld": one.pld} for org, one in sorted(costs.items())
        ],
    }


def _show(result: dict[str, Any], console: Console) -> None:
    console.print(
        f"Run [bold]{result['run']}[/bold] is offered; it goes on from {result['extends']} "
        f"({result['rounds_spent']} rounds spent) for {result['rounds']} more. Charter {result['charter']}",
        soft_wrap=True,
    )
    if not result["private"]:
        console.print("[bold red]NOT PRIVATE[/bold red]: mode none adds no noise and promises nothing.")
        return
    rows = ([one["id"], f"{one['epsilon_rdp']:.4f}", f"{one['epsilon_pld']:.4f}"] for one in result["participants"])
    console.print(table(("id", "epsilon by RDP: promised", "by PLD: had all been fixed beforehand"), rows))
    console.print(
        f"Promise: epsilon {result['epsilon']:g} at delta {result['delta']:g}, for all rounds since the first run "
        f"(which promised {result['epsilon_first']:g}). Whether to extend was decided after results were seen, so the "
        "RDP figure is the one that counts.",
        soft_wrap=True,
    )
