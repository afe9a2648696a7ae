"""``foedus client``: an organisation's side, from joining to the daemon."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import UsageError
from foedus_protocols.identity import human_fingerprint, parse_fingerprint
from foedus_protocols.logs import LogFormat, LogFormatOption, setup
from foedus_protocols.manifest import read_manifest
from foedus_protocols.memory import give_memory_back
from foedus_protocols.proxy import require_no_credentials
from rich.markup import escape

from foedus_client import policy
from foedus_client.cli_charter import charter_app
from foedus_client.cli_check import check
from foedus_client.cli_life import health, leave, pause, resume
from foedus_client.cli_privacy import privacy_app
from foedus_client.cli_status import status_of, status_table
from foedus_client.config import HOME_VARIABLE, find_home

app = typer.Typer(
    no_args_is_help=True, help="An organisation's side: keys, policy, budget, and the daemon that trains."
)
data_app = typer.Typer(no_args_is_help=True, help="Register data sets.")
base_app = typer.Typer(no_args_is_help=True, help="Allow base models.")
app.add_typer(data_app, name="data")
app.add_typer(base_app, name="base")
app.add_typer(charter_app, name="charter")
app.add_typer(privacy_app, name="privacy")

T = TypeVar("T")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help=f"The client's folder; default: {HOME_VARIABLE}, else ./foedus-client.")
]


@app.command()
def join(
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", help="HOST:PORT of the coordinator's enrolment port.")
    ] = None,
    org: Annotated[str | None, typer.Option("--org", help="Our id, as the invitation names it.")] = None,
    ca_fingerprint: Annotated[
        str | None, typer.Option("--ca-fingerprint", help="The federation CA's fingerprint, from the invitation.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Read the one-time token from a file.")
    ] = None,
    token_stdin: Annotated[bool, typer.Option("--token-stdin", help="Read the token from standard input.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the request is approved.")] = True,
    proxy: Annotated[
        str | None, typer.Option("--proxy", help="http://HOST:PORT to dial through; default: HTTPS_PROXY and NO_PROXY.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Enrol this home anew, with a new invitation: ledger and policy stay.")
    ] = False,
    keep_signing_key: Annotated[
        bool, typer.Option("--keep-signing-key", help="With --again: only the certificate ran out.")
    ] = False,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Make keys here, present the invitation's token, and fetch the certificate once it is approved.

    Run it again to go on where it stopped; then only --home is needed.
    """
    from foedus_client import join as joining

    if proxy is not None:
        require_no_credentials(proxy)
    place = find_home(home)
    given = {"coordinator": coordinator, "org": org, "ca_fingerprint": ca_fingerprint, "proxy": proxy}
    token = _token(token_file, token_stdin) if again else None  # Before anything is put aside.
    if again:
        config = joining.start_again(place, **given, keep_signing_key=keep_signing_key)
    else:
        config = joining.configure(place, **given)
    joining.prepare(place, config)
    if token is None and joining.needs_token(config):
        token = _token(token_file, token_stdin)
    result = joining.join(
        place, config, token=token, wait=wait, say=lambda text: progress_console.print(escape(text), highlight=False)
    )
    lines = [
        f"{result.org}: {result.state}",
        f"our signing key: {human_fingerprint(result.fingerprint)}",
        "read it to the coordinator's administrator, who compares it before approving"
        if result.state == "pending"
        else f"federation {result.federation}, operator {human_fingerprint(result.operator_fingerprint or '')}",
    ]
    emit(
        {**vars(result), "home": str(place.root)},
        output,
        lambda console: console.print("\n".join(lines), markup=False, highlight=False),
    )


