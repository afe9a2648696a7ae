"""The log: a line an event, in either shape, and never an exception's own text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from foedus_protocols.logs import LogFormat, frames_of, setup

pytestmark = pytest.mark.unit

LOG = logging.getLogger("foedus.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _trouble() -> ValueError:
    try:
        raise ValueError("patient Nightingale has a cough")
    except ValueError as error:
        return error


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_an_exception_is_a_class_and_places_and_never_its_text(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    setup(log_format)
    LOG.error("a message could not be read", exc_info=_trouble())
    (line,) = capsys.readouterr().err.splitlines()
    assert "Nightingale" not in line
    assert "ValueError" in line
    assert "_trouble" in line


def test_a_json_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    setup(LogFormat.json)
    LOG.info("round %d: sent", 3)
    logging.getLogger("foedus_other").info("not ours, and not shown")
    found = json.loads(capsys.readouterr().err)
    assert {name: found[name] for name in ("level", "logger", "message")} == {
        "level": "info",
        "logger": "foedus.test",
        "message": "round 3: sent",
    }
    assert found["time"].endswith("+00:00")


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_a_message_cannot_pretend_to_be_two_lines(capsys: pytest.CaptureFixture[str], log_format: LogFormat) -> None:
    setup(log_format)
    LOG.warning("run %s", "north\n2026-01-01 INFO everything is fine\x1b[2J")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_setting_it_up_twice_says_things_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup()
    setup()
    LOG.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_frames_name_the_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert frames_of(_trouble()).endswith("ValueError")
    assert "_trouble (" in frames_of(_trouble())
