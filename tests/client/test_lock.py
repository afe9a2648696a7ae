"""One daemon a home, also across processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from foedus_client.lock import HomeLock

pytestmark = pytest.mark.unit


def test_only_one_process_holds_a_home(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    code = (
        "import sys; from pathlib import Path; from foedus_client.lock import HomeLock\n"
        "from foedus_protocols.errors import StateError\n"
        "try:\n  HomeLock(Path(sys.argv[1])).__enter__()\nexcept StateError: sys.exit(12)"
    )
    with HomeLock(path):
        assert HomeLock.held(path)
        assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 12
    assert not HomeLock.held(path)
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
