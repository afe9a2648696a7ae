"""`foedus coordinator`: make a coordinator, let organisations in, start runs, look at them.

Every command works on a home folder (``--home``, or FOEDUS_COORDINATOR_HOME). Results go to standard output, progress
and logs to standard error.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import Annotated

import typer
from foedus_protocols.backoff import start_when_there_is_space
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.identity import human_fingerprint, public_hex
from foedus_protocols.logs import LogFormat, LogFormatOption, setup
from foedus_protocols.memory import give_memory_back
from rich.console import Console

from foedus_coordinator import (
    cli_extend,  # noqa: F401  registers `run extend`
    cli_health,
    cli_members,
)
from foedus_coordinator.cli_authority import authority_app
from foedus_coordinator.cli_common import HomeOption, open_home, table, when
from foedus_coordinator.cli_run import run_app, run_table
from foedus_coordinator.config import DEFAULT_HOME, Config, Home, at, default_listen

# What reads charters brings the accountant along, a second of imports that `init`, `invite` and `approve` do without.
# So the other commands import it themselves.

app = typer.Typer(no_args_is_help=True, help="Plan rounds, sum what organisations send, publish variants.")
app.add_typer(run_app, name="run")
app.command()(cli_health.health)
app.add_typer(authority_app, name="authority")


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
def up(
    home: HomeOption = DEFAULT_HOME,
    log_format: LogFormatOption = LogFormat.text,
    output: FormatOption = Format.text,
) -> None:
    """Serve until interrupted (SIGTERM or SIGINT); runs that were cut off go on where they were."""
    from foedus_coordinator.executor import serve  # Imports Flower and gRPC, which the other commands do without.

    setup(log_format)
    stop = threading.Event()
    give_memory_back()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log, place = logging.getLogger("foedus.coordinator"), open_home(home)
    start_when_there_is_space(lambda: serve(place, stop=stop, say=log.info), stop=stop, say=log.error)
    emit({"stopped": True}, output, lambda console: console.print("stopped"))


app.command()(cli_members.invite)
app.command()(cli_members.approve)
app.command()(cli_members.revoke)


@app.command()
def status(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """Members, requests and runs."""
    from foedus_coordinator import views

    result = views.status(open_home(home))

    def show(console: Console) -> None:
        state = "running" if result["running"] else "not running"
        console.print(f"Federation [bold]{result['federation']}[/bold], {state}; link {result['link']}")
        console.print(
            "Secure aggregation: none in this version. The coordinator sees each organisation's noised vector.",
            soft_wrap=True,
        )
        rows = ([one["org"], one["fingerprint"][:16], when(one["last_seen"])] for one in result["members"])
        console.print(table(("member", "fingerprint", "last heard of"), rows))
        for one in result["requests"]:
            console.print(f"{one['org']} asks to join: foedus coordinator approve {one['org']}")
        console.print(run_table(result["runs"]))

    emit(result, output, show)
