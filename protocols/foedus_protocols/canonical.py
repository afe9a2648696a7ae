"""Canonical bytes and digests: RFC 8785 JSON and SHA-256, written as lower-case hexadecimal.

Everything that is signed or named by digest goes through here, so that two parties who hold the same
values hold the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import rfc8785

from foedus_protocols.errors import VerificationError

_READ_BYTES = 1 << 20
# An empty list of two bytes takes 60 in memory. Documents larger than this have fewer parts than one in so many bytes.
_SMALL_BYTES = 1 << 20
_BYTES_A_PART = 32


def canonical_bytes(value: Any) -> bytes:
    """The RFC 8785 encoding of a JSON value."""
    return rfc8785.dumps(value)


def parse_canonical(data: bytes) -> Any:
    """Decode JSON that must be in canonical form.

    Raises:
        VerificationError: The bytes are not JSON, or not the canonical encoding of what they say; or they are so many
            brackets that they would take a multiple of their size in memory.
    """
    if len(data) > _SMALL_BYTES and data.count(b"[") + data.count(b"{") > len(data) // _BYTES_A_PART:
        raise VerificationError(f"expected a document of values, got {len(data)} bytes that are mostly brackets")
    try:
        value = json.loads(data)
        again = canonical_bytes(value)
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise VerificationError(f"expected canonical JSON, got {len(data)} bytes that are not") from error
    if again != data:
        raise VerificationError("expected canonical JSON (RFC 8785), got another spelling of the same value")
    return value


def digest(data: bytes) -> str:
    """SHA-256 of bytes, as 64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical bytes."""
    return digest(canonical_bytes(value))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            state.update(piece)
    return state.hexdigest()
