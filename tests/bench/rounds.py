"""What a federated round costs beyond training, beside Flower's SuperLink moving the same arrays, in one run.

A coordinator and daemons as real processes over mutual TLS, everything durable, whose workers write a random vector
instead of training; and SuperLink with SuperNodes (in memory, without TLS) whose clients return what came. Then: memory
over idle for 3, 12 and 32 organisations, bytes on the wire by kind, seconds to come back after `kill -9`, and the same
rounds with nothing waiting for the disk. Medians; the tables are Markdown, and one JSON object comes last.

    make bench BENCH_FLAGS="--repeats 3"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_report import tables
from bench_stages import measure_bytes, measure_resume, measure_rounds
from flower_side import flower_rounds

PARTS = ("overhead", "flower", "fsync", "memory", "bytes", "resume")
SMALL, LARGE, FOUR_MEGABYTES, TINY = 2_500_000, 25_000_000, 2_000_000, 100_000
MEMBERS = 3


def say(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def overhead(parameters: int, *, rounds: int, peer_rounds: int, parts: list[str], repeats: int) -> dict[str, Any]:
    """One row: our rounds, then SuperLink's, then ours without fsync, `repeats` times over."""
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    loose: list[float] = []
    for _ in range(repeats):
        say(f"{MEMBERS} organisations, {parameters:,} parameters: {rounds} rounds")
        ours.append(measure_rounds(members=MEMBERS, parameters=parameters, rounds=rounds))
        if "flower" in parts:
            say(f"SuperLink, {parameters:,} parameters: {peer_rounds} rounds")
            with tempfile.TemporaryDirectory(prefix="foedus-bench-", ignore_cleanup_errors=True) as folder:
                found = flower_rounds(
                    Path(folder) / "flower", members=MEMBERS, parameters=parameters, rounds=peer_rounds + 1
                )
            theirs += found[1:]
        if "fsync" in parts:
            say(f"{MEMBERS} organisations, {parameters:,} parameters, nothing durable: {rounds} rounds")
            found_loose = measure_rounds(members=MEMBERS, parameters=parameters, rounds=rounds, durable=False)
            loose += [one["seconds"] for one in found_loose["rounds"]]
    every = [one for run in ours for one in run["rounds"]]
    row = {**ours[-1], **{name: statistics.median(one[name] for one in every) for name in every[0]}, "rounds": every}
    for name in ("coordinator_mib", "daemon_mib"):
        row[name] = max(run[name] for run in ours)
    if theirs:
        flower = statistics.median(theirs)
        row |= {"flower_rounds": theirs, "flower_seconds": flower}
        row |= {"ratio": row["overhead_seconds"] / flower, "ratio_with_coding": row["seconds"] / flower}
    if loose:
        row["no_fsync_seconds"] = statistics.median(loose)
    return row


def main() -> None:
    """Measure what was asked for; print tables, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="of the rounds, ours and theirs in turn")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    arguments = parser.parse_args()
    parts: list[str] = arguments.only
    result: dict[str, Any] = {
        "quick": arguments.quick,
        "repeats": arguments.repeats,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg(),
    }
    sizes = [(TINY, 1, 1)] if arguments.quick else [(SMALL, 7, 3), (LARGE, 5, 2)]
    if {"overhead", "flower", "fsync"} & set(parts):
        result["overhead"] = [
            overhead(parameters, rounds=rounds, peer_rounds=theirs, parts=parts, repeats=arguments.repeats)
            for parameters, rounds, theirs in sizes
        ]
    if "memory" in parts:
        rows = [row for row in result.get("overhead", []) if row["parameters"] == SMALL]
        for members in (4,) if arguments.quick else (12, 32) if rows else (3, 12, 32):
            say(f"memory over idle with {members} organisations")
            rows.append(measure_rounds(members=members, parameters=TINY if arguments.quick else SMALL, rounds=2))
        result["memory"] = [
            {name: row[name] for name in ("members", "parameters", "coordinator_mib", "daemon_mib", "limit_mib")}
            for row in rows
        ]
    if "bytes" in parts:
        say("bytes on the wire")
        parameters = TINY if arguments.quick else FOUR_MEGABYTES
        result["bytes"] = measure_bytes(members=MEMBERS, parameters=parameters, rounds=1 if arguments.quick else 4)
    if "resume" in parts:
        say("kills")
        result["resume"] = measure_resume(
            members=MEMBERS, parameters=TINY if arguments.quick else SMALL, kills=1 if arguments.quick else 4
        )
    print(tables(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
