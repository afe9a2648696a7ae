"""The bar where somebody looks at a long piece of work; one line in the log elsewhere."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from foedus_protocols import progress
from foedus_protocols.manifest import verify_manifest, write_manifest
from rich.console import Console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 100 columns, and what it was sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "progress_console", console)
    return sent


def test_long_work_shows_a_bar_with_its_bytes(terminal: io.StringIO) -> None:
    with progress.byte_progress("verifying model", progress.SHOWN_FROM) as advance:
        for _ in range(4):
            advance(progress.SHOWN_FROM // 4)
    assert "verifying model" in terminal.getvalue()
    assert "268.4/268.4 MB" in terminal.getvalue()


def test_short_work_shows_nothing(terminal: io.StringIO) -> None:
    with progress.byte_progress("verifying model", progress.SHOWN_FROM - 1) as advance:
        advance(progress.SHOWN_FROM - 1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("kind", [None, "dumb"])
def test_without_a_terminal_that_draws_long_work_says_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str | None
) -> None:
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=kind is not None, _environ={} if kind is None else {"TERM": kind})
    monkeypatch.setattr(progress, "progress_console", console)
    with caplog.at_level(logging.INFO):
        for total in (progress.LOGGED_FROM - 1, progress.LOGGED_FROM):
            with progress.byte_progress("verifying model", total) as advance:
                advance(total)
    assert [record.getMessage() for record in caplog.records] == ["verifying model: 8.6 GB"]
    assert sent.getvalue() == ""


def test_digesting_and_verifying_advance_by_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's total is what was read: the sizes of all files."""
    told: list[tuple[str, int, int]] = []

    class Bar:
        def __init__(self, title: str, total: int) -> None:
            self.title, self.total, self.done = title, total, 0

        def __enter__(self) -> progress.Advance:
            return self.advance

        def __exit__(self, *_: object) -> None:
            told.append((self.title, self.total, self.done))

        def advance(self, count: int) -> None:
            self.done += count

    monkeypatch.setattr("foedus_protocols.manifest.byte_progress", Bar)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_001))
    write_manifest(tmp_path, provenance={})
    verify_manifest(tmp_path)
    folder, size = tmp_path.name, 3_000_003
    assert told == [(f"digesting {folder}", size, size), (f"verifying {folder}", size, size)]
