"""systemd units and the compose file run commands that exist, with options that exist, and hand no secret over."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml
from foedus_protocols.cli import root

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that some words name, and what is left of them."""
    command: click.Command = root
    context = click.Context(command)
    while words and isinstance(command, click.Group) and (found := command.get_command(context, words[0])):
        command, words = found, words[1:]
    return command, words


def check(words: list[str]) -> None:
    command, rest = find(words)
    assert not isinstance(command, click.Group), f"{' '.join(words)} names no command"
    # `make_context` parses, and calls nothing.
    command.make_context("foedus", list(rest))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_exists(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(path, encoding="utf-8")
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program == "/opt/foedus/bin/foedus"
    check(words)
    assert unit["Service"]["User"] == "foedus"


def test_compose_starts_and_checks_with_commands_that_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert compose["services"].keys() == {"coordinator", "client"}
    for service in compose["services"].values():
        check(service["command"])
        kind, program, *words = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "foedus")
        check(words)
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_the_image_copies_what_the_wheel_needs() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = {line.split()[1] for line in text.splitlines() if line.startswith("COPY ") and len(line.split()) == 3}
    assert copied == {"protocols", "kernels", "model", "client", "coordinator", "deploy/foedus_local"}


def test_a_command_that_does_not_exist_is_found_out() -> None:
    with pytest.raises((AssertionError, click.ClickException, typer.Exit)):
        check(["client", "up", "--no-such-option"])
    with pytest.raises(AssertionError, match="names no command"):
        check(["client", "privacy"])
