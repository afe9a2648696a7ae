"""systemd units and the compose file run commands that exist, with options that exist, and hand no secret over."""

from __future__ import annotations

import configparser
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml
from foedus_client import worker_process
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


def instructions() -> list[str]:
    """The Containerfile's instructions, a continued one in one line, without comments."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return " ".join(lines).replace("\\ ", "").replace(" RUN ", "\nRUN ").splitlines()


def variant_of_gpu() -> str:
    """The shell words of the instruction that the build argument GPU decides."""
    (found,) = [line for line in instructions() if line.startswith("RUN case")]
    return found.removeprefix("RUN ").partition(" esac")[0] + " esac"


@pytest.mark.parametrize(("gpu", "code", "asked"), [("no", 0, False), ("yes", 0, True), ("maybe", 1, False)])
def test_the_image_has_a_compiler_where_it_is_built_for_a_gpu_and_only_there(
    gpu: str, code: int, asked: bool, tmp_path: Path
) -> None:
    """The instruction's own shell words, with commands that only write down what they are asked."""
    assert any("ARG GPU=no" in line for line in instructions()), "lean unless it is asked for"
    for name in ("apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n')
        (tmp_path / name).chmod(0o755)
    words = ["/bin/sh", "-c", variant_of_gpu()]
    done = subprocess.run(words, env={"PATH": str(tmp_path), "GPU": gpu}, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    said = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("install -y --no-install-recommends gcc libc6-dev" in said) is asked
    assert ("rm -rf /var/lib/apt/lists" in said) is asked
    assert ("got GPU=maybe" in done.stderr) is (code == 1)


def test_compiled_kernels_lie_in_a_private_folder_that_the_service_may_write() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    (place,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("ENV TRITON_CACHE_DIR=")]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    (volume,) = [one for one in compose["services"]["client"]["volumes"] if one.startswith("client:")]
    assert place.startswith(volume.partition(":")[2] + "/")
    assert f"-m 0700 {volume.partition(':')[2]}" in text
    unit = (DEPLOY / "systemd" / "foedus-client.service").read_text(encoding="utf-8").splitlines()
    for line in ("CacheDirectory=foedus-client", "CacheDirectoryMode=0700", "ProtectSystem=strict", "UMask=0077"):
        assert line in unit
    assert "Environment=TRITON_CACHE_DIR=/var/cache/foedus-client/triton" in unit
    assert {"CC", "TRITON_CACHE_DIR"} <= set(worker_process._ENVIRONMENT), "the worker is told"


def test_the_gpu_variant_changes_nothing_but_image_and_card() -> None:
    client = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text(encoding="utf-8"))["services"]["client"]
    assert client.keys() == {"image", "build", "deploy"}
    assert client["build"] == {"args": {"GPU": "yes"}}
    assert client["image"] != "foedus", "the lean image keeps its name"


def test_a_command_that_does_not_exist_is_found_out() -> None:
    with pytest.raises((AssertionError, click.ClickException, typer.Exit)):
        check(["client", "up", "--no-such-option"])
    with pytest.raises(AssertionError, match="names no command"):
        check(["client", "privacy"])
