"""``foedus client check``: what a charter would cost, and a rehearsal of it on public text. Nothing is sent."""

from __future__ import annotations

import secrets
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter
from foedus_protocols.charter_checks import check_charter
from foedus_protocols.console import Format, FormatOption, emit, printable, progress_console
from foedus_protocols.errors import ConfigError, PolicyRefused, UsageError
from foedus_protocols.identity import load_signing_key
from foedus_protocols.messages import Agreement
from foedus_protocols.store import FileStore
from rich.console import Console
from rich.table import Table

from foedus_client import policy
from foedus_client.budget import expected_epsilon
from foedus_client.config import HOME_VARIABLE, Home, find_home
from foedus_client.membership import org_view, remembered
from foedus_client.receipts import open_ledger
from foedus_client.seat import Seat, take_seat
from foedus_client.state import CharterRecord, ClientState


def check(
    charter: Annotated[str, typer.Argument(help="An offered charter's digest (its first characters), or its file.")],
    mbit: Annotated[float | None, typer.Option(min=0.01, help="The line's speed in Mbit/s, for the seconds.")] = None,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", help="Rehearse the rounds on a PUBLIC file instead, to choose settings.")
    ] = None,
    unit: Annotated[str, typer.Option(help="With --dry-run: the file's unit field, or record.")] = "record",
    rate: Annotated[
        list[float] | None, typer.Option(help="With --dry-run: a learning rate to try; may be repeated.")
    ] = None,
    clip: Annotated[
        list[float] | None, typer.Option(help="With --dry-run: an l2_clip_norm to try; may be repeated.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option("--home", help=f"The client's folder; default: {HOME_VARIABLE}, else ./foedus-client."),
    ] = None,
    output: FormatOption = Format.text,
) -> None:
    """Say what a charter would cost here: seconds, bytes and budget, from one dry step on the real data.

    Nothing is sent, signed or spent. With --dry-run a public file takes the place of the data, and settings are tried.
    """
    place = find_home(home)
    if dry_run is None and (rate or clip):
        raise UsageError("expected --dry-run FILE with --rate or --clip: tuning on private records would spend budget")
    found, record = _charter(charter, place)
    if dry_run is not None:
        _rehearse(found, place, dry_run, unit, rates=rate or [], clips=clip or [], output=output)
        return
    result: dict[str, Any] = {"charter": found.digest, "name": found.name, "private": found.private}
    refused = _refused(found, record, place)
    result |= {
        "checked": record is not None,
        "refused_step": None if refused is None else refused.step,
        "reason": None if refused is None else printable(str(refused)),
        "estimate": None,
    }
    if refused is None:
        from foedus_client.estimate import estimate

        result |= _budget(found, place)
        made = estimate(_seat(found, record, place), place.root, mbit=mbit, say=_say)
        result["estimate"] = made.as_dict()
    emit(result, output, lambda console: _show(result, console))
    if refused is not None:
        raise refused


def _charter(text: str, place: Home) -> tuple[Charter, CharterRecord | None]:
    """The charter of a file, or one that was offered, with what is known of it."""
    path = Path(text)
    if path.is_file():
        if path.stat().st_size > MAX_CHARTER_BYTES:
            raise ConfigError(f"expected a charter of at most {MAX_CHARTER_BYTES} bytes in {path}, got more")
        return Charter.parse(path.read_bytes()), None
    with closing(ClientState(place.state)) as state:
        record = state.charter(text)
    return Charter.parse(FileStore(place.files).path(record.digest).read_bytes()), record


def _refused(charter: Charter, record: CharterRecord | None, place: Home) -> PolicyRefused | None:
    """The first of checks 1 to 11 that fails; of a file, which carries no signature, the budget alone is asked."""
    try:
        if record is None:
            _budget(charter, place)
            return None
        files = FileStore(place.files)
        with closing(ClientState(place.state)) as state:
            rosters = remembered(state, lambda digest, limit: files.path(digest))
            ledger = open_ledger(place.ledger, state)
        view = org_view(
            place.membership(),
            policy=policy.load(place.policy),
            ledger=ledger,
            rosters=rosters,
            signing_key=load_signing_key(place.signing_key),
            stage="sign",
            run=record.run,
            now=time.time(),
        )
        check_charter(charter.canonical(), record.digest, record.operator_signature, view, stage="sign")
    except PolicyRefused as error:
        return error
    return None


