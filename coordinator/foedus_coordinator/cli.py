"""`foedus coordinator`: make a coordinator, let organisations in, start runs, look at them.

Every command works on a home folder (``--home``, or FOEDUS_COORDINATOR_HOME). Results go to standard output, progress
and logs to standard error.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import StateError, UsageError, VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import human_fingerprint, parse_fingerprint, public_hex
from foedus_protocols.manifest import read_config, verify_manifest
from rich.console import Console
from rich.table import Table

from foedus_coordinator.config import DEFAULT_HOME, HOME_VARIABLE, Config, Home, at, default_listen

if TYPE_CHECKING:
    from foedus_protocols.charter import Charter

# What reads charters brings the accountant along, a second of imports that `init`, `invite` and `approve` do without.
# So the other commands import it themselves.

app = typer.Typer(no_args_is_help=True, help="Plan rounds, sum what organisations send, publish variants.")
run_app = typer.Typer(no_args_is_help=True, help="Start runs and look at them.")
app.add_typer(run_app, name="run")

HomeOption = Annotated[Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's folder.")]
_NAME_CHARACTERS = 55  # An envelope's run id has 64 characters at most: name, dash, eight of the charter's digest.
_SHORT = 8


@app.command()
def init(
    federation: Annotated[str, typer.Option(help="The federation's name: small letters, digits, dots, dashes.")],
    address: Annotated[str, typer.Option(help="The DNS name or IP address that organisations dial.")],
    link_port: Annotated[int, typer.Option(help="Port of the link (mutual TLS).")] = 7443,
    enrolment_port: Annotated[int, typer.Option(help="Port of the enrolment.")] = 7444,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Make a coordinator: its keys, its private CA, its settings."""
    config = Config(
        federation=federation,
        address=address,
        link_port=link_port,
        enrolment_port=enrolment_port,
        listen=default_listen(address),
    )
    made = Home.create(home, config)
    result = {
        "home": str(home),
        "federation": federation,
        "ca_fingerprint": made.authority.fingerprint,
        "operator_key": public_hex(made.operator_key),
        "link": at(address, link_port),
        "enrolment": at(address, enrolment_port),
    }

    def show(console: Console) -> None:
        console.print(f"Coordinator of [bold]{federation}[/bold] in {home}.")
        console.print(f"CA fingerprint, for organisations to compare:\n  {human_fingerprint(result['ca_fingerprint'])}")
        console.print("Next: `foedus coordinator up`, and `foedus coordinator invite ORG` for each organisation.")

    emit(result, output, show)


