"""Message bodies: their sizes."""

from __future__ import annotations

import pytest
from foedus_protocols.errors import VerificationError
from foedus_protocols.messages import MAX_BODY_BYTES, MAX_HISTORY_BYTES, Agreement, ClosedRound, History


def history(rounds: int, survivors: int) -> History:
    orgs = [f"org-{index}" for index in range(survivors)]
    entry = ClosedRound(round=1, attempt=1, survivors=orgs, sum_digest="a" * 64, adapter_digest="b" * 64)
    closed = [entry.model_copy(update={"round": number}) for number in range(1, rounds + 1)]
    return History(charter_digest="c" * 64, rounds=closed)


def test_a_history_of_two_thousand_rounds_is_read_again() -> None:
    """A body may have 64 KiB; a history is a file, has a limit of its own, and one only."""
    long = history(2000, 10)
    data = long.encode()
    assert MAX_BODY_BYTES < len(data) < MAX_HISTORY_BYTES
    assert History.decode(data) == long


def test_each_kind_is_refused_beyond_its_own_limit() -> None:
    with pytest.raises(VerificationError, match=f"Agreement of at most {MAX_BODY_BYTES}"):
        Agreement.decode(b"x" * (MAX_BODY_BYTES + 1))
    with pytest.raises(VerificationError, match=f"History of at most {MAX_HISTORY_BYTES}"):
        History.decode(bytes(MAX_HISTORY_BYTES + 1))