@data_app.command("add")
def data_add(
    files: Annotated[list[Path], typer.Argument(help="JSONL, CSV or TSV files, plain or gzipped.", metavar="FILE...")],
    name: Annotated[str | None, typer.Option("--name", help="What the data set is called here.")] = None,
    purpose: Annotated[
        list[str] | None, typer.Option("--purpose", help="What it may be used for; a charter names one purpose.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="The population of units whose budget it draws on.")
    ] = None,
    unit: Annotated[
        list[str] | None, typer.Option("--unit", help="FIELD that is the privacy unit, NAME=FIELD, or record.")
    ] = None,
    units_at_most: Annotated[
        int | None, typer.Option("--units-at-most", help="A power of two, public, above any number to come.")
    ] = None,
    epsilon_cap: Annotated[
        float | None, typer.Option("--epsilon-cap", help="What one unit may ever lose, over all runs.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="At most 1/(10 x units-at-most).")] = 1e-5,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="FILE:question=COLUMN,context=COLUMN,answer=COLUMN, or FILE:text=COLUMN."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model to train on, allowed from now on; default: tiny.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest record, for the figures shown.")] = 256,
    max_records_per_unit: Annotated[int, typer.Option("--max-records-per-unit", help="For the figures shown.")] = 4,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Register files, their privacy unit and its budget in the policy, and print the lines for the operator."""
    from foedus_client.datasets.cli import ask_units, shipped_base
    from foedus_client.register import Declaration, register

    place = find_home(home)
    place.membership()
    declared = Declaration(
        files=tuple(files),
        name=name or _ask("name", "What is the data set called?", str),
        purposes=tuple(purpose or [_ask("purpose", "What may it be used for?", str)]),
        namespace=namespace or _ask("namespace", "Whose units are these (e.g. patients-of-a)?", str),
        units=tuple(unit or ask_units(files)),
        columns=tuple(columns or ()),
        units_at_most=units_at_most or _ask("units-at-most", "How many units will there ever be, at most? (2^n)", int),
        epsilon_cap=epsilon_cap or _ask("epsilon-cap", "How much may one unit ever lose, over all runs?", float),
        delta=delta,
        max_tokens=max_tokens,
        max_records_per_unit=max_records_per_unit,
        base=base or shipped_base(),
    )
    found, lines = register(place, declared)
    result = {
        "name": declared.name,
        "namespace": declared.namespace,
        "units_at_most": declared.units_at_most,
        "records": found.report.records,
        "units": found.report.units,
        "heldout_units": len(found.heldout),
        "rejected": len(found.report.rejected),
        "truncated": len(found.report.truncated),
        "participants": lines,
    }
    text = (
        f"{declared.name}: {found.report.units} units, {len(found.heldout)} of them held out, "
        f"{len(found.report.rejected)} rows rejected (these figures stay here)\n\n"
        f"for the operator's charter:\n\n{lines}"
    )
    emit(result, output, lambda console: console.print(text, markup=False, highlight=False))


@base_app.command("add")
def base_add(
    folder: Annotated[Path, typer.Argument(help="Folder of a base model with its manifest.")],
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Allow a base model in the policy."""
    place = find_home(home)
    place.load()
    digest = read_manifest(folder).digest
    policy.add_base(place.policy, policy.BaseEntry(digest=digest, path=str(folder.absolute())))
    text = f"base {digest} in {folder.absolute()} is allowed"
    emit({"digest": digest}, output, lambda console: console.print(text, markup=False, highlight=False))


@app.command()
def peers(
    confirm: Annotated[
        list[str] | None,
        typer.Option("--confirm", help="ORG whose key was compared (asks), or ORG=FINGERPRINT (compares)."),
    ] = None,
    confirm_all: Annotated[
        bool, typer.Option("--confirm-all", help="Confirm every member unseen: only where one person is all of them.")
    ] = False,
    home: HomeOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Show the members' fingerprints, to be compared with them over another channel, and note which are confirmed."""
    from foedus_client.peers import confirm_members, fetch_members

    place = find_home(home)
    members = fetch_members(place)
    wanted = dict(_pinned(text) for text in confirm or [])
    shown = confirm_members(place, members, wanted, everybody=confirm_all, ask=_compare)
    text = "\n".join(f"{one.org:24} {one.state:12} {human_fingerprint(one.fingerprint)}" for one in shown)
    emit(
        {"members": [vars(one) for one in shown]},
        output,
        lambda console: console.print(text, markup=False, highlight=False),
    )


@app.command()
def up(
    log_format: LogFormatOption = LogFormat.text, home: HomeOption = None, output: FormatOption = Format.text
) -> None:
    """Be the organisation's daemon: dial the coordinator, sign by policy, train when asked. Ctrl-C ends it."""
    from foedus_client.daemon import run

    place = find_home(home)
    stop = threading.Event()
    setup(log_format)
    give_memory_back()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    run(place, stop)
    emit({"stopped": True}, output, lambda console: console.print("stopped"))


@app.command()
def status(home: HomeOption = None, output: FormatOption = Format.text) -> None:
    """Show certificate, daemon, budgets, charters and what left lately. Nothing of it is sent."""
    found = status_of(find_home(home))
    emit(found, output, lambda console: status_table(found, console))


for _command in (check, health, pause, resume, leave):
    app.command()(_command)


def _token(file: Path | None, stdin: bool) -> str:
    """The one-time token, never from an argument: arguments are visible to every user of the machine."""
    if file is not None and stdin:
        raise UsageError("expected one of --token-file and --token-stdin, got both")
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UsageError(f"expected a token in {file}, got: {error.strerror}") from error
        except UnicodeDecodeError:
            raise UsageError(f"expected a token in {file}, got bytes that are no text") from None
    elif stdin:
        token = sys.stdin.readline().strip()
    elif sys.stdin.isatty():
        token = typer.prompt("token", hide_input=True, err=True).strip()
    else:
        raise UsageError("expected a token by --token-stdin or --token-file: there is no terminal to ask at")
    if not token:
        raise UsageError("expected a token, got an empty line")
    return token


def _ask(option: str, question: str, kind: type[T]) -> T:
    if not sys.stdin.isatty():
        raise UsageError(f"expected --{option}: there is no terminal to ask at")
    answer: T = typer.prompt(question, type=kind, err=True)
    return answer


def _pinned(text: str) -> tuple[str, str | None]:
    org, separator, fingerprint = text.partition("=")
    return org, parse_fingerprint(fingerprint) if separator else None


def _compare(org: str, fingerprint: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"expected --confirm {org}=FINGERPRINT: there is no terminal to ask at")
    question = f"Does {org} read you this fingerprint?\n  {human_fingerprint(fingerprint)}\n"
    return bool(typer.confirm(question, err=True))
