"""``foedus client privacy``: what may still be done with a budget before anybody drafts a charter, and the ledger."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from foedus_protocols import accounting
from foedus_protocols.console import Format, FormatOption, emit

from foedus_client.cli_ledger import ledger_app

privacy_app = typer.Typer(no_args_is_help=True, help="Budgets: what a run would cost, and what was spent.")
privacy_app.add_typer(ledger_app, name="ledger")


@privacy_app.callback()
def _privacy() -> None:
    """Budgets: what a run would cost, and what was spent."""


@privacy_app.command()
def plan(
    delta: Annotated[float, typer.Option(help="At most 1/(10 x units-at-most).")] = 1e-5,
    epsilon: Annotated[float | None, typer.Option(help="What one unit may lose.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise over the clip.")] = None,
    sampling_prob: Annotated[float | None, typer.Option(help="Probability that a unit takes part in a step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps: one a round.")] = None,
    output: FormatOption = Format.text,
) -> None:
    """Give three of epsilon, noise multiplier, sampling probability and steps; the fourth is found.

    Two figures of epsilon are shown: PLD, by which the first charter of a namespace is judged, and RDP, by which later
    ones are.
    """
    found = accounting.plan(
        delta=delta, epsilon=epsilon, noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps
    )
    event = accounting.Event(
        noise_multiplier=found.noise_multiplier, sampling_prob=found.sampling_prob, steps=found.steps
    )
    result = {**asdict(found), "epsilon_rdp": accounting.epsilon_rdp([event], delta)}
    lines = "\n".join(f"{name:18} {value:g}" for name, value in result.items())
    emit(result, output, lambda console: console.print(lines, markup=False, highlight=False))
