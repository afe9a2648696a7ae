"""``foedus client charter``: what was offered, and a person's word on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.charter import Charter
from foedus_protocols.charter_checks import check_charter
from foedus_protocols.console import Format, FormatOption, emit, printable
from foedus_protocols.errors import StateError
from foedus_protocols.identity import load_signing_key
from foedus_protocols.store import FileStore
from rich.console import Console
from rich.table import Table

from foedus_client import policy, replay
from foedus_client.config import HOME_VARIABLE, Home, find_home
from foedus_client.membership import org_view, remembered
from foedus_client.receipts import open_ledger
from foedus_client.seat import Sources
from foedus_client.state import CharterRecord, ClientState

charter_app = typer.Typer(no_args_is_help=True, help="The terms of runs: list, read, approve, refuse.")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help=f"The client's folder; default: {HOME_VARIABLE}, else ./foedus-client.")
]
DigestArgument = Annotated[str, typer.Argument(help="The charter's digest, or its first characters.")]


@charter_app.command("list")
def charter_list(home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Every charter that was offered."""
    with _state(find_home(home)) as state:
        found = [_summary(record) for record in state.charters()]

    def render(console: Console) -> None:
        table = Table("charter", "name", "purpose", "state", "why", box=None)
        for one in found:
            cells = (one["digest"][:12], one["name"], one["purpose"], one["state"], one["reason"])
            table.add_row(*map(printable, cells))
        console.print(table if found else "no charter was offered yet", markup=False, highlight=False)

    emit({"charters": found}, output, render)


@charter_app.command("show")
def charter_show(digest: DigestArgument, home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """One charter in full, with what it means for us."""
    place = find_home(home)
    with _state(place) as state:
        record = state.charter(digest)
    charter = Charter.parse(FileStore(place.files).path(record.digest).read_bytes())
    org = place.load().org
    result = {**_summary(record), "charter": charter.model_dump(mode="json", exclude_none=True)}
    emit(result, output, lambda console: _render(charter, record, org, console))


@charter_app.command("approve")
def charter_approve(digest: DigestArgument, home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Let the daemon sign; every check is made now, and again before it does."""
    _decide(digest, home, output, approve=True, reason="approved here")


@charter_app.command("refuse")
def charter_refuse(
    digest: DigestArgument,
    reason: Annotated[str, typer.Option("--reason", help="For our own records; it is not sent.")] = "refused here",
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Have the daemon refuse. The coordinator learns that, and not why."""
    _decide(digest, home, output, approve=False, reason=reason)


def _decide(digest: str, home: Path | None, output: Format, *, approve: bool, reason: str) -> None:
    place = find_home(home)
    with _state(place) as state:
        if approve:
            _check(place, state, state.charter(digest))
        record = state.decide(digest, approve=approve, reason=reason)
    word = "approved: the daemon signs it within seconds" if approve else "refused"
    text = f"charter {record.digest[:12]} ({record.name}) {word}"
    emit(_summary(record), output, lambda console: console.print(text, markup=False, highlight=False))


def _check(place: Home, state: ClientState, record: CharterRecord) -> None:
    """The daemon's checks before signing, so that a person hears at once what stands against it."""
    store = FileStore(place.files)
    us = place.membership()
    # The daemon has fetched what an extension goes on from, and kept where it leads, before it asked a person.
    sources = Sources(state=state, store=store, pull=lambda digest, _most: store.path(digest), work=place.work)
    ledger = open_ledger(place.ledger, state)
    view = org_view(
        us,
        policy=policy.load(place.policy),
        ledger=ledger,
        rosters=remembered(state, sources.pull),
        signing_key=load_signing_key(place.signing_key),
        stage="sign",
        run=record.run,
        now=time.time(),
    )
    view = replace(view, earlier=lambda charter: replay.earlier(charter, us.org, sources, ledger))
    data = store.path(record.digest).read_bytes()
    check_charter(data, record.digest, record.operator_signature, view, stage="sign")


@contextmanager
def _state(home: Home) -> Iterator[ClientState]:
    if not home.state.exists():
        raise StateError(f"expected charters in {home.root}, no daemon has run there yet: `foedus client up`")
    state = ClientState(home.state)
    try:
        yield state
    finally:
        state.close()


def _summary(record: CharterRecord) -> dict[str, Any]:
    return {
        "digest": record.digest,
        "run": record.run,
        "name": record.name,
        "purpose": record.purpose,
        "state": record.state,
        "refused_step": record.refused_step,
        "reason": record.reason,
    }


def _render(charter: Charter, record: CharterRecord, org: str, console: Console) -> None:
    mine = charter.participant(org)
    privacy = charter.privacy
    promise = (
        f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} for one {mine.unit} added or removed"
        if privacy.epsilon is not None and privacy.delta is not None
        else "NOT PRIVATE (mode none)"
    )
    scores = (
        f"held-out scores leave without noise every {charter.evaluation.every} rounds"
        if charter.evaluation.term == "plain"
        else "no score leaves"
    )
    rows = {
        "charter": record.digest,
        "state": f"{record.state} {record.reason}".strip(),
        "run": f"{record.run} of federation {charter.federation}",
        "purpose": f"{charter.purpose} (domain: {charter.domain})",
        "participants": ", ".join(participant.id for participant in charter.participants),
        "base": f"{charter.base_name} ({charter.base[:12]})",
        "privacy": promise,
        "rounds": f"{privacy.rounds}, sampling {mine.sampling_prob:.4g}, {mine.expected_units:g} units expected each",
        "noise": f"multiplier {mine.noise_multiplier:g}, clip {privacy.l2_clip_norm:g}, our weight {mine.weight:.4g}",
        "evaluation": scores,
        "masks": "off: the coordinator sees each organisation's noised vector",
        "arrival": (
            f"a vector leaves at the next multiple of {slot:g} s"
            if (slot := charter.schedule.vector_slot_seconds)
            else "a vector leaves when it is ready, which tells the size of the sample"
        ),
        "release": charter.release.recipients
        + ("; of the adapters that were scored, the best" if charter.release.adapter == "best" else ""),
    }
    if (extends := charter.extends) is not None:
        rows["extends"] = f"run {extends.run}: {extends.rounds_spent} rounds before, which the promise includes"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, printable(value))
    console.print(table, markup=False, highlight=False)
