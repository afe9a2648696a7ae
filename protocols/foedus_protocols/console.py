"""How every command speaks: results on standard output, progress and logs on standard error.

With ``--format json`` a command prints one object as the last line of standard output, and nothing else there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console


class Format(StrEnum):
    """The shape of a command's result."""

    text = "text"
    json = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people, json for programs (one object, last line).")
]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # All but tab and newline.

progress_console = Console(stderr=True)
"""Progress, questions and logs."""


def printable(text: str) -> str:
    """Somebody else's free text for a terminal or a log: no line ends, no escape sequences that hide or fake words."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def without_controls(text: str) -> str:
    """A model's text for a terminal: its lines and tabs stay, no character of it moves the cursor or sets a title."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def emit(result: Mapping[str, Any], output: Format, render: Callable[[Console], None]) -> None:
    """Print a result: as JSON, or with `render` for people."""
    if output is Format.json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False, sort_keys=False) + "\n")
        sys.stdout.flush()
        return
    render(Console())
