"""The log of a long-running command: one event a line on standard error, as text for people or JSON for collectors.

No record, key or token is ever in it. The part of that promise that code can keep is kept here: of an exception only
the class and the places in the code are written, never its own text, since a library's error may quote what it choked
on; and no event can pretend to be two, since line ends and escape sequences of a message are made harmless.

Left out: what gRPC's core writes to file descriptor 2 by itself (handshakes that failed). Let the service manager
collect it.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any

import typer

from foedus_protocols.console import printable


class LogFormat(StrEnum):
    """The shape of a line in the log."""

    text = "text"
    json = "json"


LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="text for people, json for log collectors (one object a line).")
]

_Exception = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


def setup(log_format: LogFormat = LogFormat.text) -> None:
    """Show our own events from INFO and other libraries' from WARNING; called once, by commands that stay.

    Calling it again replaces the format.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine() if log_format is LogFormat.json else _TextLine())
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each.formatter, _TextLine | _JsonLine)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("foedus").setLevel(logging.INFO)
    logging.getLogger("foedus_protocols").setLevel(logging.INFO)


def frames_of(error: BaseException) -> str:
    """The class of an exception and where in the code it came from, innermost last, without its text."""
    places = [f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in traceback.extract_tb(error.__traceback__)]
    return " > ".join([*places[-8:], type(error).__name__])


class _TextLine(logging.Formatter):
    """``2026-01-31 12:00:00,000 INFO message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record)
        line = self.formatMessage(record)
        return f"{line} [{_frames(record.exc_info)}]" if record.exc_info else line


class _JsonLine(logging.Formatter):
    """One JSON object: time in UTC, level, logger, message, and the exception's class and frames where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = _frames(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _frames(info: _Exception | tuple[Any, Any, Any]) -> str:
    return "" if info[1] is None else frames_of(info[1])
