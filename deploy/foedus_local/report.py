"""What a demo shows at its end: a table for people, and a picture of loss and epsilon over the rounds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from foedus_coordinator.variant import epsilon_after
from rich.console import Console
from rich.table import Table

from foedus_local.demo import Result, charter_of

_PHASES = ("train", "sum", "advance", "confirm")


def show(result: Result, console: Console) -> None:
    """Print the table."""
    detail, terms = result.detail, result.plan.terms
    title = f"{result.plan.domain}: {len(result.plan.organisations)} organisations, {detail['rounds_closed']} rounds"
    table = Table(title=title if terms.private else f"NOT PRIVATE: {title}", show_header=False)
    if detail["loss_before"] is not None and detail["loss_after"] is not None:
        fall = 1.0 - detail["loss_after"] / detail["loss_before"]
        table.add_row("held-out loss before", f"{detail['loss_before']:.4f} nats a token")
        table.add_row("held-out loss after", f"{detail['loss_after']:.4f} nats a token ({fall:.1%} lower)")
    if terms.private:
        spent = f"{detail['epsilon']:.3f} of {terms.epsilon:g} at delta {terms.delta:g}, for one {result.plan.unit}"
        table.add_row("epsilon spent, of its cap", spent)
    else:
        table.add_row("epsilon", "none: no noise was added, nothing is promised")
    table.add_row("bytes up, all organisations", f"{detail['bytes_up']:,}")
    table.add_row("bytes down, all organisations", f"{detail['bytes_down']:,}")
    for phase in _PHASES:
        seconds = [one["seconds"].get(phase, 0.0) for one in detail["round_list"]]
        table.add_row(f"seconds a round: {phase}", f"{statistics.median(seconds):.2f} (median)")
    table.add_row("seconds in all", f"{result.seconds:.0f}")
    console.print(table)
    console.print("In this version the coordinator sees each organisation's noised vector.", highlight=False)
    console.print("Held-out scores left without noise (evaluation = plain): epsilon does not cover those units.")
    console.print(f"picture: {result.variant / 'rounds.png'}", soft_wrap=True, highlight=False)
    console.print(f"variant: {result.variant}", soft_wrap=True, highlight=False)


def show_comparison(result: dict[str, Any], console: Console) -> None:
    """Print the comparison's two tables."""
    from foedus_client import evaluate

    console.print("\nHeld-out units of all organisations:")
    evaluate.show(result, console)
    if left_out := result["trained_elsewhere"]["units"]:
        console.print(f"{left_out} held-out units are not among them: another organisation trains on them.")
    rows = list(result["models"])
    common = [name for name in rows if not name.startswith("alone: ")]
    table = Table("own held-out loss", *common, "alone", box=None)
    for org, losses in result["by_organisation"].items():
        cells = [evaluate.text(losses[name]) for name in common]
        table.add_row(org, *cells, evaluate.text(losses[f"alone: {org}"]))
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    if result["private"]:
        console.print("Rows alone and pooled were trained for this table only: to release one costs its epsilon again.")


def draw(result: Result, coordinator_home: Path, path: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    charter = charter_of(result, coordinator_home)
    points: list[dict[str, Any]] = result.detail["losses"]
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    left.plot([one["after"] for one in points], [one["loss"] for one in points], "o-", color="tab:blue")
    left.set_xlabel("rounds closed")
    left.set_ylabel("held-out loss (nats a token)", color="tab:blue")
    if result.plan.terms.private:
        right = left.twinx()
        rounds = range(result.detail["rounds_closed"] + 1)
        spent = [epsilon_after(charter, number) or 0.0 if number else 0.0 for number in rounds]
        right.plot(rounds, spent, "s--", color="tab:orange")
        right.axhline(result.plan.terms.epsilon, color="tab:orange", linewidth=0.8)
        right.set_ylim(0, result.plan.terms.epsilon * 1.1)
        right.set_ylabel(f"epsilon spent (delta {result.plan.terms.delta:g})", color="tab:orange")
        left.set_title(f"{result.plan.domain}: loss and epsilon over rounds")
    else:
        left.set_title(f"NOT PRIVATE - {result.plan.domain}: loss over rounds")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
