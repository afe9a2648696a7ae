"""The demo: start a whole federation on this machine, watch its run, keep what came out.

Read it from `run_demo` down. The parties are real processes that use the documented commands over real TLS; what is
special about a demo is only that one person plays all of them (`federation.py`), and that the operator's database is
read here to show progress.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_client.scratch import is_alive
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_protocols.charter import Charter
from foedus_protocols.console import progress_console
from foedus_protocols.errors import RoundFailed, StateError
from foedus_protocols.files import write_durably
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from foedus_local.federation import LocalFederation
from foedus_local.plan import Plan

MARKER = "demo.json"
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a demo gives.

    Attributes:
        plan: What was to be done.
        detail: The run as `foedus coordinator run show` tells it.
        seconds: Wall-clock seconds from the first process to the variant.
        variant: The variant's folder.
    """

    plan: Plan
    detail: dict[str, Any]
    seconds: float
    variant: Path

    def summary(self) -> dict[str, Any]:
        """The object that ``--format json`` prints."""
        return {
            "domain": self.plan.domain,
            "orgs": len(self.plan.organisations),
            "rounds": self.detail["rounds_closed"],
            "loss_before": self.detail["loss_before"],
            "loss_after": self.detail["loss_after"],
            "epsilon": self.detail["epsilon"],
            "delta": self.detail["delta"],
            "unit": self.plan.unit,
            "bytes_up": self.detail["bytes_up"],
            "bytes_down": self.detail["bytes_down"],
            "seconds": round(self.seconds, 1),
            "variant": str(self.variant),
        }


@contextmanager
def demo_folder(folder: Path) -> Iterator[Path]:
    """An empty folder for a demo; one that an earlier demo left there is replaced.

    Raises:
        StateError: The folder holds something else, or a demo that is still running.
    """
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise StateError(f"expected an empty folder or an earlier demo in {folder}, got other files: use --folder")
        holder = json.loads(marker.read_text(encoding="utf-8")).get("process")
        if holder is not None and is_alive(holder):
            raise StateError(f"expected no running demo in {folder}, process {holder} runs one: wait, or use --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(marker, json.dumps({"process": os.getpid()}).encode())
    try:
        yield folder
    finally:
        write_durably(marker, json.dumps({"process": None}).encode())


def run_demo(plan: Plan, folder: Path, base: Path) -> Result:
    """Run the federation to its end; its processes end with it, whatever happens.

    Raises:
        RoundFailed: The run ended without a variant.
        FoedusError: A process ended by itself, or a command failed.
    """
    started = time.monotonic()
    federation = LocalFederation(folder, plan.organisations, base)
    try:
        federation.create(plan.budget(), say)
        run = federation.start_run(plan.charter())
        detail = watch(Home(federation.coordinator_home), run, federation.check)
    finally:
        federation.stop()
    return finished(plan, detail, folder, seconds=time.monotonic() - started)


def finished(plan: Plan, detail: dict[str, Any], folder: Path, *, seconds: float) -> Result:
    """A run's result, with the variant copied to where people look for it.

    Raises:
        RoundFailed: The run ended without a variant.
    """
    if detail["variant"] is None:
        raise RoundFailed(
            f"the run ended without a variant: {detail['outcome']} ({detail['reason']}); see {folder}/logs"
        )
    variant = folder / "variant"
    shutil.copytree(detail["variant"], variant)
    return Result(plan=plan, detail=detail, seconds=seconds, variant=variant)


def charter_of(result: Result, coordinator_home: Path) -> Charter:
    """The charter that a demo ran under."""
    return Charter.parse(Home(coordinator_home).files.read(result.detail["charter"]))


def watch(home: Home, run: str, check: Callable[[], None]) -> dict[str, Any]:
    """Show progress until the run has ended; `check` raises once that can no longer happen."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=progress_console) as progress:
        task = progress.add_task("signatures", total=1)
        told: dict[str, str] = {}
        while True:
            check()
            detail = views.run_detail(home, home.storage.run(run))
            _tell_news(detail, told, progress.console.print)
            progress.update(task, description=_phase(detail), completed=detail["rounds_closed"], total=detail["rounds"])
            if detail["state"] == "finished":
                return detail
            time.sleep(_POLL_SECONDS)


def _phase(detail: dict[str, Any]) -> str:
    if detail["state"] == "agreeing":
        return "the organisations check the charter and sign"
    if detail["state"] == "closing":
        return "last scores and the variant"
    return f"round {min(detail['rounds_closed'] + 1, detail['rounds'])}"


def _tell_news(detail: dict[str, Any], told: dict[str, str], say: Callable[[str], None]) -> None:
    """One line for each signature and each closed round."""
    for org, answer in detail["answers"].items():
        if answer != "waiting" and told.get(org) != answer:
            told[org] = answer
            say(f"  {org}: {answer}")
    losses = {point["after"]: point["loss"] for point in detail["losses"]}
    for one in detail["round_list"]:
        name = f"round {one['round']}"
        if one["state"] in ("closed", "failed") and name not in told:
            told[name] = one["state"]
            loss = losses.get(one["round"] - 1)
            before = f", held-out loss before it {loss:.3f}" if loss is not None else ""
            say(f"  {name} {one['state']}: {len(one['survivors'])} vectors in the sum{before}")


def say(text: str) -> None:
    """One line of progress."""
    progress_console.print(f"  {text}", highlight=False)
