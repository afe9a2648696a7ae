from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from foedus_protocols import store as store_module
from foedus_protocols.errors import StateError, VerificationError
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
