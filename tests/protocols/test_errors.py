"""Every exit code is documented, and every documented code exists."""

from __future__ import annotations

import re
from pathlib import Path

from foedus_protocols import errors

_PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"
_SHELL_CODES = {0, 130, 141}


def _tree(root: type[errors.FoedusError]) -> set[type[errors.FoedusError]]:
    return {root}.union(*(_tree(child) for child in root.__subclasses__()))


def test_every_exit_code_has_a_section_and_no_section_is_left_over() -> None:
    documented = {int(code) for code in re.findall(r"^## (\d+)$", _PAGE.read_text(), flags=re.MULTILINE)}
    raised = {error.exit_code for error in _tree(errors.FoedusError) if error.__module__ == errors.__name__}
    assert documented == raised | _SHELL_CODES


def test_no_two_branches_share_a_code() -> None:
    codes = [error.exit_code for error in _tree(errors.FoedusError) if error.__module__ == errors.__name__]
    assert len(codes) == len(set(codes))


def test_the_tree_is_drawn_in_the_docstring() -> None:
    for error in _tree(errors.FoedusError):
        if error.__module__ == errors.__name__:
            assert re.search(rf"\b{error.__name__}\s+{error.exit_code}\b", errors.__doc__ or ""), error.__name__
