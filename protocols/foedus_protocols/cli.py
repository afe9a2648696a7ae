"""The root command `foedus`.

Sub-commands arrive by entry point (group ``foedus.commands``) and are imported only when they are named, so that
``foedus coordinator`` never loads torch, and a base install without extras still explains itself.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from importlib.metadata import EntryPoint, entry_points, version

import click
import typer

from foedus_protocols.errors import FoedusError, MissingExtra
from foedus_protocols.files import disk_trouble

GROUP = "foedus.commands"

SUMMARIES = {
    "demo": "A whole federation on this machine: a coordinator, organisations, real TLS, one command.",
    "simulate": "Many virtual organisations in one process, for studies; Flower's engine runs them.",
    "coordinator": "Plan rounds, sum what organisations send, publish variants.",
    "client": "An organisation's side: keys, policy, budget, and the daemon that trains.",
    "data": "Look at data files before anything is trained.",
    "model": "Base models and variants: pretrain, inspect, generate, evaluate.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the installed commands, in the order of the summaries."""
        return [name for name in SUMMARIES if name in _installed()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command.

        Raises:
            MissingExtra: Its package's dependencies are not installed.
        """
        entry = _installed().get(cmd_name)
        if entry is None:
            return None
        try:
            app = entry.load()
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"`foedus {cmd_name}` needs the Python package {error.name}, which is not installed; "
                f"install it with: pip install 'foedus[client,coordinator]'"
            ) from error
        return typer.main.get_command(app)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in self.list_commands(ctx)])


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("foedus"), prog_name="foedus")
def root() -> None:
    """Federated, privacy-preserving fine-tuning of open mixture-of-experts language models."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with its documented exit code (``docs/exit-codes.md``)."""
    # Nothing leaves this machine at run time but what the link sends: no telemetry, no update check, no model hub.
    for name, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("TRANSFORMERS_OFFLINE", "1"),
    ):
        os.environ[name] = value
    try:
        code = root.main(args=arguments, standalone_mode=False)
    except FoedusError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our standard output went away (`foedus ... | head`): no traceback for that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, sqlite3.Error) as error:
        # The last net: what belongs to a command has been caught below with a better place and text.
        place = getattr(error, "filename", None) or "a file or connection"
        known = disk_trouble(error, place)
        text = f"expected to be able to use {place}, got: {getattr(error, 'strerror', None) or error}"
        sys.stderr.write(f"error: {known or text}\n")
        sys.exit(FoedusError.exit_code if known is None else known.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
