"""The bench of rounds runs, and says what it promises: a whole federation at a tiny size, and the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent


@pytest.mark.e2e
@pytest.mark.xdist_group("e2e")
def test_a_quick_bench_measures_rounds_bytes_and_memory() -> None:
    command = [sys.executable, str(BENCH / "rounds.py"), "--quick", "--only", "overhead", "bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    (row,) = result["overhead"]
    assert row["seconds"] == pytest.approx(row["coding_seconds"] + row["overhead_seconds"])
    assert 0 < row["coding_seconds"] < row["seconds"]
    assert 0 <= row["coordinator_mib"] < row["limit_mib"]
    assert 0 <= row["daemon_mib"] < row["limit_mib"]
    # Three vectors up and three sums down, each of 2 bytes a parameter in whole blocks, and everything around them.
    wire = result["bytes"]
    assert wire["vectors"] == wire["sums"] == 3 * wire["vector_bytes"] >= 3 * 2 * row["parameters"]
    assert wire["wire_up"] > wire["vectors"]
    assert wire["wire_down"] > wire["sums"]
    assert wire["metadata"] == wire["wire_up"] + wire["wire_down"] - wire["vectors"] - wire["sums"]


def test_the_tables_say_the_ratio_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_report

    row = {
        "parameters": 2_500_000, "members": 3, "seconds": 1.5, "coding_seconds": 0.5, "overhead_seconds": 1.0,
        "flower_seconds": 20.0, "no_fsync_seconds": 1.25,
    }  # fmt: skip
    result = {"load_before": (0.0, 0.0, 0.0), "cores": 2, "repeats": 1, "overhead": [row]}
    line = bench_report.tables(result).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "10 MB", "3", "1.50 s", "0.50 s", "1.00 s", "20.00 s", "0.050", "0.075", "1.25 s", "0.25 s",
    ]  # fmt: skip
    bare = {name: value for name, value in row.items() if name not in ("flower_seconds", "no_fsync_seconds")}
    assert bench_report.tables({**result, "overhead": [bare]}).splitlines()[-1].count("| - ") == 5


def test_shapes_have_exactly_the_parameters_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_federation
    from foedus_protocols.layout import adapter_layout

    for parameters in (100_000, 2_000_000, 2_500_000, 25_000_000):
        rank, head_dim = bench_federation.shape(parameters)
        assert adapter_layout(bench_federation.wide(head_dim), targets="attention", rank=rank).length == parameters
    with pytest.raises(ValueError, match="multiple of"):
        bench_federation.shape(1_000_001)
