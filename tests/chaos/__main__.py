"""Kill a federation at random, and count what was lost: ``python -m chaos --kills 200 --seed 1``.

A federation of three organisations is made, real processes over real TLS. It first lives through one run that nobody
disturbs. Then runs follow one another, in mode `none` and mode `local`, with rounds that wait for everybody and rounds
that go on without the missing, while `troubles.py` strikes. When all troubles are spent the last run is let alone,
every process ends, and `invariants.py` judges what is on the disks.

The last line is one JSON object; the exit code is 1 if anything in it is not as promised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from chaos.invariants import Coordinator, Organisation, Verdict, judge
from chaos.stage import DEADLINE_SECONDS, Stage
from chaos.troubles import draw
from chaos.witness import Recovery, Witness

RESUME_SECONDS = 30.0
_UNDISTURBED_SECONDS = 300.0
_OVERCOME_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_BEGAN = time.monotonic()
# Mode none and mode local; rounds that wait for everybody and rounds that skip the missing.
_TERMS = ((False, "wait"), (True, "skip"), (False, "skip"), (True, "wait"))


class Session:
    """One federation, one seed."""

    def __init__(self, folder: Path, *, seed: int, kills: int) -> None:
        self.stage = Stage(folder, say)
        self.folder = folder
        self.troubles = draw(seed, kills, list(self.stage.organisations), deadline_seconds=DEADLINE_SECONDS)
        self.witness = Witness(
            self.stage.coordinator_home,
            {org: self.stage.home(org) for org in self.stage.organisations},
            self.stage.logs,
            folder / "words",
        )
        self._terms = itertools.cycle(_TERMS)
        self._number = itertools.count(1)
        self._run = ""

    def play(self) -> None:
        """Everything that happens while processes run."""
        try:
            self.stage.open()
            self.witness.start()
            # Its deadline is no concern: what it is compared by are bits.
            self._start_run("undisturbed", private=False, on_short_round="wait", round_seconds=_UNDISTURBED_SECONDS)
            self._finish()
            if not self._finished():
                raise SystemExit(
                    f"expected the undisturbed run to end, it did not: nothing to compare with; see {self.folder}"
                )
            for number, trouble in enumerate(self.troubles, start=1):
                self._go_on()
                self._settle(trouble.pause)
                say(f"  {number}/{len(self.troubles)}: {trouble}")
                recovery = self.witness.recovery(trouble.org, working=trouble.part == "worker")
                recovery.since = self.stage.suffer(trouble)
                if number == len(self.troubles) or self.troubles[number].calm:
                    self._overcome(recovery)
            self._finish()
        finally:
            self.stage.close()
            self.witness.stop()

    def judge(self) -> Verdict:
        """Judge what is on the disks."""
        homes = {org: self.stage.home(org) for org in self.stage.organisations}
        return judge(
            Coordinator(self.stage.coordinator_home),
            {org: Organisation(org, home) for org, home in homes.items()},
            self.witness.evidence,
            self.folder,
        )

    def _start_run(self, name: str, **terms: Any) -> None:
        self._run = self.stage.start_run(self.stage.charter(name, **terms))
        say(f"run {self._run}")

    def _go_on(self) -> None:
        """Another run where the last one is over: who has nothing to do gives no sign of life."""
        if self._finished():
            private, on_short_round = next(self._terms)
            name = f"{'local' if private else 'none'}-{on_short_round}-{next(self._number)}"
            self._start_run(name, private=private, on_short_round=on_short_round)

    def _finished(self) -> bool:
        return _state(self.stage.coordinator_home, self._run) == "finished"

    def _finish(self) -> None:
        """Let the run come to its end; it is not waited for longer than a person would, and judged as it stands."""
        deadline = time.monotonic() + _UNDISTURBED_SECONDS
        while not self._finished() and time.monotonic() < deadline:
            self._settle(1.0)
        say(f"run {self._run}: {_state(self.stage.coordinator_home, self._run)}")

    def _overcome(self, recovery: Recovery) -> None:
        deadline = max(time.time(), recovery.since) + _OVERCOME_SECONDS
        while not recovery.over and time.time() < deadline:
            self._go_on()
            self._settle(_LOOK_SECONDS)
        say(f"    a sign of life after {'(none)' if recovery.seconds is None else f'{recovery.seconds:.1f} s'}")

    def _settle(self, seconds: float) -> None:
        """Let time pass, as an init system would: whoever ended by itself is started again."""
        deadline = time.monotonic() + seconds
        while True:
            self.stage.revive()
            if time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_SECONDS)


def main(arguments: list[str]) -> int:
    """Play one session, print its figures, and say whether they are as promised."""
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many troubles")
    parser.add_argument("--seed", type=int, default=None, help="which troubles (default: drawn, and printed)")
    parser.add_argument("--folder", type=Path, default=None, help="keep everything here (default: kept on failure)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that the federation's processes end with this one.
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"SEED={seed} KILLS={options.kills}", flush=True)
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="foedus-chaos-"))
    session = Session(folder, seed=seed, kills=options.kills)
    session.play()
    verdict = session.judge()
    figures = summary(session, verdict) | {"seed": seed, "seconds": round(time.monotonic() - _BEGAN, 1)}
    broken = promises_broken(session, verdict, figures)
    for line in broken:
        say(f"BROKEN: {line}")
    if broken or options.folder:
        say(f"kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures), flush=True)
    return 1 if broken else 0


def summary(session: Session, verdict: Verdict) -> dict[str, Any]:
    """The figures of a session."""
    recoveries = session.witness.evidence.recoveries
    seconds = [one.seconds for one in recoveries if one.seconds is not None]
    return {
        "kills": len(session.troubles),
        "deaths": session.stage.deaths,
        "lost": len(verdict.lost),
        "double_spent": len(verdict.double_spent),
        "unrecorded": len(verdict.unrecorded),
        "unnamed_failures": len(verdict.unnamed_failures),
        "different_bits": len(verdict.different_bits),
        "ended_by_themselves": len(session.stage.exits),
        "median_resume_seconds": round(statistics.median(seconds), 2) if seconds else None,
        "longest_resume_seconds": round(max(seconds), 2) if seconds else None,
        "resumes_measured": len(seconds),
        "resumes_missing": sum(not one.over for one in recoveries),
        "checked": dict(sorted(verdict.checked.items())),
    }


def promises_broken(session: Session, verdict: Verdict, figures: dict[str, Any]) -> list[str]:
    """Everything that is not as promised, one line each."""
    broken = [*verdict.violations, *session.stage.exits]
    if figures["median_resume_seconds"] is None or figures["median_resume_seconds"] > RESUME_SECONDS:
        broken.append(f"expected a median of {RESUME_SECONDS} s to resume, got {figures['median_resume_seconds']}")
    if figures["resumes_missing"]:
        broken.append(f"{figures['resumes_missing']} troubles were followed by no sign of life")
    for name in ("acknowledged", "reservations", "sums", "rounds compared with another run's"):
        if not verdict.checked[name]:
            broken.append(f"nothing was checked of: {name}")
    return broken


def _state(home: Path, run: str) -> str:
    """A run's state, read beside the coordinator."""
    for _ in range(20):
        try:
            with closing(sqlite3.connect(f"file:{home / 'coordinator.db'}?mode=ro", uri=True, timeout=5.0)) as database:
                row = database.execute("SELECT state FROM runs WHERE id = ?", (run,)).fetchone()
                return str(row[0])
        except sqlite3.OperationalError:  # The coordinator is being started: its WAL is being recovered.
            time.sleep(_LOOK_SECONDS)
    return "unreadable"


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # The folder of tests is for this process; the federation's must run without it.
    own = str(Path(__file__).resolve().parents[1])
    path = [
        each
        for each in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if each and Path(each).resolve() != Path(own)
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    sys.exit(main(sys.argv[1:]))
