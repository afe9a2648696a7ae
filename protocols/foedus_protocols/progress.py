"""A bar on standard error for work that is counted in bytes, where somebody looks and it takes long enough to wonder.

Without a terminal (a daemon, a pipe) a long piece of work says its name and size once in the log, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from foedus_protocols.console import progress_console

Advance = Callable[[int], None]
"""Told the number of bytes that were just done."""

SHOWN_FROM = 256 << 20
"""Bytes from which a bar is worth its line: less than about a second of digesting."""

LOGGED_FROM = 8 << 30
"""Bytes from which a log says what is going on."""

_LOG = logging.getLogger(__name__)


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Advance]:
    """Count bytes towards `total`, visibly where it is long and standard error is a terminal."""
    if total < SHOWN_FROM or not progress_console.is_interactive:
        if total >= LOGGED_FROM:
            _LOG.info("%s: %.1f GB", title, total / 1e9)
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=progress_console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
