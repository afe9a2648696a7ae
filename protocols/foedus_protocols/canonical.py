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


def canonical_bytes(value: Any) -> bytes:
    """The RFC 8785 encoding of a JSON value."""
    return rfc8785.dumps(value)


def parse_canonical(data: bytes) -> Any:
    """Decode JSON that must be in canonical form.

    Raises:
        VerificationError: The bytes are not JSON, or not the canonical encoding of what they say.
    """
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
