"""A disk that does not do its part: one error that says what to do, and nothing half written."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from foedus_protocols import files
from foedus_protocols.errors import StateError
from foedus_protocols.files import DiskTrouble, disk_errors, write_durably

pytestmark = pytest.mark.unit

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskTrouble, match="free some space"),
        disk_errors(tmp_path),
        FULL.open("wb", buffering=0) as disk,
    ):
        disk.write(b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_each_trouble_of_a_disk_says_where(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskTrouble, match=str(tmp_path)) as trouble, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in str(trouble.value)
    assert trouble.value.exit_code == StateError.exit_code


def test_what_is_no_trouble_of_the_disk_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


def test_a_database_that_is_full_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE t (v BLOB)")
        database.execute("PRAGMA max_page_count = 3")
        with pytest.raises(DiskTrouble, match="free some space"), disk_errors(path):
            database.execute("INSERT INTO t VALUES (zeroblob(100000))")
        database.execute("PRAGMA query_only = 1")
        with pytest.raises(DiskTrouble, match="cannot be written"), disk_errors(path):
            database.execute("INSERT INTO t VALUES (1)")
    path.write_bytes(b"not a database at all" * 100)
    with closing(sqlite3.connect(path)) as database, pytest.raises(DiskTrouble, match="damaged"), disk_errors(path):
        database.execute("SELECT * FROM t")


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "policy.toml"
    write_durably(path, b"old")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(DiskTrouble, match="disk is full"):
        write_durably(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["policy.toml"]
    assert path.read_bytes() == b"old"
