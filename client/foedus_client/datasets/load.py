"""Files to privacy units: what training reads, and what ``foedus data check`` reports.

Everything is read into memory, since a unit's records may lie anywhere in several files; an organisation's text is
small beside a base model. Units come in the order of their keyed digests, which says nothing about the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foedus_protocols.errors import DataError, UsageError

from foedus_client.datasets.formats import PlainText, RowError, parse_row
from foedus_client.datasets.harmony import Harmony, Record
from foedus_client.datasets.readers import Rejected, Row, read_rows, stem
from foedus_client.datasets.units import Columns, Units, check_names, is_held_out, key_hash, unit_field, unit_key

_SMALLEST_RECORD = 16
_MOST_REJECTED = 10_000


@dataclass(frozen=True, kw_only=True)
class Unit:
    """All records of one privacy unit.

    Attributes:
        key_hash: The unit's keyed digest.
        records: At least one. A step takes at most ``max_records_per_unit`` of them, chosen afresh.
    """

    key_hash: str
    records: list[Record]


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """A record that was shortened to ``kept`` of its ``length`` tokens."""

    file: str
    line: int
    length: int
    kept: int


@dataclass(kw_only=True)
class Report:
    """What was read. Statistics of the data: they stay in the organisation.

    Attributes:
        rows: Rows by file name, rejected ones included.
        truncated: Records that did not fit.
        rejected: Rows that were passed over.
        records: Training examples, held-out ones included.
        tokens: Their tokens.
        answer_tokens: Those of them that carry loss.
        units: Privacy units.
        largest_unit: Records of the largest unit.
        units_over_cap: Units with more records than a step may take.
        records_over_cap: How many records these have in excess: a step leaves as many out.
    """

    rows: dict[str, int] = field(default_factory=dict)
    truncated: list[Truncated] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    records: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    units: int = 0
    largest_unit: int = 0
    units_over_cap: int = 0
    records_over_cap: int = 0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The units of some files.

    Attributes:
        train: Units to train on.
        heldout: Units to measure on.
        report: What was read.
    """

    train: list[Unit]
    heldout: list[Unit]
    report: Report


@dataclass(kw_only=True)
class _Gathered:
    """A unit while files are read: finished chats, and texts that wait to be joined."""

    records: list[Record] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def load_dataset(
    files: Sequence[Path],
    *,
    units: Units,
    columns: Columns,
    tokenizer_path: Path,
    max_tokens: int,
    max_records_per_unit: int,
    split_key: bytes,
) -> Dataset:
    """Read files into training and held-out units.

    Args:
        files: JSONL, CSV or TSV files, plain or gzipped.
        units: Which field is the privacy unit.
        columns: By file name, which column plays which role; files that are not named are recognised.
        tokenizer_path: The base's ``tokenizer.json``.
        max_tokens: Longest record. A chat is shortened to it, a text is cut into windows of it.
        max_records_per_unit: Most records of a unit that a step takes; here it enters the report alone.
        split_key: The unit namespace's key; it decides what is held out.

    Returns:
        The units, those of a unit's plain-text records joined in file order before they were cut.

    Raises:
        DataError: A file cannot be read, or holds no usable row.
        UsageError: The unit of a file was not said, or a setting names a file that is not there.
    """
    if max_tokens < _SMALLEST_RECORD or max_records_per_unit < 1:
        raise UsageError(
            f"expected at least {_SMALLEST_RECORD} tokens a record and 1 record a unit, "
            f"got {max_tokens} and {max_records_per_unit}"
        )
    if not files:
        raise UsageError("expected at least one data file, got none")
    check_names(files, units, columns)
    harmony = Harmony.from_file(tokenizer_path)
    report = Report()
    gathered: dict[str, _Gathered] = {}
    for path in files:
        _read_file(path, units, columns, harmony, max_tokens, gathered, report)
    finished = _finish(gathered, harmony, max_tokens, split_key)
    _count(report, finished, max_records_per_unit)
    return Dataset(
        train=[unit for unit in finished if not is_held_out(unit.key_hash)],
        heldout=[unit for unit in finished if is_held_out(unit.key_hash)],
        report=report,
    )


def _read_file(
    path: Path,
    units: Units,
    columns: Columns,
    harmony: Harmony,
    max_tokens: int,
    gathered: dict[str, _Gathered],
    report: Report,
) -> None:
    """Add a file's rows to their units."""
    unit = unit_field(units, path)
    rows = usable = 0
    for row in read_rows(path):
        rows += 1
        if isinstance(row, Rejected):
            _reject(row, path, report, rows=rows, usable=usable)
            continue
        try:
            record = parse_row(row.values, columns.get(stem(path)))
            key = unit_key(row.values, unit)
            target = gathered.get(key) or _Gathered()
            if isinstance(record, PlainText):
                target.texts.append(record.text)
            else:
                encoded, length = harmony.chat(record, max_tokens=max_tokens)
                target.records.append(encoded)
                _note_truncation(path, row, encoded, length, report)
        except RowError as error:
            _reject(Rejected(file=path.name, line=row.line, reason=str(error)), path, report, rows=rows, usable=usable)
            continue
        gathered[key] = target
        usable += 1
    report.rows[path.name] = rows
    if not usable:
        first = next((item for item in report.rejected if item.file == path.name), None)
        found = f"none of its {rows} rows is usable (line {first.line}: {first.reason})" if first else "it is empty"
        raise DataError(f"{path}: {found}; correct the file or say with --columns and --unit what its columns are")


def _reject(row: Rejected, path: Path, report: Report, *, rows: int, usable: int) -> None:
    """Pass over a row.

    Raises:
        DataError: Most rows so far are unusable: not a file with flaws but another file, and a list without end.
    """
    report.rejected.append(row)
    if rows - usable > _MOST_REJECTED + usable:
        raise DataError(
            f"{path}: more rows are unusable than usable, over {_MOST_REJECTED:,} of them so far (line {row.line}: "
            f"{row.reason}); correct the file or say with --columns and --unit what its columns are"
        )


def _note_truncation(path: Path, row: Row, record: Record, length: int, report: Report) -> None:
    if len(record.tokens) < length:
        report.truncated.append(Truncated(file=path.name, line=row.line, length=length, kept=len(record.tokens)))


def _finish(gathered: dict[str, _Gathered], harmony: Harmony, max_tokens: int, split_key: bytes) -> list[Unit]:
    """Join and cut the texts, and replace each unit's key by its digest."""
    finished = []
    for key, unit in gathered.items():
        records = unit.records
        if unit.texts:
            records = [*records, *harmony.windows("\n".join(unit.texts), max_tokens=max_tokens)]
        finished.append(Unit(key_hash=key_hash(split_key, key), records=records))
    return sorted(finished, key=lambda unit: unit.key_hash)


def _count(report: Report, units: Sequence[Unit], cap: int) -> None:
    sizes = [len(unit.records) for unit in units]
    report.units = len(units)
    report.records = sum(sizes)
    report.tokens = sum(len(record.tokens) for unit in units for record in unit.records)
    report.answer_tokens = sum(int(record.loss_mask.sum()) for unit in units for record in unit.records)
    report.largest_unit = max(sizes, default=0)
    report.units_over_cap = sum(size > cap for size in sizes)
    report.records_over_cap = sum(max(0, size - cap) for size in sizes)
