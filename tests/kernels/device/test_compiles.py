"""Every kernel compiles for sm_80, sm_90 and sm_100 without a card, spills next to nothing, counts in 64 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.compile_kernels import cases, narrow_offsets

TESTS = Path(__file__).parents[2]

# Bytes that may spill: up to three registers by Triton 3.9 and eight before it, which the assemblers that they bring
# place outside the loop, where twice as many warps would do every product twice. None on sm_90.
SPILLED = {("log-sparse keys, bf16", 80): 24}
SPILLED_BEFORE = {
    ("log-sparse keys, bf16", 80): 32,
    ("log-sparse keys, bf16", 100): 8,
    ("log-sparse keys, chunks, bf16", 80): 8,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Made by a process in which Triton compiles: the interpreter's functions cannot be."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TESTS), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.compile_kernels", "--json"],
        env=kept | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_everywhere_and_spills_next_to_nothing(compiled: list[dict]) -> None:
    assert len(compiled) == sum(len(case.architectures) for case in cases())
    for one in compiled:
        print(
            "{label:24} sm_{architecture:<4} registers {registers:4} shared {shared:7} spilled {spilled}".format(**one)
        )
    allowed = SPILLED if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else SPILLED_BEFORE
    assert [one for one in compiled if one["spilled"] > allowed.get((one["label"], one["architecture"]), 0)] == []
    # 48 KiB need no asking, 99 KiB an sm_86 or sm_89 has as well.
    assert max(one["shared"] for one in compiled) <= 99 << 10


def test_offsets_that_can_pass_2_to_31_are_counted_in_64_bits(compiled: list[dict]) -> None:
    assert {one["label"]: one["narrow"] for one in compiled if one["narrow"]} == {}


@pytest.mark.parametrize(
    ("offset", "faults"),
    [
        ("%o = arith.muli %p, %c : i32", 1),  # a program's number times a width
        ("%o = arith.remsi %p, %c : i32", 0),  # a column's number
        ("%o = arith.muli %r, %c : i32", 0),  # a row of a tile times a width
        ("%o = arith.shli %p, %c : i32", 1),  # nothing is known of it
    ],
)
def test_the_check_of_offsets_sees_a_narrow_one(offset: str, faults: int) -> None:
    lines = (
        "%c = arith.constant 2880 : i32",
        "%p = tt.get_program_id x : i32",
        "%r = arith.remsi %p, %c : i32",
        offset,
        "%a = tt.addptr %base, %o : !tt.ptr<i8>, i32",
    )
    assert bool(narrow_offsets("\n".join(lines))) == bool(faults)
