"""One input through one parser, under watch: what it raised, how long it took, how much memory it took.

Only errors of the tree may come out. An alarm interrupts what takes more than `HANG_SECONDS` of processor time in
Python, or waits much longer than that (a busy machine must not look like a hang); what hangs in native code is ended
from outside (`run.py`). The peak of resident memory is the kernel's own figure, set back before
each input where the kernel offers it; elsewhere memory is not judged.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from foedus_protocols.errors import FoedusError
from fuzz.mutate import Mutator

HANG_SECONDS = 5.0
MARKER = "zq7-gothic-marmalade"
"""Stands in every seed that plays a record; no error's text may hold it."""

_WAIT_FACTOR = 12.0
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class Hang(BaseException):
    """Raised by the alarm. Not an `Exception`, so that a broad handler does not swallow it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser.

    Attributes:
        name: What it is called on the command line and in `tests/vectors/fuzz/NAME/`.
        seeds: Valid inputs; each must pass.
        mutate: What makes them wrong.
        parse: Takes the bytes as they arrive.
        memory_bytes: How much an input of this size may add to the process's peak.
        hang_seconds: What takes longer hangs.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Mutator
    parse: Callable[[bytes], object]
    memory_bytes: int = 64 << 20
    hang_seconds: float = HANG_SECONDS


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a parser must not do: ``crash``, ``hang``, ``memory`` or ``leak``, with the place it came from."""

    kind: str
    detail: str


def judge(target: Target, data: bytes) -> Finding | None:
    """Give one input to a parser."""
    before = _peak()
    try:
        with _alarm(target.hang_seconds):
            target.parse(data)
    except Hang:
        return Finding(kind="hang", detail=f"longer than {target.hang_seconds:.0f} s at {_place(_HANGING)}")
    except FoedusError as error:
        if MARKER in str(error):
            return Finding(kind="leak", detail=f"a record in the text of a {type(error).__name__}")
    except Exception as error:  # This is what the fuzzer is for.
        frames = traceback.extract_tb(error.__traceback__)
        return Finding(kind="crash", detail=f"{type(error).__name__} at {_place(frames)}: {str(error)[:200]}")
    grown = _peak(reset=False) - before
    if grown > target.memory_bytes:
        return Finding(kind="memory", detail=f"{grown >> 20} MiB for {len(data)} bytes")
    return None


def inputs(target: Target, seed: int, count: int | None = None) -> Iterator[bytes]:
    """The mutated inputs that a seed stands for."""
    number = 0
    while count is None or number < count:
        yield target.mutate(random.Random(f"{target.name} {seed} {number}"), target.seeds)
        number += 1


_HANGING: list[traceback.FrameSummary] = []


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        _HANGING[:] = traceback.extract_stack(frame)
        raise Hang

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
        signal.ITIMER_REAL: (signal.SIGALRM, _WAIT_FACTOR * seconds),
    }
    earlier = {number: signal.signal(number, ring) for number, _ in timers.values()}
    for timer, (_, after) in timers.items():
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame of ours, and the innermost of all."""
    ours = [frame for frame in frames if "/foedus_" in frame.filename]
    shown = [*ours[-1:], *frames[-1:]]
    return " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(shown))


def _peak(*, reset: bool = True) -> int:
    """Peak of resident memory in bytes since it was set back last; 0 where the kernel does not say."""
    try:
        if reset:
            _RESET.write_text("5")
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) << 10
