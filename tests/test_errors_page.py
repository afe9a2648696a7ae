"""`docs/errors.md` says what the program says: each row is in the source, has a documented exit code and a test.

A row's text is what stands in the source, with ``...`` where the program puts a name, a number or a path. Whether the
named test really meets the text is for that test to say; here it has to exist.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import foedus_protocols.channel
import foedus_protocols.files
from foedus_protocols import errors

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "errors.md"
CODES = REPOSITORY / "docs" / "exit-codes.md"
MODULES = (errors, foedus_protocols.channel, foedus_protocols.files)

REFUSED_CHECK = errors.PolicyRefused.exit_code
_GAP = "\0"  # Stands in a template where the program fills something in.
_SHORTEST_TEXT = 12


def classes() -> dict[str, type[errors.FoedusError]]:
    """The error classes of the tree, by name."""
    found = {name: one for module in MODULES for name, one in vars(module).items() if isinstance(one, type)}
    return {name: one for name, one in found.items() if issubclass(one, errors.FoedusError)}


@dataclass(frozen=True)
class Row:
    """One refusal: its text, what to do, the exit code, and the test."""

    text: str
    advice: str
    code: int
    test: str

    @property
    def fragments(self) -> list[str]:
        return [part for part in re.split(r"\s*\.\.\.\s*", self.text) if part]


def rows() -> list[Row]:
    """The rows of all tables; a line that is neither heading nor row of one has the wrong shape and fails here."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|") or line.startswith(("| What you see |", "|---")):
            continue
        matched = re.fullmatch(r"\| `([^`]+)` \| (.+) \| (\d+) \| `([^`]+)` \|", line)
        assert matched, f"not a row of four cells: {line}"
        found.append(Row(matched[1], matched[2], int(matched[3]), matched[4]))
    return found


ROWS = rows()


@dataclass(frozen=True)
class Said:
    """A text in the source, and the exit codes of the errors that are raised with it (none: it is not an error's)."""

    template: str
    code: int | None

    def has(self, row: Row) -> bool:
        at = 0
        for fragment in row.fragments:
            at = self.template.find(fragment, at) + len(fragment)
            if at < len(fragment):  # Not found.
                return False
        return True


def templates(node: ast.AST) -> Iterator[str]:
    """The literal texts inside an expression, with a gap for each value."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else _GAP for part in node.values)
        yield "".join(str(part) for part in parts)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
        return
    for child in ast.iter_child_nodes(node):
        yield from templates(child)


@cache
def source() -> frozenset[Said]:
    """What the packages say."""
    known, found = classes(), set()
    for path in sorted(REPOSITORY.glob("*/foedus_*/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                code = known[name].exit_code if name in known else None
                found |= {Said(text, code) for argument in node.args for text in templates(argument)}
            elif isinstance(node, ast.Assign | ast.Dict | ast.Return | ast.Yield):
                found |= {Said(text, None) for text in templates(node)}
    return frozenset(found)


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_text_is_what_the_source_says() -> None:
    assert not [row.text for row in ROWS if max(map(len, row.fragments)) < _SHORTEST_TEXT], "may be anything's text"
    found = {row: {said.code for said in source() if said.has(row)} for row in ROWS}
    assert not [row.text for row, codes in found.items() if not codes], "no package says this"
    # What is no error's own text (a reason, a line of `health`) gets its code elsewhere; a failed check of a charter
    # is raised as another error and leaves as a refusal.
    wrong = {row: codes for row, codes in found.items() if not codes & {row.code, None} and row.code != REFUSED_CHECK}
    assert not {row.text: codes for row, codes in wrong.items()}, "raised with another exit code"


def test_every_exit_code_is_an_errors_and_documented() -> None:
    told = {row.code for row in ROWS}
    assert told <= {one.exit_code for one in classes().values()}
    assert told <= {int(code) for code in re.findall(r"^## (\d+)$", CODES.read_text(encoding="utf-8"), re.MULTILINE)}


def test_every_named_test_exists() -> None:
    for row in ROWS:
        path, _, name = row.test.partition("::")
        assert path.startswith("tests/"), row
        assert name.startswith("test_"), row
        assert (REPOSITORY / path).is_file(), row
        assert name in functions_of(REPOSITORY / path), row


def test_every_advice_is_a_sentence() -> None:
    assert not [row.advice for row in ROWS if not re.fullmatch(r"[A-Z`].*\.", row.advice)]


def test_no_text_stands_twice() -> None:
    assert not [text for text, times in Counter(row.text for row in ROWS).items() if times > 1]


def test_every_error_of_the_tree_is_on_the_page() -> None:
    """Codes are one to one with the classes of ``errors.py`` (``tests/protocols/test_errors.py``)."""
    told = {row.code for row in ROWS}
    assert {one.exit_code for one in classes().values()} <= told


def test_the_page_is_read_at_all() -> None:
    """A change of the page's form would otherwise pass in silence."""
    assert len(ROWS) >= 150
