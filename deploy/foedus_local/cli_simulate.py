"""``foedus simulate``: many virtual organisations under Flower's simulation engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from foedus_client.datasets.cli import shipped_base
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.layout import parse_layers
from foedus_protocols.manifest import read_config

from foedus_local.options import (
    Adapted,
    AdapterOption,
    BaseOption,
    ClipOption,
    DeltaOption,
    EpsilonOption,
    EvaluateEveryOption,
    ExpectedUnitsOption,
    LayersOption,
    MaxHeldoutRecordsOption,
    MaxRecordsPerUnitOption,
    MaxTokensOption,
    NoPrivacyOption,
    RateOption,
    RoundSecondsOption,
    RoundsOption,
)
from foedus_local.plan import LEAST_ORGANISATIONS, Terms, check_terms, plan_split, read_deal

app = typer.Typer(help="A federation of virtual organisations, for studies.")


@app.command()
def simulate(
    data: Annotated[list[Path], typer.Option("--data", help="The data files: one, or several behind it.")],
    unit: Annotated[list[str], typer.Option("--unit", help="FIELD that is the privacy unit, NAME=FIELD, or record.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further data files.")] = None,
    orgs: Annotated[
        int, typer.Option(min=LEAST_ORGANISATIONS, help="How many organisations; whole units are dealt out to them.")
    ] = 10,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="FILE:question=COLUMN,answer=COLUMN, or FILE:text=COLUMN."),
    ] = None,
    epsilon: EpsilonOption = 8.0,
    delta: DeltaOption = 1e-5,
    rounds: RoundsOption = 10,
    seed: Annotated[int, typer.Option(help="Deal and held-out split; without privacy every draw. Never noise.")] = 0,
    no_privacy: NoPrivacyOption = False,
    actors: Annotated[int | None, typer.Option(min=1, help="Virtual workers at a time; default: one a core.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where everything goes; default: ./foedus-simulation.")] = None,
    base: BaseOption = None,
    adapter: AdapterOption = Adapted.attention,
    layers: LayersOption = None,
    max_tokens: MaxTokensOption = 256,
    max_records_per_unit: MaxRecordsPerUnitOption = 4,
    expected_units: ExpectedUnitsOption = 64,
    max_heldout_records: MaxHeldoutRecordsOption = 100,
    rate: RateOption = 0.02,
    clip: ClipOption = 0.15,
    evaluate_every: EvaluateEveryOption = 1,
    round_seconds: RoundSecondsOption = 1800.0,
    output: FormatOption = Format.text,
) -> None:
    """Deal files out to virtual organisations by unit, and train one adapter together under Flower's engine."""
    from foedus_local.demo import demo_folder
    from foedus_local.report import draw, show
    from foedus_local.simulate import simulate as run_simulation

    terms = Terms(
        private=not no_privacy, epsilon=epsilon, delta=delta, rounds=rounds, seed=seed, max_tokens=max_tokens,
        max_records_per_unit=max_records_per_unit, expected_units=expected_units,
        max_heldout_records=max_heldout_records, rate=rate, l2_clip_norm=clip, evaluate_every=evaluate_every,
        round_seconds=round_seconds, adapter=adapter.value, layers=parse_layers(layers),
    )  # fmt: skip
    model = base or shipped_base()
    # What cannot be meant is found before an earlier simulation's folder is emptied.
    check_terms(terms, read_config(model))
    deal = read_deal([*data, *(more or [])], orgs, unit, columns or [])
    default = Path("foedus-simulation" if terms.private else "foedus-simulation-NOT-PRIVATE")
    with demo_folder(folder or default) as place:
        plan = plan_split(deal, orgs, place / "data", model, terms)
        progress_console.print(
            f"[bold]A simulated federation[/bold]: {orgs} organisations, unit {plan.unit}; one process plays them all",
            highlight=False,
        )
        result = run_simulation(plan, place, model, actors=actors or os.cpu_count() or 1)
        draw(result, place / "coordinator", result.variant / "rounds.png")
    emit(result.summary(), output, lambda console: show(result, console))
