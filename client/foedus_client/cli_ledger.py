"""``foedus client privacy ledger``: read, verify and copy the ledger, and state what a lost one had held."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import digest
from foedus_protocols.console import Format, FormatOption, emit, printable
from foedus_protocols.errors import StateError, UsageError
from foedus_protocols.files import write_durably
from rich.console import Console
from rich.table import Table

from foedus_client import policy
from foedus_client.allotments import Account, epsilon_of_spent, merge_events
from foedus_client.config import HOME_VARIABLE, Home, find_home
from foedus_client.ledger import Ledger
from foedus_client.receipts import ledger_is_gone, open_ledger, remember_heads
from foedus_client.restoring import state_spent
from foedus_client.state import ClientState
from foedus_client.unexplained import Unexplained, explained, unexplained

ledger_app = typer.Typer(no_args_is_help=True, help="The privacy ledger: what was spent, and what was promised.")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help=f"The client's folder; default: {HOME_VARIABLE}, else ./foedus-client.")
]
TargetArgument = Annotated[Path, typer.Argument(help="The file to write; it must not exist.")]


@ledger_app.callback()
def _ledger() -> None:
    """The privacy ledger: what was spent, and what was promised."""


@ledger_app.command()
def show(home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Each namespace: epsilon spent of its cap, its charters, what was restored and what was stated."""
    place = find_home(home)
    ledger = Ledger(place.ledger, read_only=True)
    terms = policy.load(place.policy).namespaces if place.policy.exists() else {}
    found = [_namespace(name, account, terms.get(name)) for name, account in ledger.accounts().items()]
    emit(
        {"namespaces": found, "unexplained": [asdict(one) for one in _unexplained(place)]},
        output,
        lambda console: _render(found, _unexplained(place), console),
    )


