"""Every command of the root command, and what all of them share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import click
import pytest
from foedus_protocols.cli import SUMMARIES, main, root
from foedus_protocols.files import DiskTrouble


def commands(group: click.Command, path: tuple[str, ...] = ("foedus",)) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by the words that call it."""
    if not isinstance(group, click.Group):
        yield " ".join(path), group
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(root))

PROMISED = """
    foedus demo
    foedus data check
    foedus model pretrain
    foedus model inspect
    foedus model generate
    foedus coordinator init
    foedus coordinator up
    foedus coordinator invite
    foedus coordinator approve
    foedus coordinator run start
    foedus coordinator run list
    foedus coordinator run show
    foedus coordinator status
    foedus client join
    foedus client data add
    foedus client peers
    foedus client charter list
    foedus client charter show
    foedus client charter approve
    foedus client charter refuse
    foedus client up
    foedus client status
"""


def test_the_promised_commands_are_there() -> None:
    assert {line.strip() for line in PROMISED.strip().splitlines()} <= COMMANDS.keys()
    assert {path.split()[1] for path in COMMANDS} == SUMMARIES.keys()


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(path: str) -> None:
    command = COMMANDS[path]
    assert command.help, path
    options = {option: one for one in command.params for option in one.opts}
    assert isinstance(options["--format"].type, click.Choice)
    assert [str(getattr(choice, "value", choice)) for choice in options["--format"].type.choices] == ["text", "json"]
    assert not [one.name for one in command.params if isinstance(one, click.Option) and not one.help]


@pytest.mark.parametrize("path", COMMANDS)
def test_no_command_takes_a_secret_as_an_argument(path: str) -> None:
    """Arguments are visible to every user of a machine: tokens come from a file, standard input or the prompt."""
    taken = {option for one in COMMANDS[path].params for option in one.opts}
    assert not taken & {"--token", "--key", "--password", "--secret", "token"}


def test_the_demos_defaults_are_the_documented_ones() -> None:
    defaults = {one.name: one.default for one in COMMANDS["foedus demo"].params}
    expected = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "rounds": 10,
        "max_tokens": 256,
        "max_records_per_unit": 4,
        "expected_units": 64,
        "max_heldout_records": 100,
    }
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(13, "Permission denied", "/srv/foedus"), 12, "/srv/foedus, got: Permission denied"),
        (OSError(28, "No space left on device", "/srv/foedus"), 12, "free some space"),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "Connection reset by peer"),
        (sqlite3.OperationalError("database is locked"), 12, "database is locked"),
        (DiskTrouble("expected room, got none"), 12, "expected room, got none"),
    ],
)
def test_trouble_of_the_operating_system_is_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, says: str
) -> None:
    def refused(**_: object) -> None:
        raise error

    monkeypatch.setattr(root, "main", refused)
    with pytest.raises(SystemExit) as left:
        main(["coordinator", "status"])
    assert left.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected")
    assert says in line
