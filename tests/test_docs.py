"""The documents name what exists: files, commands with their options, make targets, a charter that can be drafted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from foedus_protocols.charter_draft import read_draft
from foedus_protocols.cli import root

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def code(page: Path) -> Iterator[str]:
    """Inline code, and the lines of fenced blocks with continuations joined."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in fence.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fence.sub("", text)))


def foedus_lines(page: Path) -> Iterator[list[str]]:
    """The words of each line of code that begins with ``foedus``, without comments and what the shell takes."""
    for line in code(page):
        words = shlex.split(line, comments=True) if line.startswith("foedus ") else []
        if len(words) > 1 and "|" not in line and "..." not in words:
            yield [word for word in words if word != "&"]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words call, and the words that remain."""
    command: click.Command = root
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"no such command: {' '.join(words)}"
        command, rest = found, rest[1:]
    return command, rest


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+://", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages
def test_commands_and_options_exist(page: Path) -> None:
    for words in foedus_lines(page):
        command, rest = resolve(words)
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= known, f"{' '.join(words)}: no option {', '.join(sorted(used - known))}"


@pages
def test_make_targets_exist(page: Path) -> None:
    for line in code(page):
        if line.startswith("make "):
            assert line.split()[1] in TARGETS, f"{page.name}: {line}"


def test_the_readme_and_the_walkthrough_use_many_commands() -> None:
    """The checks above see something: a change of the pages' form would otherwise pass in silence."""
    assert len(list(foedus_lines(REPOSITORY / "README.md"))) >= 5
    assert len(list(foedus_lines(REPOSITORY / "docs" / "walkthrough.md"))) >= 15


def test_the_walkthroughs_charter_is_a_draft(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    (charter,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "charter.toml"
    path.write_text(charter, encoding="utf-8")
    terms = read_draft(path)
    assert [one["id"] for one in terms["participants"]] == ["hospital-a", "hospital-b"]


def test_the_readmes_tree_is_the_repositorys() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## The tree\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^([a-z_/]+)/ ", tree, re.MULTILINE)
    assert not [folder for folder in named if not (REPOSITORY / folder).is_dir()]
    packages = {str(path.parent.relative_to(REPOSITORY)) for path in REPOSITORY.glob("*/foedus_*/__init__.py")}
    assert packages <= set(named)


def test_every_decision_has_a_number_and_a_status() -> None:
    found = sorted((REPOSITORY / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in found] == list(range(1, len(found) + 1))
    assert all(re.search(r"^Date: .*Status: ", path.read_text(encoding="utf-8"), re.MULTILINE) for path in found)
