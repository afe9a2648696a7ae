"""Rows of JSONL, CSV and TSV files, plain or gzipped, with the line number of each.

A row that cannot be read is reported with its line and a reason, and the rest is read on: real exports have a few.
A reason never quotes the row. A file that is damaged as a whole raises.

Left out: Parquet, DOCX and PDF, which need libraries of their own; export to JSONL first.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from foedus_protocols.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
_LONGEST_OBJECT = 4 << 20  # A line of JSON that is all brackets takes forty times its size in memory.
_LONGEST_FIELD = 16 << 20
_LONGEST_ROW = 32 << 20  # Of a table: several long fields, or a quote that is never closed.


@dataclass(frozen=True, kw_only=True)
class Row:
    """One object of a file.

    Attributes:
        line: Where it starts, counted from 1.
        values: Its fields.
    """

    line: int
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A row that was passed over.

    Attributes:
        file: The file's name.
        line: Where the row starts, counted from 1.
        reason: Why, without a word of the row.
    """

    file: str
    line: int
    reason: str


def stem(path: Path | str) -> str:
    """A file's name without ``.gz`` and its format: what ``--unit NAME=FIELD`` and ``--columns`` call it."""
    name = Path(path).name
    name = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def read_rows(path: Path) -> Iterator[Row | Rejected]:
    """Read a data file row by row.

    Args:
        path: A JSONL, CSV or TSV file (UTF-8), with ``.gz`` if it is gzipped.

    Yields:
        A `Row`, or a `Rejected` where a row is not what its format says.

    Raises:
        DataError: The file is missing, of an unknown format, not gzip although it is called so, or cut short.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith(SUFFIXES):
        raise DataError(f"expected a file called *{', *'.join(SUFFIXES)} (or with .gz behind), got {path.name}")
    try:
        with path.open("rb") as raw:
            file: BinaryIO = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw  # type: ignore[assignment]
            yield from _read_json(file, path.name) if name.endswith((".jsonl", ".ndjson")) else _read_csv(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a complete gzip file, got a damaged one; copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from error


def _read_json(file: BinaryIO, name: str) -> Iterator[Row | Rejected]:
    # Lines end at b"\n" alone: `str.splitlines` would also cut at characters that are legal inside JSON strings.
    line = 0
    while data := file.readline(_LONGEST_OBJECT + 1):
        line += 1
        if len(data) > _LONGEST_OBJECT:
            while data and not data.endswith(b"\n"):
                data = file.readline(_LONGEST_OBJECT)
            yield Rejected(file=name, line=line, reason=f"longer than {_LONGEST_OBJECT >> 20} MiB")
            continue
        if line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield _json_row(data, name, line)


def _json_row(data: bytes, name: str, line: int) -> Row | Rejected:
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return Rejected(file=name, line=line, reason="not UTF-8")
    except (ValueError, RecursionError):
        return Rejected(file=name, line=line, reason="not JSON")
    if not isinstance(values, dict):
        return Rejected(file=name, line=line, reason="not a JSON object")
    return Row(line=line, values=values)


def _read_csv(file: BinaryIO, path: Path) -> Iterator[Row | Rejected]:
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise DataError(f"{path}: expected a first line of distinct column names")
        before = reader.line_num
        for fields in reader:
            lines.read = 0
            line, before = before + 1, reader.line_num
            if not fields:
                continue
            if len(fields) != len(header):
                reason = f"expected {len(header)} fields, got {len(fields)}"
                yield Rejected(file=path.name, line=line, reason=reason)
            else:
                yield Row(line=line, values=dict(zip(header, fields, strict=True)))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes after line {reader.line_num}") from error
    except csv.Error as error:
        raise DataError(f"{path}: expected quoted CSV, got a field that breaks it at line {reader.line_num}") from error


class _Lines:
    """The lines of a text, of bounded length, for `csv.reader`, which would read a file without line ends whole.

    Attributes:
        read: Characters since the last whole row.
    """

    def __init__(self, text: io.TextIOWrapper, path: Path) -> None:
        self.read = 0
        self._text = text
        self._path = path

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(_LONGEST_ROW):
            self.read += len(line)
            if self.read >= _LONGEST_ROW:
                raise DataError(
                    f"{self._path}: expected rows of less than {_LONGEST_ROW >> 20} Mi characters, got more"
                )
            yield line
