"""What a model is worth on held-out units: loss a token, and answers chosen by likelihood, with intervals.

`Material` is what is measured, made once; `measure` puts one model to it; `report` sets models side by side. The loss
is that of training (answer tokens, or a text's tokens). A labelled row is right where its own option is the likeliest:
in total, and per byte of the option, since a total favours short options. The share of the most frequent label stands
beside, which is what is right without reading the question.

Statistics of the data: they stay where the data are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from foedus_model.cli_generate import NOT_PRIVATE
from foedus_model.evaluate import row_losses
from foedus_protocols.errors import DataError
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from foedus_client.datasets.harmony import Harmony, Record
from foedus_client.datasets.labels import Questions, answers
from foedus_client.datasets.load import Unit
from foedus_client.intervals import Estimate, ratio

Amounts = NDArray[np.float64]
T = TypeVar("T")


@dataclass(kw_only=True)
class Task:
    """Questions with one set of options: by question its rows (one an option), the right one, and its unit."""

    label: str
    options: tuple[str, ...]
    rows: list[list[Record]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Material:
    """Held-out rows and questions.

    Attributes:
        units: Number of each unit, by group and keyed digest.
        rows: What the loss is measured on.
        owners: The unit of each row.
        tasks: Questions, by the label's field.
    """

    units: dict[tuple[str, str], int] = field(default_factory=dict)
    rows: list[Record] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)

    def add_units(self, group: str, units: Sequence[Unit], max_records: int) -> None:
        """Take `max_records` records, as many of each unit as can be: first of all units the first, then the second."""
        records = [(unit.key_hash, record) for unit in units for record in unit.records]
        for key, record in _spread(records, lambda one: one[0], max_records):
            self.rows.append(record)
            self.owners.append(self._number(group, key))

    def add_questions(
        self, group: str, asked: Questions, harmony: Harmony, *, options: tuple[str, ...], max_tokens: int, most: int
    ) -> None:
        """Take `most` questions, as many of each unit as can be.

        Raises:
            DataError: `max_tokens` has no room for an option; no question was taken.
        """
        chosen = list(_spread(asked.asked, lambda one: one.key_hash, most))
        rows = [answers(harmony, question, asked.field, options, max_tokens) for question in chosen]
        task = self.tasks.setdefault(asked.field, Task(label=asked.field, options=options))
        task.rows.extend(rows)
        for question in chosen:
            task.right.append(options.index(question.label))
            task.owners.append(self._number(group, question.key_hash))

    def of_group(self, group: str) -> NDArray[np.bool_]:
        """Which units belong to a group.  # bool (U,)"""
        return np.array([name == group for name, _ in self.units], np.bool_)

    def _number(self, group: str, key: str) -> int:
        return self.units.setdefault((group, key), len(self.units))


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """By unit: questions, and how many were right by total likelihood and by likelihood per byte.  # (U,)"""

    asked: Amounts
    right: Amounts
    right_per_byte: Amounts


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One model on a material: by unit, nats and tokens (U,), and the answers to each task."""

    nats: Amounts
    tokens: Amounts
    answers: dict[str, Answers]


def measure(model: Any, material: Material, on_step: Callable[[], None] = lambda: None) -> Measured:
    """Put a model to the material.

    Raises:
        DataError: There is nothing to measure.
    """
    if not material.rows and not material.tasks:
        raise DataError("expected held-out records or labelled rows to measure, got none: give a file with more units")
    units = len(material.units)
    found = row_losses(model, material.rows)
    on_step()
    answered = {}
    for name, task in material.tasks.items():
        answered[name] = _answered(model, task, units)
        on_step()
    return Measured(
        nats=_by_unit(found.nats, material.owners, units),
        tokens=_by_unit(found.tokens, material.owners, units),
        answers=answered,
    )


def report(measured: Mapping[str, Measured], material: Material, *, seed: int = 0) -> dict[str, Any]:
    """Models side by side, the first of which is what the others are compared with.

    Args:
        measured: By a model's name.
        material: What they were measured on.
        seed: Of the bootstrap's draws.
    """
    first = next(iter(measured.values()))
    return {
        "units": len(material.units),
        "records": len(material.rows),
        "tokens": int(first.tokens.sum()),
        "tasks": {
            name: {
                "options": list(task.options),
                "questions": len(task.right),
                "majority": max(task.right.count(one) for one in range(len(task.options))) / len(task.right),
            }
            for name, task in material.tasks.items()
        },
        "models": {name: _of_model(one, None if one is first else first, seed) for name, one in measured.items()},
        "interval": "95 %, bootstrap over units",
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a report, with ``private`` of the variant (None without one), as a table."""
    if result["private"] is False:
        console.print(f"[bold red]{NOT_PRIVATE}[/bold red]", soft_wrap=True)
    tasks = result["tasks"]
    heads = ["", "loss a token (nats)", "against the first"]
    for name in tasks:
        heads += [f"{name}: right", "per byte"]
    table = Table(*heads, box=None)
    for name, one in result["models"].items():
        cells = [name, text(one["loss"]), text(one["loss_difference"], sign=True)]
        for task in tasks:
            found = one["accuracy"][task]
            cells += [text(found["likelihood"], percent=True), text(found["likelihood_per_byte"], percent=True)]
        table.add_row(*cells)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{result['units']} units, {result['records']} records, {result['tokens']} tokens; {result['interval']}",
        highlight=False,
    )
    for name, task in tasks.items():
        console.print(
            f"{name}: {task['questions']} questions, {len(task['options'])} options; always the most frequent one "
            f"would be right in {task['majority']:.1%}",
            markup=False, highlight=False,
        )  # fmt: skip


