"""`foedus coordinator invite | approve | revoke`: who is in, decided by a person who compared fingerprints.

The commands work beside a running coordinator: it reads the same database at each call. What is not built: a quorum of
the other members for a removal. The operator alone decides here.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import StateError, UsageError, VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import human_fingerprint, parse_fingerprint
from rich.console import Console

from foedus_coordinator.cli_common import HomeOption, open_home
from foedus_coordinator.config import DEFAULT_HOME, Home, at
from foedus_coordinator.members import Request


def invite(
    org: Annotated[str, typer.Argument(help="The organisation's id; the token is good for this name only.")],
    token_file: Annotated[Path | None, typer.Option(help="Write the token here (0600) instead of showing it.")] = None,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Make a one-time token, good for a day, with the fingerprint that the organisation must check.

    A member that lost its keys, or let its certificate run out, is invited again under its own id.
    """
    opened = open_home(home)
    again = _member_fingerprint(opened, org) is not None
    if token_file is not None and token_file.exists():  # Before a token that was handed out is replaced.
        raise StateError(f"expected no file at {token_file}, there is one; move it away if it is not needed")
    token = opened.members.invite(org)
    address = at(opened.config.address, opened.config.enrolment_port)
    pin = opened.shown_ca
    result: dict[str, Any] = {"org": org, "coordinator": address, "ca_fingerprint": pin, "again": again}
    if token_file is None:
        result["token"] = token
    else:
        write_durably(token_file, f"{token}\n".encode(), mode=0o600, overwrite=False)
        result["token_file"] = str(token_file)

    def show(console: Console) -> None:
        where = f"in {token_file}" if token_file else f"(shown once)\n  {token}"
        console.print(f"Token for {org} {where}", soft_wrap=True)
        console.print(f"CA fingerprint\n  {human_fingerprint(pin)}", soft_wrap=True)
        console.print(
            f"Hand both over by different channels. There: foedus client join {'--again ' if again else ''}"
            f"--coordinator {address} --org {org} --ca-fingerprint {pin}",
            soft_wrap=True,
        )

    emit(result, output, show)


def approve(
    org: Annotated[str, typer.Argument(help="The organisation that has asked.")],
    fingerprint: Annotated[str | None, typer.Option(help="Approve only a request with this fingerprint.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask. To replace a member's key, give --fingerprint too.")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Let an organisation in, or a member in again with new keys, after a look at its signing key's fingerprint."""
    opened = open_home(home)
    pending = [request for request in opened.members.requests(org) if request.state == "pending"]
    if not pending:
        raise StateError(f"expected a pending request of {org}, there is none; see `foedus coordinator status`")
    request = pending[0]
    if fingerprint is not None and parse_fingerprint(fingerprint) != request.fingerprint:
        raise VerificationError(
            f"expected a request with fingerprint {fingerprint}, {org} asks with {request.fingerprint}; "
            "somebody else may have used the token: invite again"
        )
    current = _member_fingerprint(opened, org)
    replaced = current is not None and current != request.fingerprint
    progress_console.print(_question(request, current))
    if replaced and yes and fingerprint is None:
        raise UsageError("expected --fingerprint beside --yes: it replaces a member's key, and ends its runs")
    if not yes:
        if not progress_console.is_terminal:
            raise UsageError("expected --yes, or a terminal to ask on: compare the fingerprint first")
        typer.confirm("Does the organisation read the same?", abort=True, err=True)
    roster = opened.members.approve(request, authority=opened.authority, key=opened.operator_key, replacing=current)
    ended = _end_runs(opened, org, f"{org} enrolled again with another signing key") if replaced else []
    result = {
        "org": org,
        "fingerprint": request.fingerprint,
        "roster_version": roster.version,
        "replaced": current if replaced else None,
        "runs_ended": ended,
    }

    def show(console: Console) -> None:
        console.print(f"{org} is a member (roster version {roster.version})")
        _show_ended(console, ended)

    emit(result, output, show)


def revoke(
    org: Annotated[str, typer.Argument(help="The member that is to go.")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the ending of its runs, which others see.")] = "",
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Remove a member at once: roster, certificates, open streams, and the runs that it takes part in.

    It can be invited again. What it was sent before stays with it.
    """
    opened = open_home(home)
    roster = opened.members.revoke(org, key=opened.operator_key)
    ended = _end_runs(opened, org, f"{org} was revoked" + (f": {reason}" if reason else ""))
    result = {"org": org, "roster_version": roster.version, "runs_ended": ended}

    def show(console: Console) -> None:
        console.print(f"{org} is no member any more (roster version {roster.version})")
        _show_ended(console, ended)

    emit(result, output, show)


def _member_fingerprint(home: Home, org: str) -> str | None:
    return next((member.fingerprint for member in home.members.roster().members if member.id == org), None)


def _question(request: Request, current: str | None) -> str:
    """What a person compares before a certificate is issued."""
    asked = human_fingerprint(request.fingerprint)
    if current is None:
        return f"{request.org} asks to join. Its signing key's fingerprint:\n  {asked}"
    if current == request.fingerprint:
        return f"{request.org}, a member, asks for a new certificate. Its signing key is the same:\n  {asked}"
    return (
        f"{request.org} is a member, and asks to join again with ANOTHER signing key. The member's until now:\n"
        f"  {human_fingerprint(current)}\nThe one that would take its place; the runs that it takes part in end:\n"
        f"  {asked}"
    )


def _end_runs(home: Home, org: str, reason: str) -> list[str]:
    """Ask every unfinished run that an organisation takes part in to end, and name them."""
    ended = []
    for row in home.storage.runs():
        if row.state != "finished" and org in home.storage.signatures(row.id):
            with suppress(StateError):  # It ended by itself meanwhile.
                home.storage.wish(row.id, "stop", reason)
                ended.append(row.id)
    return ended


def _show_ended(console: Console, runs: list[str]) -> None:
    for run in runs:
        console.print(f"run {run} ends", soft_wrap=True)
