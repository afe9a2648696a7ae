"""Files named by their SHA-256: vectors, sums, adapters, charters.

A file enters whole (`put`) or piece by piece from a connection that may break (`open_part`); either way it appears
under its digest only when every byte is on the disk and the digest is right. Whoever acknowledges a file after that
loses nothing in a crash. One process owns a store; a second one would resume the same parts.

A disk that is full, read-only or broken shows as `files.DiskTrouble`; what was received before it stays for a resume.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.files import disk_errors, sync_folder, write_durably

CHUNK_BYTES = 1 << 20  # Offsets of resumed transfers are multiples of this, and so is what is read at once.
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str) -> None:
    """Refuse a name that is not a digest: it becomes part of a path.

    Raises:
        VerificationError: Not 64 lower-case hexadecimal characters.
    """
    if not _DIGEST.fullmatch(digest):
        raise VerificationError(f"expected a SHA-256 digest of 64 hexadecimal characters, got {len(digest)} characters")


class FileStore:
    """Content-addressed files under one folder, which is made where it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parts = root / "parts"
        with disk_errors(root):
            self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._open: dict[str, Part] = {}

    def path(self, digest: str) -> Path:
        """The file of this digest.

        Raises:
            VerificationError: Not a digest.
            StateError: The store does not hold it.
        """
        path = self._place(digest)
        if not path.is_file():
            raise StateError(f"expected file {digest} in the store at {self.root}, it is not there")
        return path

    def has(self, digest: str) -> bool:
        """Whether the store holds this file in full."""
        return self._place(digest).is_file()

    def read(self, digest: str, *, max_bytes: int = CHUNK_BYTES) -> bytes:
        """All bytes of a small file.

        Raises:
            StateError: The store does not hold it.
            VerificationError: It is longer than `max_bytes`.
        """
        path = self.path(digest)
        if path.stat().st_size > max_bytes:
            raise VerificationError(f"expected a file of at most {max_bytes} bytes, {digest} is longer")
        return path.read_bytes()

    def put(self, path: Path, *, move: bool = False) -> str:
        """Take in a file, and return its digest once it is durable.

        Args:
            path: The file, which nobody writes to meanwhile.
            move: Take the file itself where it lies on the same disk, instead of a copy.

        Raises:
            DiskTrouble: Nothing was taken in; a file that was to be moved may be gone.
        """
        source = self._parts / f"put-{secrets.token_hex(8)}.tmp"
        with disk_errors(self.root):
            try:
                digest = self._take(path, source, move=move)
                self._adopt(source, digest)
            finally:
                source.unlink(missing_ok=True)
        return digest

    def _take(self, path: Path, source: Path, *, move: bool) -> str:
        """Bring a file's bytes to `source`, durably, and return their digest."""
        state = hashlib.sha256()
        if move and path.stat().st_dev == self._parts.stat().st_dev:
            path.replace(source)
            with source.open("rb+") as file:
                while piece := file.read(CHUNK_BYTES):
                    state.update(piece)
                os.fsync(file.fileno())
            return state.hexdigest()
        with path.open("rb") as file, source.open("xb") as copy:
            while piece := file.read(CHUNK_BYTES):
                state.update(piece)
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
        if move:
            path.unlink()
        return state.hexdigest()

    def adopt(self, path: Path, digest: str) -> Path:
        """Take a file as it is, and return its place: for a caller that computed the digest while it wrote and synced.

        Args:
            path: The file itself, on the store's own disk; it is gone afterwards.
            digest: Its SHA-256, which is not computed a second time.

        Raises:
            DiskTrouble: It was not taken.
        """
        with disk_errors(self.root):
            return self._adopt(path, digest)

    def take_link(self, path: Path, digest: str) -> None:
        """Give a file of another store on the same disk a second name here; nobody may ever write to it.

        The caller vouches for the digest. The name is not synced: a simulation begins anew after a crash.
        """
        place = self._place(digest)
        place.parent.mkdir(exist_ok=True)
        if not place.is_file():
            os.link(path, place)

    def put_bytes(self, data: bytes) -> str:
        """Take in bytes, and return their digest once they are durable.

        Raises:
            DiskTrouble: Nothing was taken in.
        """
        digest = hashlib.sha256(data).hexdigest()
        place = self._place(digest)
        if not place.is_file():
            with disk_errors(self.root):
                self._make_folder(place)
                write_durably(place, data)
        return digest

    def delete(self, digest: str) -> None:
        """Erase a file and what came of it in parts; nothing happens where there is none."""
        with disk_errors(self.root):
            self._place(digest).unlink(missing_ok=True)
        self.drop_part(digest)

    def drop_part(self, digest: str) -> None:
        """Erase what came of a file in parts, and leave the file."""
        check_digest(digest)
        with disk_errors(self.root):
            (self._parts / f"{digest}.part").unlink(missing_ok=True)

    def drop_parts(self, *, older_than_seconds: float, keep: frozenset[str] = frozenset()) -> int:
        """Erase leftovers of transfers that nobody goes on with, and return how many there were.

        Args:
            older_than_seconds: Only what was last written to so long ago, so that a transfer that goes on in this or
                another process is left alone.
            keep: Digests whose parts stay whatever their age.
        """
        before = time.time() - older_than_seconds
        with self._lock, disk_errors(self.root):
            stale = [
                path
                for path in self._parts.iterdir()
                if path.stem not in keep and path.stem not in self._open and path.stat().st_mtime <= before
            ]
            for path in stale:
                path.unlink(missing_ok=True)
        return len(stale)

    def received(self, digest: str) -> int:
        """How many bytes of a file came in before its connection broke, in whole chunks: where to resume."""
        check_digest(digest)
        part = self._parts / f"{digest}.part"
        return part.stat().st_size // CHUNK_BYTES * CHUNK_BYTES if part.is_file() else 0

    def open_part(self, digest: str, size: int) -> Part:
        """Begin or resume the reception of a file.

        Where two connections receive the same file, the newer one wins: the older one's next `write` fails.

        Args:
            digest: What the whole file must hash to.
            size: Its announced length in bytes; the caller has compared it with what it allows.

        Returns:
            The part, which knows at what offset to go on. Where the store holds the file, that is its end.
        """
        check_digest(digest)
        if size < 0:
            raise VerificationError(f"expected a size of 0 bytes or more, got {size}")
        with self._lock, disk_errors(self.root):
            if older := self._open.pop(digest, None):
                older._abandon()
            part = Part(self, digest, size)
            self._open[digest] = part
        return part

    def _place(self, digest: str) -> Path:
        check_digest(digest)
        return self.root / digest[:2] / digest

    def _make_folder(self, place: Path) -> None:
        if not place.parent.is_dir():
            place.parent.mkdir(exist_ok=True)
            sync_folder(self.root)

    def _adopt(self, path: Path, digest: str) -> Path:
        """Give a synced file its name, durably."""
        place = self._place(digest)
        self._make_folder(place)
        path.replace(place)
        sync_folder(place.parent)
        return place

    def _closed(self, part: Part) -> None:
        with self._lock:
            if self._open.get(part.digest) is part:
                del self._open[part.digest]