def text(estimate: Mapping[str, float | None] | None, *, sign: bool = False, percent: bool = False) -> str:
    """An estimate for people: ``value [low, high]``."""
    if estimate is None:
        return "-"
    form = ("+" if sign else "") + (".1%" if percent else ".4f")
    shown = format(estimate["value"], form)
    if estimate["low"] is None:
        return shown
    return f"{shown} [{format(estimate['low'], form)}, {format(estimate['high'], form)}]"


def as_dict(estimate: Estimate | None) -> dict[str, float | None] | None:
    """For JSON."""
    return None if estimate is None else asdict(estimate)


def _spread(items: Sequence[T], unit: Callable[[T], str], most: int) -> list[T]:
    """`most` of the items, of every unit the first before of any the second."""
    seen: Counter[str] = Counter()
    rounds = []
    for place, item in enumerate(items):
        rounds.append((seen[unit(item)], place))
        seen[unit(item)] += 1
    return [items[place] for _, place in sorted(rounds)[:most]]


def _of_model(one: Measured, base: Measured | None, seed: int) -> dict[str, Any]:
    difference = None if base is None else ratio(one.nats, one.tokens, minus=base.nats, seed=seed)
    return {
        "loss": as_dict(ratio(one.nats, one.tokens, seed=seed)),
        "loss_difference": as_dict(difference),
        "accuracy": {
            name: {
                "likelihood": as_dict(ratio(found.right, found.asked, seed=seed)),
                "likelihood_per_byte": as_dict(ratio(found.right_per_byte, found.asked, seed=seed)),
            }
            for name, found in one.answers.items()
        },
    }


def _answered(model: Any, task: Task, units: int) -> Answers:
    nats = row_losses(model, [row for rows in task.rows for row in rows]).nats
    nats = nats.reshape(len(task.rows), len(task.options))  # (questions, options)
    sizes = np.array([len(option.encode()) for option in task.options], np.float64)  # (options,)
    right = np.array(task.right)
    return Answers(
        asked=_by_unit(np.ones(len(right)), task.owners, units),
        right=_by_unit(nats.argmin(axis=1) == right, task.owners, units),
        right_per_byte=_by_unit((nats / sizes).argmin(axis=1) == right, task.owners, units),
    )


def _by_unit(values: NDArray[Any], owners: Sequence[int], units: int) -> Amounts:
    sums = np.bincount(np.asarray(owners, np.int64), weights=values.astype(np.float64), minlength=units)
    return sums.astype(np.float64)  # Counts are whole numbers where there is no owner at all.
