"""``make fuzz``: each parser for SECONDS, in a process of its own, and what was found.

A finding's input is written to ``tests/vectors/fuzz/TARGET/``, where `test_fuzz.py` tries it for ever after. A process
that hangs in native code, or dies, is a finding too. One line for each parser to standard error, one JSON object to
standard output last; the exit code is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from foedus_protocols.canonical import digest
from fuzz.targets import KEPT, NAMES, target
from fuzz.watch import Finding, inputs, judge

_GRACE_SECONDS = 300.0  # A process that has not ended so long after its time hangs; getting ready takes some of it.
_KEPT_EACH = 5


def fuzz(name: str, seconds: float, seed: int, kept: Path) -> dict[str, Any]:
    """Try inputs until the time is up; each place is kept `_KEPT_EACH` times at most."""
    found: dict[str, int] = {}
    tried = 0
    with tempfile.TemporaryDirectory(prefix="foedus-fuzz-") as scratch, ExitStack() as stack:
        chosen = target(name, Path(scratch), stack)
        last = Path(scratch) / "last"
        deadline = time.monotonic() + seconds
        for data in inputs(chosen, seed):
            if time.monotonic() > deadline:
                break
            tried += 1
            last.write_bytes(data)
            finding = judge(chosen, data)
            if finding is not None:
                keep(kept / name, data, finding, found)
    return {"target": name, "seconds": seconds, "seed": seed, "inputs": tried, "findings": found}


def keep(folder: Path, data: bytes, finding: Finding, found: dict[str, int]) -> None:
    """Write an input down, and say what it did."""
    place = f"{finding.kind}: {finding.detail}"
    found[place] = found.get(place, 0) + 1
    if found[place] <= _KEPT_EACH:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{finding.kind}-{digest(data)[:12]}").write_bytes(data)
        print(f"{folder.name}: {place}", file=sys.stderr, flush=True)


def apart(name: str, seconds: float, seed: int, kept: Path) -> dict[str, Any]:
    """`fuzz` in a process of its own, which may die or hang."""
    command = [sys.executable, __file__, "--only", name, "--seconds", str(seconds), "--seed", str(seed)]
    command += ["--keep", str(kept)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds + _GRACE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"target": name, "seed": seed, "findings": {"hang: in native code": 1}}
    if done.returncode not in (0, 1) or not done.stdout:
        return {"target": name, "seed": seed, "findings": {f"crash: its process ended with {done.returncode}": 1}}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="For each parser.")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--jobs", type=int, default=1, help="Parsers at once.")
    parser.add_argument("--only", action="append", choices=NAMES, help="This parser alone; may be repeated.")
    parser.add_argument("--keep", type=Path, default=KEPT, help="Where inputs of findings go.")
    given = parser.parse_args()
    if given.only is not None and len(given.only) == 1:
        result = fuzz(given.only[0], given.seconds, given.seed, given.keep)
        print(json.dumps(result))
        return 1 if result["findings"] else 0
    print(f"seed {given.seed}", file=sys.stderr, flush=True)
    results = []
    for result in _all(given.only or list(NAMES), given):
        print(f"{result['target']}: {result.get('inputs', 0)} inputs, {result['findings'] or 'nothing found'}",
              file=sys.stderr, flush=True)  # fmt: skip
        results.append(result)
    print(json.dumps({"seed": given.seed, "seconds": given.seconds, "targets": results}))
    return 1 if any(result["findings"] for result in results) else 0


def _all(names: list[str], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(given.jobs) as pool:
        yield from pool.map(lambda name: apart(name, given.seconds, given.seed, given.keep), names)


if __name__ == "__main__":
    sys.exit(main())
