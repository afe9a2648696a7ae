"""Every parser that reads bytes from outside, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from fuzz import documents, files, ports
from fuzz.watch import Target

KEPT = Path(__file__).parents[1] / "vectors" / "fuzz"
"""Inputs that once did harm, in a folder for each parser."""

Group = Callable[[Path, ExitStack], Iterator[Target]]

GROUPS: dict[tuple[str, ...], Group] = {
    documents.NAMES: documents.targets,
    files.NAMES: files.targets,
    ports.NAMES: ports.targets,
}
"""What makes the parsers of each group, by their names."""

NAMES = tuple(name for names in GROUPS for name in names)


def target(name: str, scratch: Path, stack: ExitStack) -> Target:
    """One parser, ready; `stack` ends what it needed."""
    group = next(make for names, make in GROUPS.items() if name in names)
    return next(made for made in group(scratch, stack) if made.name == name)