@app.command()
def up(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """Serve until interrupted (SIGTERM or SIGINT); runs that were cut off go on where they were."""
    from foedus_coordinator.executor import serve  # Imports Flower and gRPC, which the other commands do without.

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve(_open(home), stop=stop, say=_say)
    emit({"stopped": True}, output, lambda console: console.print("stopped"))


@app.command()
def invite(
    org: Annotated[str, typer.Argument(help="The organisation's id; the token is good for this name only.")],
    token_file: Annotated[Path | None, typer.Option(help="Write the token here (0600) instead of showing it.")] = None,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Make a one-time token, good for a day, with the fingerprint that the organisation must check."""
    opened = _open(home)
    token = opened.members.invite(org)
    address = at(opened.config.address, opened.config.enrolment_port)
    result: dict[str, Any] = {"org": org, "coordinator": address, "ca_fingerprint": opened.authority.fingerprint}
    if token_file is None:
        result["token"] = token
    else:
        write_durably(token_file, f"{token}\n".encode(), mode=0o600, overwrite=False)
        result["token_file"] = str(token_file)

    def show(console: Console) -> None:
        where = f"in {token_file}" if token_file else f"(shown once)\n  {token}"
        console.print(f"Token for {org} {where}", soft_wrap=True)
        console.print(f"CA fingerprint\n  {human_fingerprint(opened.authority.fingerprint)}", soft_wrap=True)
        console.print(
            f"Hand both over by different channels. There: foedus client join --coordinator {address} --org {org} "
            f"--ca-fingerprint {opened.authority.fingerprint}",
            soft_wrap=True,
        )

    emit(result, output, show)


@app.command()
def approve(
    org: Annotated[str, typer.Argument(help="The organisation that has asked.")],
    fingerprint: Annotated[str | None, typer.Option(help="Approve only a request with this fingerprint.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Let an organisation in, after a look at the fingerprint of its signing key."""
    opened = _open(home)
    pending = [request for request in opened.members.requests(org) if request.state == "pending"]
    if not pending:
        raise StateError(f"expected a pending request of {org}, there is none; see `foedus coordinator status`")
    request = pending[0]
    if fingerprint is not None and parse_fingerprint(fingerprint) != request.fingerprint:
        raise VerificationError(
            f"expected a request with fingerprint {fingerprint}, {org} asks with {request.fingerprint}; "
            "somebody else may have used the token: invite again"
        )
    progress_console.print(
        f"{org} asks to join. Its signing key's fingerprint:\n  {human_fingerprint(request.fingerprint)}"
    )
    if not yes:
        if not progress_console.is_terminal:
            raise UsageError("expected --yes, or a terminal to ask on: compare the fingerprint first")
        typer.confirm("Does the organisation read the same?", abort=True, err=True)
    certificate = opened.authority.issue_certificate(request.csr_pem, org=org, federation=opened.config.federation)
    roster = opened.members.approve(request, certificate_pem=certificate, key=opened.operator_key)
    result = {"org": org, "fingerprint": request.fingerprint, "roster_version": roster.version}
    emit(result, output, lambda console: console.print(f"{org} is a member (roster version {roster.version})"))


@app.command()
def status(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """Members, requests and runs."""
    from foedus_coordinator import views

    result = views.status(_open(home))

    def show(console: Console) -> None:
        state = "running" if result["running"] else "not running"
        console.print(f"Federation [bold]{result['federation']}[/bold], {state}; link {result['link']}")
        console.print(
            "Secure aggregation: none in this version. The coordinator sees each organisation's noised vector.",
            soft_wrap=True,
        )
        rows = ([one["org"], one["fingerprint"][:16], _when(one["last_seen"])] for one in result["members"])
        console.print(_table(("member", "fingerprint", "last heard of"), rows))
        for one in result["requests"]:
            console.print(f"{one['org']} asks to join: foedus coordinator approve {one['org']}")
        console.print(_run_table(result["runs"]))

    emit(result, output, show)


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

    opened = _open(home)
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
    run = f"{drawn.name[:_NAME_CHARACTERS]}-{drawn.digest[:_SHORT]}"
    opened.files.put_bytes(drawn.canonical())
    opened.storage.add_run(
        run,
        charter_digest=drawn.digest,
        operator_signature=sign_charter(opened.operator_key, drawn.digest),
        base_config=(base / "config.json").read_bytes(),
        orgs=[participant.id for participant in drawn.participants],
        files=[drawn.digest],
    )
    result = {"run": run, "charter": drawn.digest, **_terms(drawn)}

    def show(console: Console) -> None:
        console.print(f"Run [bold]{run}[/bold] is offered; charter {drawn.digest}", soft_wrap=True)
        columns = ("id", "unit", "units_at_most", "sampling_prob", "expected_units", "noise_multiplier", "weight")
        rows = ([str(one[name]) for name in columns] for one in result["participants"])
        console.print(_table(columns, rows))
        if not drawn.private:
            console.print("[bold red]NOT PRIVATE[/bold red]: mode none adds no noise and promises nothing.")

    emit(result, output, show)


@run_app.command("list")
def list_runs(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """All runs."""
    from foedus_coordinator import views

    opened = _open(home)
    result = {"runs": [views.run_line(opened, row) for row in opened.storage.runs()]}
    emit(result, output, lambda console: console.print(_run_table(result["runs"])))


@run_app.command()
def show(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """One run: who signed, its rounds, what was spent and measured."""
    from foedus_coordinator import views

    opened = _open(home)
    result = views.run_detail(opened, opened.storage.run(run))

    def render(console: Console) -> None:
        ending = f": {result['outcome']} ({result['reason']})" if result["outcome"] else ""
        console.print(f"Run [bold]{run}[/bold] {result['state']}{ending}", soft_wrap=True)
        for org, answer in result["answers"].items():
            console.print(f"  {org}: {answer}")
        rows = (
            [str(one["round"]), one["state"], ", ".join(one["missing"]) or "-", f"{sum(one['seconds'].values()):.1f}"]
            for one in result["round_list"]
        )
        console.print(_table(("round", "state", "missing", "seconds"), rows))
        if result["private"]:
            spent = "" if result["epsilon"] is None else f"{result['epsilon']:.3f} spent of "
            console.print(f"epsilon {spent}{result['epsilon_agreed']:g}, delta {result['delta']:g}")
        else:
            console.print("[bold red]NOT PRIVATE[/bold red]")
        if result["loss_before"] is not None:
            console.print(f"held-out loss {result['loss_before']:.4f} before, {result['loss_after']:.4f} after")
        console.print(f"{result['bytes_up']:,} bytes up, {result['bytes_down']:,} down")
        if result["variant"]:
            console.print(f"variant: {result['variant']}", soft_wrap=True)

    emit(result, output, render)


def _open(home: Path) -> Home:
    opened = Home(home)
    _ = opened.config  # Says at once, and with what to do, where there is no coordinator.
    return opened


def _say(line: str) -> None:
    progress_console.print(f"{datetime.now(UTC):%H:%M:%S} {line}", markup=False, highlight=False, soft_wrap=True)


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


def _run_table(runs: list[dict[str, Any]]) -> Table:
    rows = ([one["run"], one["outcome"] or one["state"], f"{one['rounds_closed']}/{one['rounds']}"] for one in runs)
    return _table(("run", "state", "rounds"), rows)


def _table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> Table:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def _when(moment: float | None) -> str:
    return "never" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"