def _budget(charter: Charter, place: Home) -> dict[str, Any]:
    """What the namespace would stand at."""
    limits = policy.load(place.policy).limits()
    namespace = limits.namespaces.get(charter.purpose)
    if namespace is None:
        raise PolicyRefused(9, "the policy allows no data for this charter's purpose")
    with closing(ClientState(place.state)) as state:
        judged = expected_epsilon(open_ledger(place.ledger, state), limits, charter, place.load().org)
    return {
        "namespace": namespace.name,
        "epsilon_cap": namespace.epsilon_cap,
        "delta": namespace.delta,
        "epsilon_after": judged.epsilon,
        "accountant": judged.accountant,
    }


def _seat(charter: Charter, record: CharterRecord | None, place: Home, split_key: str | None = None) -> Seat:
    """Our seat, for its constants; no round is played from it."""

    def check(agreement: Agreement, spends: bool) -> None:
        raise PolicyRefused(12, "a dry step takes part in no round")

    rules = policy.load(place.policy)
    key = split_key or place.split_key(rules.dataset_for(charter.purpose).namespace)
    run = "dry" if record is None else record.run
    return take_seat(charter, run, place.membership(), rules=rules, split_key=key, check=check)


def _rehearse(
    charter: Charter, place: Home, file: Path, unit: str, *, rates: list[float], clips: list[float], output: Format
) -> None:
    from foedus_client.rehearsal import rehearse

    # A split of its own: the namespace's key has no business with a public file.
    seat = _seat(charter, None, place, split_key=secrets.token_hex(32))
    setup = seat.setup.model_copy(update={"files": [str(file.absolute())], "units": unit, "columns": {}})
    found = rehearse(charter, setup, seat.terms, rates=rates, clips=clips, folder=place.root, say=_say)
    result = {"charter": charter.digest, **asdict(found)}

    def show(console: Console) -> None:
        table = Table("rate", "clip", "loss before", "loss after", box=None)
        for one in found.results:
            cells = (one.rate, one.l2_clip_norm, one.loss_before, one.loss_after)
            table.add_row(*(f"{value:.4g}" for value in cells))
        console.print(f"proxy: {found.units} units train, {found.heldout} measure; charter {charter.name}")
        console.print(f"median unit norm {found.median_norm:.4g}: start with a clip of {found.suggested_clip:.2g}")
        console.print(table)

    emit(result, output, show)


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("charter", f"{result['name']} ({result['charter'][:12]})")
    made = "passed" if result["checked"] else "not made: the file carries no signature"
    table.add_row("checks 1 to 11", made if result["reason"] is None else result["reason"])
    if not result["private"]:
        table.add_row("budget", "none is spent: NOT PRIVATE, the run adds no noise")
    elif result["estimate"]:
        spent = f"epsilon {result['epsilon_after']:.4g} of {result['epsilon_cap']:g} at delta {result['delta']:g}"
        table.add_row(f"budget {result['namespace']}", f"{spent} once it is signed ({result['accountant']})")
    if estimated := result["estimate"]:
        parts = ", ".join(f"{name} {value:g}" for name, value in estimated["seconds"].items())
        table.add_row("seconds, measured", parts)
        table.add_row("a round", f"{estimated['round_seconds']:g} s here, without transfers or waiting for others")
        table.add_row("the run", f"{estimated['run_seconds']:g} s for {estimated['rounds']} rounds")
        table.add_row("bytes", f"{estimated['bytes_up']:,} up, {estimated['bytes_down']:,} down")
    console.print(table, markup=False, highlight=False)
    console.print("Nothing was sent, signed or spent.", highlight=False)


def _say(line: str) -> None:
    progress_console.print(f"  {line}", markup=False, highlight=False)
