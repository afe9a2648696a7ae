from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import pytest
from foedus_protocols import store as store_module
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.store import CHUNK_BYTES, FileStore

DATA = os.urandom(CHUNK_BYTES * 2 + 12345)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def leftovers(store: FileStore) -> list[str]:
    return [path.name for path in (store.root / "parts").iterdir()]


@pytest.mark.parametrize("move", [False, True])
def test_put_names_by_digest(store, tmp_path, move):
    source = tmp_path / "vector"
    source.write_bytes(DATA)
    assert store.put(source, move=move) == DIGEST
    assert source.exists() is not move
    assert store.path(DIGEST).read_bytes() == DATA
    assert leftovers(store) == []


def test_bytes_and_absence(store):
    digest = store.put_bytes(b"terms")
    assert digest == hashlib.sha256(b"terms").hexdigest()
    assert store.put_bytes(b"terms") == digest
    assert store.read(digest) == b"terms"
    with pytest.raises(VerificationError):
        store.read(digest, max_bytes=4)
    assert not store.has(DIGEST)
    with pytest.raises(StateError):
        store.path(DIGEST)
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_name_that_is_no_digest_touches_nothing(store, name):
    for touch in (store.has, store.path, store.delete, store.received, lambda name: store.open_part(name, 1)):
        with pytest.raises(VerificationError):
            touch(name)


def test_a_part_becomes_the_file(store):
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA)
        assert not store.has(DIGEST)
        assert part.finish() == store.path(DIGEST)
    assert store.path(DIGEST).read_bytes() == DATA
    assert leftovers(store) == []
    with store.open_part(DIGEST, len(DATA)) as again:  # Held already: nothing more is asked for.
        assert again.complete
        assert again.finish() == store.path(DIGEST)
    with pytest.raises(VerificationError, match="announced size"):
        store.open_part(DIGEST, len(DATA) + 1)


def test_a_broken_part_resumes_at_a_whole_chunk(store):
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[: CHUNK_BYTES + 77])
        with pytest.raises(VerificationError, match="ended at"):
            part.finish()
    assert store.received(DIGEST) == CHUNK_BYTES
    with FileStore(store.root).open_part(DIGEST, len(DATA)) as part:  # After a restart.
        assert part.offset == CHUNK_BYTES
        part.write(DATA[part.offset :])
        part.finish()
    assert store.path(DIGEST).read_bytes() == DATA


def test_a_part_whose_data_was_lost_is_thrown_away(store):
    """After a power cut the file's length may run ahead of its data: zeros where bytes were."""
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[:CHUNK_BYTES])
    (store.root / "parts" / f"{DIGEST}.part").write_bytes(bytes(CHUNK_BYTES))
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[CHUNK_BYTES:])
        with pytest.raises(VerificationError, match="digest"):
            part.finish()
    assert store.received(DIGEST) == 0
    assert not store.has(DIGEST)


def test_more_than_announced_is_refused_before_it_is_written(store):
    with store.open_part(DIGEST, 10) as part:
        part.write(DATA[:10])
        with pytest.raises(VerificationError, match="got more"):
            part.write(b"x")
    assert (store.root / "parts" / f"{DIGEST}.part").stat().st_size == 10


def test_the_newer_connection_wins(store):
    older = store.open_part(DIGEST, len(DATA))
    older.write(DATA[:CHUNK_BYTES])
    with store.open_part(DIGEST, len(DATA)) as newer:
        assert newer.offset == CHUNK_BYTES
        with pytest.raises(StateError, match="took over"):
            older.write(DATA[CHUNK_BYTES:])
        older.close()
        newer.write(DATA[CHUNK_BYTES:])
        newer.finish()
    assert store.path(DIGEST).read_bytes() == DATA


def test_file_and_name_are_synced_before_finish_returns(store, monkeypatch):
    events: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("file"), real(descriptor)))
    monkeypatch.setattr(store_module, "sync_folder", lambda folder: events.append(folder.name))
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA)
        part.finish()
    assert events.index("file") < events.index(DIGEST[:2])


class Grudging:
    """A file that takes few bytes at a time, and none once its disk is full."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: bytes) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(data[: min(1000, self._room)])
        self._room -= taken
        return taken

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_a_disk_that_takes_few_bytes_at_a_time_loses_none(store: FileStore) -> None:
    with store.open_part(DIGEST, len(DATA)) as part:
        part._file = Grudging(part._file, len(DATA))
        for start in range(0, len(DATA), CHUNK_BYTES):
            part.write(DATA[start : start + CHUNK_BYTES])
        assert part.finish().read_bytes() == DATA


def test_a_full_disk_ends_a_part_which_resumes_when_there_is_room(store: FileStore) -> None:
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[:CHUNK_BYTES])
        part._file = Grudging(part._file, 4000)
        with pytest.raises(DiskTrouble, match="disk is full"):
            part.write(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
        with pytest.raises(StateError, match="open part"):
            part.write(DATA[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert not store.has(DIGEST)
    with store.open_part(DIGEST, len(DATA)) as part:
        assert part.offset == CHUNK_BYTES
        part.write(DATA[CHUNK_BYTES:])
        assert part.finish().read_bytes() == DATA


@pytest.mark.parametrize("move", [False, True])
def test_a_full_disk_takes_nothing_in(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: bool
) -> None:
    source = tmp_path / "vector"
    source.write_bytes(DATA)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(DiskTrouble):
        store.put(source, move=move)
    with pytest.raises(DiskTrouble):
        store.put_bytes(DATA)
    assert not store.has(DIGEST)
    assert leftovers(store) == []


def test_leftovers_of_old_transfers_go_and_others_stay(store: FileStore) -> None:
    old, kept, fresh = ("a" * 64, "b" * 64, "c" * 64)
    for digest in (old, kept, fresh):
        with store.open_part(digest, 10) as part:
            part.write(b"12345")
    for digest in (old, kept):
        os.utime(store.root / "parts" / f"{digest}.part", (1.0, 1.0))
    with store.open_part("d" * 64, 10) as part:
        os.utime(store.root / "parts" / f"{'d' * 64}.part", (1.0, 1.0))
        assert store.drop_parts(older_than_seconds=3600.0, keep=frozenset({kept})) == 1
        part.write(b"1234567890"[:5])
    assert sorted(leftovers(store)) == [f"{digest}.part" for digest in (kept, fresh, "d" * 64)]


def test_a_file_whose_digest_is_known_is_taken_as_it_is(store: FileStore) -> None:
    source = store.root / "sum.part"
    source.write_bytes(DATA)
    assert store.adopt(source, DIGEST) == store.path(DIGEST)
    assert store.path(DIGEST).read_bytes() == DATA
    assert not source.exists()
    with pytest.raises(VerificationError):
        store.adopt(source, "../elsewhere")
