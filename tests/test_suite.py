"""The suite's own rules, on a suite of one file: what may skip, and what is `unit`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LISTED = (HERE / "skips.txt").read_text(encoding="utf-8").splitlines()[0]

SUITE = """
import pytest
def test_passes(request):
    assert request.node.get_closest_marker("unit")
@pytest.mark.e2e
def test_of_another_kind(request):
    assert not request.node.get_closest_marker("unit")
def test_skips():
    pytest.skip({reason!r})
"""


def run_suite(folder: Path, reason: str, *more: str) -> subprocess.CompletedProcess[str]:
    """pytest, in a process of its own, on three tests of which one skips for `reason`."""
    for name in ("conftest.py", "skips.txt"):
        shutil.copy(HERE / name, folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    unit\n    e2e\n", encoding="utf-8")
    (folder / "test_it.py").write_text(SUITE.format(reason=reason), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *more, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        check=False,
    )


def test_a_listed_reason_is_printed_and_passes(tmp_path: Path) -> None:
    done = run_suite(tmp_path, LISTED, "-m", "unit")
    assert done.returncode == 0, done.stdout
    assert f"listed, 1 tests: {LISTED}" in done.stdout
    assert "1 passed, 1 skipped, 1 deselected" in done.stdout


def test_an_unlisted_reason_fails_the_run_also_where_workers_report_it(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "it is Tuesday", "-n", "1")
    assert done.returncode == 1, done.stdout
    assert "NOT LISTED in tests/skips.txt, 1 tests: it is Tuesday" in done.stdout
