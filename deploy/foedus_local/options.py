"""The options that `foedus demo` and `foedus simulate` share: above all the free terms of a charter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Adapted(StrEnum):
    """What an adapter can be put on, under the charter's names."""

    attention = "attention"
    shared = "experts-shared"
    experts = "experts"


AdapterOption = Annotated[
    Adapted, typer.Option(help="What is adapted: attention, a layer's experts by one pair, or each expert by its own.")
]
LayersOption = Annotated[str | None, typer.Option(help="Adapted layers, such as 0,2; default: all.")]
EpsilonOption = Annotated[float, typer.Option(help="What one unit may lose.")]
DeltaOption = Annotated[float, typer.Option(help="At most 1/(10 x units) of every organisation.")]
RoundsOption = Annotated[int, typer.Option(help="Rounds.")]
NoPrivacyOption = Annotated[bool, typer.Option("--no-privacy", help="No noise. What comes out is NOT PRIVATE.")]
BaseOption = Annotated[Path | None, typer.Option(help="The base model's folder; default: the shipped tiny.")]
MaxTokensOption = Annotated[int, typer.Option(help="Longest record.")]
MaxRecordsPerUnitOption = Annotated[int, typer.Option(help="Records of one unit in a step.")]
ExpectedUnitsOption = Annotated[int, typer.Option(help="Expected units of one organisation a round, at most.")]
MaxHeldoutRecordsOption = Annotated[int, typer.Option(help="Held-out records of one organisation.")]
RateOption = Annotated[float, typer.Option(help="Learning rate of Adam on the sum.")]
ClipOption = Annotated[float, typer.Option(help="Bound on one unit's gradient.")]
EvaluateEveryOption = Annotated[int, typer.Option(help="Rounds between held-out scores.")]
RoundSecondsOption = Annotated[float, typer.Option(help="Deadline of a round.")]