class Part:
    """A file on its way in: a context manager with `offset`, `write` and `finish`.

    Guarantees:
        At most `size` bytes are ever written. `finish` returns only after size and digest were compared and file and
        name are durable. What was received stays for a later resume when the connection breaks, and goes when the
        digest is wrong (after a power cut a file's length can run ahead of its data).
    """

    def __init__(self, store: FileStore, digest: str, size: int) -> None:
        self.digest = digest
        self.size = size
        self.offset = 0
        self._store = store
        self._lock = threading.Lock()
        self._path = store._parts / f"{digest}.part"
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._abandoned = False
        if store.has(digest):
            held = store.path(digest).stat().st_size
            if held != size:
                raise VerificationError(f"expected the announced size of {digest} to be {held} bytes, got {size}")
            self.offset = size
        else:
            self._file = self._resume()

    def _resume(self) -> BinaryIO:
        """Hash what is there, in whole chunks, and cut off the rest."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        file = os.fdopen(descriptor, "rb+", buffering=0)
        keep = min(os.fstat(descriptor).st_size, self.size) // CHUNK_BYTES * CHUNK_BYTES
        while self.offset < keep and (piece := file.read(min(CHUNK_BYTES, keep - self.offset))):
            self._hash.update(piece)
            self.offset += len(piece)
        file.truncate(self.offset)
        file.seek(self.offset)
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def complete(self) -> bool:
        """Whether all announced bytes are there."""
        return self.offset == self.size

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises:
            VerificationError: More than the announced size.
            StateError: Another connection took over, or the part is closed.
            DiskTrouble: The bytes did not fit. Close the part; what is there stays for a resume.
        """
        with self._lock, disk_errors(self._path):
            if self._file is None:
                reason = "another connection took over" if self._abandoned else "nothing more is expected"
                raise StateError(f"expected an open part of {self.digest}, {reason}")
            if self.offset + len(chunk) > self.size:
                raise VerificationError(f"expected {self.size} bytes of {self.digest} as announced, got more")
            # An unbuffered file may take fewer bytes than it was given, as the last ones of a disk that fills up.
            rest = memoryview(chunk)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._close_file()  # Where the next chunk would go is no longer known.
                raise
            self._hash.update(chunk)
            self.offset += len(chunk)

    def finish(self) -> Path:
        """Compare size and digest, make the file durable under its digest, and return its place.

        Raises:
            VerificationError: Fewer bytes than announced (they stay for a resume), or another digest (they are erased).
            StateError: Another connection took over.
            DiskTrouble: The file is not durable; its bytes stay for a resume.
        """
        with self._lock, disk_errors(self._path):
            if not self.complete:
                raise VerificationError(
                    f"expected {self.size} bytes of {self.digest}, the stream ended at {self.offset}"
                )
            if self._file is None:
                if self._abandoned:
                    raise StateError(f"expected an open part of {self.digest}, another connection took over")
                return self._store.path(self.digest)
            if self._hash.hexdigest() != self.digest:
                self._close_file()
                self._path.unlink(missing_ok=True)
                raise VerificationError(f"expected bytes with digest {self.digest}, got {self._hash.hexdigest()}")
            os.fsync(self._file.fileno())
            self._close_file()
            return self._store._adopt(self._path, self.digest)

    def close(self) -> None:
        """Let go; what was received stays for a resume."""
        with self._lock:
            self._close_file()
        self._store._closed(self)

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