@ledger_app.command()
def verify(
    file: Annotated[Path | None, typer.Argument(help="A ledger or a copy of one; default: this home's.")] = None,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Recompute every link of every chain. A changed entry is named with its namespace and place.

    What a file forgot at its end cannot be seen from itself: the daemon compares it with the coordinator's receipts.
    """
    path = file or find_home(home).ledger
    ledger = Ledger(path, read_only=True)
    with ledger.transaction() as transaction:
        heads = transaction.heads()
    found = {name: {"entries": sequence + 1, "head": head} for name, (sequence, head) in heads.items()}
    lines = [f"{name}: {one['entries']} entries, head {one['head']}" for name, one in found.items()]
    text = "\n".join([f"{path}: whole, format {ledger.format}", *lines])
    emit(
        {"file": str(path), "format": ledger.format, "namespaces": found},
        output,
        lambda console: console.print(_printable_lines(text), markup=False, highlight=False, soft_wrap=True),
    )


@ledger_app.command()
def export(target: TargetArgument, home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Write every entry as a line of canonical JSON; the SHA-256 of a line is `previous` in its namespace's next."""
    contents = Ledger(find_home(home).ledger, read_only=True).export()
    data = b"".join(content + b"\n" for content in contents)
    write_durably(target, data, mode=0o600, overwrite=False)
    result = {"file": str(target), "entries": len(contents), "digest": digest(data)}
    text = f"{target}: {len(contents)} entries"
    emit(result, output, lambda console: console.print(text, markup=False, highlight=False))


@ledger_app.command()
def backup(target: TargetArgument, home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Copy the ledger, also while the daemon runs, into one file that `verify` accepts."""
    Ledger(find_home(home).ledger, read_only=True).backup(target)
    with Ledger(target, read_only=True).transaction() as transaction:
        heads = transaction.heads()
    result = {"file": str(target), "heads": {name: head for name, (_, head) in heads.items()}}
    text = f"{target}: verified. It forgets what is spent from now on: put it back only where the ledger is lost"
    emit(result, output, lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True))


@ledger_app.command()
def state(
    namespace: Annotated[str, typer.Option("--namespace", help="The unit namespace, as policy.toml has it.")],
    event: Annotated[
        list[str] | None,
        typer.Option("--event", metavar="NOISE:PROB:STEPS", help="Steps that were spent with this noise and sampling."),
    ] = None,
    nothing: Annotated[bool, typer.Option("--nothing", help="No private round was spent.")] = False,
    run: Annotated[
        list[str] | None,
        typer.Option("--run", help="A run that this covers; default: all that the daemon could not explain."),
    ] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="The privacy unit; must be the policy's.")] = None,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """State what was spent in a namespace where its ledger was lost, or is a copy from before a charter was signed.

    It counts against the cap for ever, and the runs that it covers are over for this organisation. Say rather too much
    than too little: the coordinator's receipts, shown by `show`, are the least that it can be.
    """
    if bool(event) == nothing:
        raise UsageError("expected --event NOISE:PROB:STEPS (as often as needed) or --nothing, got both or neither")
    place = find_home(home)
    terms = policy.load(place.policy).namespaces.get(namespace)
    if terms is None:
        raise StateError(f"expected a namespace of policy.toml, got {namespace!r}: register its data first")
    if unit not in (None, terms.unit):
        raise UsageError(f"expected the policy's unit {terms.unit!r} of namespace {namespace!r}, got {unit!r}")
    events = merge_events(map(_event, event or []))
    with ClientState(place.state) as memory:
        runs = run or [one.run for one in unexplained(memory) if _draws_on(place, one, namespace)]
        if ledger_is_gone(place.ledger, memory):
            ledger = Ledger(place.ledger)
            remember_heads(ledger, memory, anew=True)  # Those of the lost file witness nothing any more.
        else:
            ledger = open_ledger(place.ledger, memory)
        ledger.open_namespace(namespace, unit=terms.unit)
        entry = state_spent(ledger, namespace, events, runs=runs, delta=terms.delta, cap=terms.epsilon_cap)
        for one in runs:
            explained(memory, one)
        left = [one.run for one in unexplained(memory)]
    result = {
        "namespace": namespace,
        "events": [asdict(one) for one in events],
        "runs": sorted(runs),
        "epsilon_spent": ledger.epsilon_spent(namespace, terms.delta),
        "entry": entry.sequence,
        "unexplained": left,
    }
    text = (
        f"{namespace}: stated, epsilon {result['epsilon_spent']:.4g} of {terms.epsilon_cap:g} spent. "
        f"Covered and over for us: {', '.join(sorted(runs)) or 'no run'}. "
        f"Still unexplained: {', '.join(left) or 'none'}"
    )
    emit(result, output, lambda console: console.print(printable(text), markup=False, highlight=False, soft_wrap=True))


def _printable_lines(text: str) -> str:
    """Several lines for a terminal, each without escape sequences."""
    return "\n".join(map(printable, text.splitlines()))


def _event(text: str) -> Event:
    try:
        noise, prob, steps = text.split(":")
        return Event(noise_multiplier=float(noise), sampling_prob=float(prob), steps=int(steps))
    except ValueError:
        raise UsageError(f"expected an event as NOISE:PROB:STEPS, e.g. 2.0:0.0625:30, got {text!r}") from None


def _draws_on(place: Home, one: Unexplained, namespace: str) -> bool:
    """Whether an unexplained run spent units of a namespace; where its purpose is unknown, whoever names it decides."""
    rules = policy.load(place.policy)
    served = {purpose: dataset.namespace for dataset in rules.datasets for purpose in dataset.purposes}
    return one.purpose is not None and served.get(one.purpose) == namespace


def _unexplained(place: Home) -> list[Unexplained]:
    if not place.state.exists():
        return []
    with ClientState(place.state) as memory:
        return unexplained(memory)


def _namespace(name: str, account: Account, terms: policy.Namespace | None) -> dict[str, Any]:
    delta = None if terms is None else terms.delta
    return {
        "namespace": name,
        "unit": account.unit,
        "epsilon_spent": None if delta is None else epsilon_of_spent(account.charges, delta),
        "epsilon_cap": None if terms is None else terms.epsilon_cap,
        "delta": delta,
        "charters": [
            {
                "charter": charter,
                "name": one.details.get("name"),
                "run": one.run,
                "allotted_steps": sum(event.steps for event in one.events),
                "spent_steps": sum(event.steps for event in one.spent),
                "reservations": len(one.reservations),
                "committed": len(one.commits),
                "restored": one.restored,
                "abandoned": one.abandoned,
                "open": one.open,
                "expires": one.expires,
            }
            for charter, one in account.allotments.items()
        ],
        "stated": [
            {"events": [asdict(event) for event in one.spent], "runs": sorted(one.runs)} for one in account.statements
        ],
    }


def _render(found: list[dict[str, Any]], lost: list[Unexplained], console: Console) -> None:
    for one in found:
        budget = "no terms in policy.toml"
        if one["epsilon_cap"] is not None:
            budget = f"epsilon {one['epsilon_spent']:.4g} of {one['epsilon_cap']:g} spent at delta {one['delta']:g}"
        console.print(printable(f"{one['namespace']} (unit {one['unit']}): {budget}"), markup=False, highlight=False)
        table = Table("charter", "name", "state", "steps spent", "allotted", "restored", box=None)
        for charter in one["charters"]:
            state_text = ("open" if charter["open"] else "over") + (", abandoned" if charter["abandoned"] else "")
            steps = (str(charter[key]) for key in ("spent_steps", "allotted_steps", "restored"))
            table.add_row(charter["charter"][:12], printable(charter["name"] or ""), state_text, *steps)
        console.print(table if one["charters"] else "  no charter was signed", markup=False, highlight=False)
        for stated in one["stated"]:
            events = ", ".join(
                f"{event['noise_multiplier']:g}:{event['sampling_prob']:g}:{event['steps']}"
                for event in stated["events"]
            )
            text = f"  stated: {events or 'nothing'}, covers {', '.join(stated['runs']) or 'no run'}"
            console.print(printable(text), markup=False, highlight=False)
    if not found:
        console.print("the ledger has no namespace yet", markup=False, highlight=False)
    for run in lost:
        console.print(printable(f"UNEXPLAINED: {run}"), markup=False, highlight=False)
