"""How a long-running process keeps what it once needed: it gives it back.

glibc keeps an arena for each of many threads, and raises the size from which a block is a mapping of its own to the
largest that was ever freed. Both are right for programs that live for a minute. A coordinator with a thread for each
open call and vectors of 10 to 100 MB would hold several of them for ever. Where there is no glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_ARENAS = 2
# A chunk of a transfer is mapped and unmapped; the pieces in which vectors are worked on (0.5 MiB) stay on the heap,
# where a fresh one costs no page faults.
_MAPPED_BYTES = 1 << 20
_TRIM_BYTES = 16 << 20


def give_memory_back() -> bool:
    """Set malloc up for a process that lives for months; to be called before it starts threads.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _MAPPED_BYTES), (_M_TRIM_THRESHOLD, _TRIM_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
