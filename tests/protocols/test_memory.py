"""What a process gives back or keeps once it is told to, seen from outside: its resident memory, its page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
from foedus_protocols import memory
from foedus_protocols.memory import give_memory_back, keep_freed_memory

SET = memory._set  # The suite puts another in its place (conftest.py).

# Blocks of 1 MiB, every second of which is freed: without mappings of their own the heap cannot shrink between them.
# A block of 30 MiB that is freed first is what makes glibc keep them on the heap.
PROGRAM = """
import ctypes, sys
from foedus_protocols.memory import give_memory_back
if sys.argv[1] == "back":
    give_memory_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def block(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place
libc.free(block(30 << 20))
blocks = [block(1 << 20) for _ in range(64)]
for place in blocks[::2]:
    libc.free(place)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""

# A block above glibc's largest threshold, which is mapped anew each time unless told otherwise.
AGAIN = """
import ctypes, resource, sys
from foedus_protocols.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():
    place = libc.malloc(40 << 20)
    ctypes.memset(place, 1, 40 << 20)
    libc.free(place)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def resident(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_blocks_leave_the_process() -> None:
    assert resident("keep") - resident("back") > 24 << 10  # KiB, of 32 MiB that were freed.


def test_a_block_that_is_made_again_and_again_faults_once() -> None:
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", AGAIN, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("default", "keep")
    }
    # 4 blocks of 40 MiB, in pages of 2 MiB at most where the kernel merges them.
    assert faults["keep"] < 20 <= faults["default"]


def test_it_says_whether_it_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_set", SET)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert give_memory_back() is False
    assert keep_freed_memory() is False
