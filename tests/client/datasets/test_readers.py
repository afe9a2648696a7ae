"""Rows, line numbers, and what is said about rows that cannot be read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from foedus_client.datasets import readers
from foedus_client.datasets.readers import Rejected, Row, read_rows, stem
from foedus_protocols.errors import DataError


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_jsonl_rows_carry_their_line(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\r\n{"text": "three"}')
    assert list(read_rows(path)) == [
        Row(line=1, values={"text": "one"}),
        Row(line=3, values={"text": "two"}),
        Row(line=4, values={"text": "three"}),
    ]


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    path = _write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    assert list(read_rows(path)) == [Row(line=1, values={"text": text})]


def test_bad_rows_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [b'{"text": "secret"', b'["secret"]', b'{"text": "\xff"}', b"[" * 100_000, b'{"text": "good"}']
    path = _write(tmp_path / "a.jsonl", b"\n".join(lines))
    found = list(read_rows(path))
    assert [(row.line, row.reason) for row in found if isinstance(row, Rejected)] == [
        (1, "not JSON"),
        (2, "not a JSON object"),
        (3, "not UTF-8"),
        (4, "not JSON"),
    ]
    assert found[-1] == Row(line=5, values={"text": "good"})
    assert "secret" not in repr(found)


def test_a_line_of_brackets_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    """Found by fuzzing: an empty list of two bytes takes sixty."""
    path = _write(tmp_path / "a.jsonl", b"[" + b"[]," * (2 << 20) + b'[]]\n{"text": "good"}\n')
    tracemalloc.start()
    found = list(read_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[1:] == [Row(line=2, values={"text": "good"})]
    assert peak < 32 << 20


def test_an_endless_line_is_one_rejected_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl.gz", b"x" * (33 << 20) + b'\n{"text": "good"}\n')
    found = list(read_rows(path))
    assert found == [
        Rejected(file="a.jsonl.gz", line=1, reason="longer than 4 MiB"),
        Row(line=2, values={"text": "good"}),
    ]


def test_csv_counts_lines_through_quoted_breaks(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv.gz", b'\xef\xbb\xbfid,text\n1,"two\nlines, and a ""quote"""\n2\n3,plain\n')
    assert list(read_rows(path)) == [
        Row(line=2, values={"id": "1", "text": 'two\nlines, and a "quote"'}),
        Rejected(file="a.csv.gz", line=4, reason="expected 2 fields, got 1"),
        Row(line=5, values={"id": "3", "text": "plain"}),
    ]


@pytest.mark.parametrize("row", [b"a," + b"x" * 2000, b'a,"' + b"x\n" * 1000, b'"' + b'y","' * 500])
def test_a_table_is_not_read_whole_for_a_row_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes
) -> None:
    monkeypatch.setattr(readers, "_LONGEST_ROW", 1000)
    path = tmp_path / "a.csv"
    path.write_bytes(b"p,q\n" + b"1,2\n" * 1000 + row)
    rows = read_rows(path)
    assert all(isinstance(next(rows), Row) for _ in range(1000))
    with pytest.raises(DataError, match="characters"):
        next(rows)


def test_tsv(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", b"id\ttext\n1\ta, b\n")
    assert list(read_rows(path)) == [Row(line=2, values={"id": "1", "text": "a, b"})]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"PAR1", r"expected a file called \*\.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], "damaged"),
        ("b.jsonl.gz", b'{"text": "x"}\n', "damaged"),
        ("a.csv", b"", "distinct column names"),
        ("b.csv", b"a,a\n1,2\n", "distinct column names"),
        ("c.csv", b"a,b\n\xff,2\n", "expected UTF-8"),
        ("d.csv", b'a,b\n"1"x,2\n', "quoted CSV"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(read_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("x/gard.jsonl.gz", "gard"),
        ("gard.csv", "gard"),
        ("gard", "gard"),
        ("a.b.tsv", "a.b"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_stem(path: str, name: str) -> None:
    assert stem(path) == name
