"""Commands from the root on as a person types them: what they say and leave with, and what they leave on the disk."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from foedus_protocols.cli import main


def run(*arguments: str | Path) -> None:
    """A command that works."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 0, arguments


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """A command that is refused: its exit code, and the one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.rstrip().endswith(line)  # Nothing follows it: no traceback.
    assert isinstance(left.value.code, int)
    return left.value.code, line


def state(*folders: Path) -> dict[str, Any]:
    """Everything that is kept under some folders: databases by their rows, other files by their bytes."""
    kept: dict[str, Any] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        if path.suffix == ".db":
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                kept[str(path)] = list(database.iterdump())
        elif not path.name.endswith((".lock", "-wal", "-shm")):
            kept[str(path)] = path.read_bytes()
    return kept
