"""What a process gives back once it is told to, seen from outside: its resident memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from foedus_protocols.memory import give_memory_back

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


def resident(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_blocks_leave_the_process() -> None:
    assert resident("keep") - resident("back") > 24 << 10  # KiB, of 32 MiB that were freed.


def test_it_says_whether_it_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert give_memory_back() is False
