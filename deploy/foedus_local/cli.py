"""``foedus demo``: the main job in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_client.datasets.cli import shipped_base
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import UsageError
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
from foedus_local.plan import Plan, Terms, check_domain, check_terms, plan_data, plan_invented

if TYPE_CHECKING:
    from rich.console import Console

    from foedus_local.demo import Result

app = typer.Typer(help="A whole federation on this machine.")

_DOMAIN = "medical"
_INVENTED_ORGANISATIONS = 3
_SYNTHETIC_UNITS = 48  # Invented units of the first organisation, in a short run.


# What a run on random weights has in place of the defaults, where the command line says nothing.
_SHORT: dict[str, Any] = {"rounds": 2, "expected_units": 8, "max_records_per_unit": 2, "max_heldout_records": 4}


@app.command()
def demo(
    context: typer.Context,
    domain: Annotated[str | None, typer.Option(help="Invented text of clinics (medical) or law firms (legal).")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder with your own files instead: one file, one organisation.")
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", help="With --data: FIELD that is the unit, NAME=FIELD, or record."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="With --data: FILE:question=COLUMN,answer=COLUMN, or FILE:text=COLUMN."),
    ] = None,
    epsilon: EpsilonOption = 8.0,
    delta: DeltaOption = 1e-5,
    rounds: RoundsOption = 10,
    seed: Annotated[
        int, typer.Option(help="Invented text and held-out split; without privacy every draw. Never noise.")
    ] = 0,
    no_privacy: NoPrivacyOption = False,
    folder: Annotated[Path | None, typer.Option(help="Where everything goes; default: ./foedus-demo.")] = None,
    base: BaseOption = None,
    preset: Annotated[
        str | None, typer.Option(help="With --synthetic: whose shape, gpt-oss-20b, gpt-oss-120b, moe-16e-32k or tiny.")
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="RANDOM weights at the true shape of --preset, and a short run.")
    ] = False,
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
    compare: Annotated[
        bool, typer.Option("--compare", help="Then train each organisation alone and all data pooled, and compare.")
    ] = False,
    output: FormatOption = Format.text,
) -> None:
    """Run a coordinator and its organisations as separate processes, and train one adapter together."""
    from foedus_client.loading import Switches

    from foedus_local.demo import demo_folder, run_demo
    from foedus_local.report import draw

    if data is not None and domain is not None:
        raise UsageError("expected --domain or --data, got both")
    if synthetic != (preset is not None):
        raise UsageError(
            "expected --preset and --synthetic together, got one of them: a preset is a shape without weights"
        )
    if synthetic and base is not None:
        raise UsageError("expected --base or --synthetic, got both")
    terms = Terms(
        private=not no_privacy, epsilon=epsilon, delta=delta, rounds=rounds, seed=seed, max_tokens=max_tokens,
        max_records_per_unit=max_records_per_unit, expected_units=expected_units,
        max_heldout_records=max_heldout_records, rate=rate, l2_clip_norm=clip, evaluate_every=evaluate_every,
        round_seconds=round_seconds, adapter=adapter.value, layers=parse_layers(layers),
    )  # fmt: skip
    if synthetic:
        terms = replace(terms, **{name: value for name, value in _SHORT.items() if _is_default(context, name)})
    model = base or shipped_base()
    # What cannot be meant is found before an earlier demo's folder is emptied.
    Switches.read()
    if data is None:
        check_domain(domain or _DOMAIN)
    own = None if data is None else plan_data(data, unit or [], columns or [], model, terms)
    place = folder or Path("foedus-demo" if terms.private else "foedus-demo-NOT-PRIVATE")
    described = None if preset is None else _required(preset, terms, place, own)
    check_terms(terms, described or read_config(model))
    with demo_folder(place) as place:
        if described is not None:
            model = _synthetic_base(place / "base", described, terms.seed, model)
        text = {} if described is None else {"units": _SYNTHETIC_UNITS}
        plan = own or plan_invented(place / "data", domain or _DOMAIN, terms, **text)
        _announce(plan)
        result = run_demo(plan, place, model)
        draw(result, place / "coordinator", result.variant / "rounds.png")
        compared = _compared(result, place, model) if compare else {}
    emit(result.summary() | compared, output, lambda console: _show(result, compared, console))


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name.startswith("DEFAULT")


def _required(preset: str, terms: Terms, place: Path, own: Plan | None) -> dict[str, Any]:
    """The preset's configuration, once disk and memory were found to be enough."""
    from foedus_local import synthetic

    organisations = len(own.organisations) if own is not None else _INVENTED_ORGANISATIONS
    return synthetic.require(preset, terms, place, organisations=organisations)


def _synthetic_base(place: Path, described: dict[str, Any], seed: int, tokenizer_of: Path) -> Path:
    from foedus_local import synthetic

    progress_console.print(
        "  [bold]SYNTHETIC[/bold]: random weights at the true shape, NOT a trained model. Losses mean nothing.",
        highlight=False,
    )
    return synthetic.write_base(place, described, seed=seed, tokenizer_of=tokenizer_of)


def _compared(result: Result, place: Path, model: Path) -> dict[str, Any]:
    """The comparison, as one more field of the result."""
    from foedus_local.compare import compare
    from foedus_local.demo import charter_of, say

    plan = result.plan
    charter = charter_of(result, place / "coordinator")
    made = compare(charter, plan.organisations, result.variant, model, folder=place, seed=plan.terms.seed, say=say)
    return {"comparison": made}


def _show(result: Result, compared: dict[str, Any], console: Console) -> None:
    from foedus_local.report import show, show_comparison

    show(result, console)
    if compared:
        show_comparison(compared["comparison"], console)


def _announce(plan: Plan) -> None:
    """Say what is about to happen, and what would be a person's decision."""
    names = ", ".join(f"{one.org} ({one.unit})" for one in plan.organisations)
    progress_console.print(f"[bold]A federation on this machine[/bold]: {names}", highlight=False)
    progress_console.print(
        "  For the demo every organisation's policy says auto_sign = true and confirms its peers unseen; "
        "elsewhere people decide.",
        highlight=False,
    )
    if not plan.terms.private:
        progress_console.print(
            "  [bold red]NOT PRIVATE[/bold red]: clipped gradient sums leave without noise, and held-out scores too.",
            highlight=False,
        )
