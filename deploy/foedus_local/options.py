"""The options that `foedus demo` and `foedus simulate` share: above all the free terms of a charter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
