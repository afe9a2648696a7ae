"""``foedus model evaluate``: held-out loss and answers by likelihood, of a base or a variant."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_protocols.charter import check_length
from foedus_protocols.console import Format, FormatOption, emit, progress_console
from foedus_protocols.errors import DataError, UsageError
from foedus_protocols.manifest import TOKENIZER_FILE, read_config

from foedus_client.datasets.cli import shipped_base
from foedus_client.datasets.units import RECORD, Columns, Units, parse_columns, parse_units

if TYPE_CHECKING:
    from foedus_client.evaluate import Material, Measured

_GROUP = ""  # All units belong together.


def evaluate(
    data: Annotated[
        list[Path], typer.Option(help="Held-out text: JSONL, CSV or TSV, plain or gzipped; may be given several times.")
    ],
    variant: Annotated[Path | None, typer.Option(help="A variant folder; the base alone without.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model; default: the small one that comes along.")] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", help="FIELD that is one person or matter, NAME=FIELD, or record (the default)."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="FILE:question=COLUMN,context=COLUMN,answer=COLUMN, or FILE:text=COLUMN."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The field whose values are the options; label and role are recognised.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longest record.")] = 256,
    max_records: Annotated[int, typer.Option(min=1, help="At most so many records, and so many questions.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals' draws.")] = 0,
    output: FormatOption = Format.text,
) -> None:
    """Measure a base or a variant on text that neither was trained on.

    Held-out loss a token, and where rows carry a label how often the right option is the likeliest, with 95 % intervals
    by bootstrap over units. A variant is measured beside its base.
    """
    from foedus_client.evaluate import report, show

    if len({path.name for path in data}) != len(data):
        raise UsageError("expected files of different names, got two of one name: rename one")
    place = base or shipped_base()
    units, mapped = parse_units(unit or [RECORD]), parse_columns(columns or [])
    material = _material(data, units, mapped, place, label=label, max_tokens=max_tokens, max_records=max_records)
    measured, private = _measure(place, variant, material)
    result: dict[str, Any] = {
        **report(measured, material, seed=seed),
        "base": str(place),
        "variant": None if variant is None else str(variant),
        "private": private,
    }
    emit(result, output, lambda console: show(result, console))


def _material(
    files: list[Path],
    units: Units,
    columns: Columns,
    base: Path,
    *,
    label: str | None,
    max_tokens: int,
    max_records: int,
) -> Material:
    """All units of the files: whoever calls this says that nothing of them was trained on."""
    from foedus_client.datasets.harmony import Harmony
    from foedus_client.datasets.labels import read_questions
    from foedus_client.datasets.load import load_dataset
    from foedus_client.evaluate import Material

    check_length(max_tokens, read_config(base))
    # Fixed, so that the same units are taken each time where --max-records leaves some out.
    split_key = hashlib.sha256(b"foedus/evaluate").digest()
    loaded = load_dataset(
        files,
        units=units,
        columns=columns,
        tokenizer_path=base / TOKENIZER_FILE,
        max_tokens=max_tokens,
        max_records_per_unit=1,
        split_key=split_key,
    )
    material = Material()
    both = sorted([*loaded.train, *loaded.heldout], key=lambda one: one.key_hash)
    material.add_units(_GROUP, both, max_records)
    harmony = Harmony.from_file(base / TOKENIZER_FILE)
    for asked in read_questions(files, units=units, columns=columns, split_key=split_key, field=label):
        try:
            material.add_questions(
                _GROUP, asked, harmony, options=asked.options, max_tokens=max_tokens, most=max_records
            )
        except DataError as error:
            if label is not None:
                raise
            progress_console.print(f"  no question of {asked.field} is asked: {error}", highlight=False, markup=False)
    return material


def _measure(base: Path, variant: Path | None, material: Material) -> tuple[dict[str, Measured], bool | None]:
    """The base, and the variant beside it."""
    from foedus_model.generate import load_as_switched

    from foedus_client.evaluate import measure

    found = {}
    private = None
    for name, folder in (("base", None), *((("variant", variant),) if variant is not None else ())):
        progress_console.print(f"  measuring the {name}", highlight=False)
        with closing(load_as_switched(base, folder)) as generator:
            private = generator.private
            found[name] = measure(generator.model, material)
    return found, private
