"""One process of the measured federation: the real command, with stop-watches in it and another worker behind it.

``python bench_process.py --events FILE python -m foedus_protocols.cli coordinator up ...`` is ``foedus coordinator up``
in this process, and so is ``client up``, except that

* each round, coding step, worker call and hello is noted in FILE, one JSON line each;
* a daemon's worker is `bench_worker.py`, which writes a random vector instead of training;
* with ``--no-fsync`` nothing waits for the disk, in files or SQLite: what durability costs.

This is the only place where the bench reaches into the programs that it measures.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sqlite3
import sqlite3.dbapi2
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

WORKER = Path(__file__).with_name("bench_worker.py")


class Events:
    """A file of what happened when, in Unix seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def timed(
        self, owner: Any, name: str, kind: str, detail: Callable[..., dict[str, Any]] = lambda *_, **__: {}
    ) -> None:
        """Replace a function by one that notes when it ran, and how long its own thread computed."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            begun, cpu = time.time(), time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                event = {"kind": kind, "begun": begun, "ended": time.time(), "cpu": time.thread_time() - cpu}
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event | detail(*args, **kwargs)) + "\n")

        setattr(owner, name, outer)


class _Cursor(sqlite3.Cursor):
    """A cursor for which every ``synchronous`` means OFF."""

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        sync = "".join(sql.lower().split()).startswith("pragmasynchronous=")
        return super().execute("PRAGMA synchronous = OFF" if sync else sql, parameters)


class _Connection(sqlite3.Connection):
    """A connection with such cursors."""

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        return self.cursor().execute(sql, parameters)


def without_durability() -> None:
    """Let nothing wait for the disk."""
    os.fsync = os.fdatasync = lambda _: None
    connect = sqlite3.connect
    for module in (sqlite3, sqlite3.dbapi2):
        module.connect = functools.partial(connect, factory=_Connection)  # type: ignore[attr-defined]


def watch(events: Events, side: str, train_seconds: float) -> None:
    """Put the stop-watches in."""
    from foedus_protocols import codec

    events.timed(codec, "encode", "encode")
    events.timed(codec, "decode_file", "decode")
    if side == "coordinator":
        from foedus_coordinator import rounds

        events.timed(rounds, "play_round", "round", lambda _, number, *__, **___: {"round": number})
        return
    from foedus_client import daemon, worker_process

    process = worker_process.WorkerProcess
    events.timed(process, "train", "worker")
    events.timed(daemon.Daemon, "greet", "greet")
    command = (sys.executable, str(WORKER), str(train_seconds))
    daemon.WorkerProcess = functools.partial(process, command=command)  # type: ignore[misc,assignment]


def main() -> None:
    """Prepare this process, then be the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--no-fsync", action="store_true")
    parser.add_argument("--train-seconds", type=float, default=0.0)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="python -m foedus_protocols.cli ARGUMENTS")
    given = parser.parse_args()
    arguments = given.command[3:]
    if given.no_fsync:
        without_durability()
    watch(Events(given.events), arguments[0], given.train_seconds)
    from foedus_protocols.cli import main as foedus

    foedus(arguments)


if __name__ == "__main__":
    main()
