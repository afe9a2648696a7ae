"""Folders of dry steps: gone at the end, and what a killed process left is gone at the next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from foedus_client.scratch import scratch, sweep

LEAVE = """
import os, sys
from pathlib import Path
from foedus_client.scratch import scratch
with scratch(Path(sys.argv[1])) as place:
    (place / "vector.f32").write_bytes(b"x")
    os._exit(9)
"""


def test_a_folder_is_gone_with_its_block_and_stays_while_its_process_lives(tmp_path: Path) -> None:
    with scratch(tmp_path) as place:
        (place / "vector.f32").write_bytes(b"x")
        sweep(tmp_path)
        assert (place / "vector.f32").exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), scratch(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", LEAVE, str(tmp_path)], check=False).returncode == 9
    assert len(list(tmp_path.rglob("vector.f32"))) == 1
    (tmp_path / "check-list.txt").write_text("somebody else's")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["check-list.txt"]
