"""Canonical JSON: one spelling, and a bound on what a document may cost in memory."""

from __future__ import annotations

import pytest
from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.errors import VerificationError


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"b":1,"a":2}', b"[1, 2]", b"1.0", b"9007199254740992", b"NaN", b"[" * 100_000, b"\xff"]
)
def test_another_spelling_or_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(VerificationError, match="canonical JSON"):
        parse_canonical(data)


def test_brackets_that_would_fill_the_memory_are_refused_before_they_are_read() -> None:
    """Found by fuzzing a history, which may have 64 MiB: its empty lists would take two gigabytes."""
    with pytest.raises(VerificationError, match="mostly brackets"):
        parse_canonical(canonical_bytes([[]] * 700_000))
    members = [{"id": "ash", "signing_key": "0" * 64}] * 12_000
    assert parse_canonical(canonical_bytes(members)) == members
