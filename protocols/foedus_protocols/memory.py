"""What a process does with memory that it has freed: one that waits gives it back, one that computes keeps it.

glibc keeps an arena for each of many threads, and raises the size from which a block is a mapping of its own to the
largest that was ever freed, 32 MiB at most. Both are right for programs that live for a minute. A coordinator with a
thread for each open call and vectors of 10 to 100 MB would hold several of them for ever; and a model's process would
map and unmap each larger tensor, whose pages the kernel clears every time. Where there is no glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
_ARENAS = 2
# A chunk of a transfer is mapped and unmapped; the pieces in which vectors are worked on (0.5 MiB) stay on the heap,
# where a fresh one costs no page faults.
_MAPPED_BYTES = 1 << 20
_TRIM_BYTES = 16 << 20
_NEVER_TRIMMED = -1


def give_memory_back() -> bool:
    """Set malloc up for a process that lives for months; to be called before it starts threads.

    Returns:
        Whether it was done.
    """
    return _set((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _MAPPED_BYTES), (_M_TRIM_THRESHOLD, _TRIM_BYTES))


def keep_freed_memory() -> bool:
    """Set malloc up for a process that computes with a model until it ends: what it frees stays in its heap.

    That is so on the main thread, where a step allocates; glibc still maps the largest blocks of other threads.

    A step makes and frees the same tensors again and again. With glibc's settings it took 4 to 27 % longer on a small
    model, and decoding one matrix of 5760 x 2880 beside a product of 16 rows 2.4 times as long (docs/log.md).

    Returns:
        Whether it was done.
    """
    return _set((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIMMED))


def _set(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, value) == 1 for name, value in settings)
