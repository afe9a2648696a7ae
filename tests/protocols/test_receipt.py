from __future__ import annotations

import pytest
from foedus_protocols.errors import VerificationError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.receipt import open_receipt, sign_receipt

OPERATOR = generate_signing_key()
SENT = {"federation": "test-league", "run": "run-1", "round": 2, "org": "clinic", "digest": "ab" * 32, "size": 4096}


def receipt(verdict="included") -> bytes:
    return sign_receipt(OPERATOR, **SENT, verdict=verdict, time=1_800_000_000).encode()


@pytest.mark.parametrize("verdict", ["included", "late"])
def test_a_receipt_opens(verdict):
    opened = open_receipt(receipt(verdict), operator_key=public_hex(OPERATOR), **SENT)
    assert (opened.verdict, opened.bytes) == (verdict, 4096)


@pytest.mark.parametrize(
    "change",
    [{"federation": "x"}, {"run": "run-2"}, {"round": 3}, {"org": "bank"}, {"digest": "cd" * 32}, {"size": 4097}],
)
def test_a_receipt_for_something_else_is_refused(change):
    with pytest.raises(VerificationError):
        open_receipt(receipt(), operator_key=public_hex(OPERATOR), **SENT | change)


def test_a_changed_or_foreign_receipt_is_refused():
    other = public_hex(generate_signing_key())
    with pytest.raises(VerificationError):
        open_receipt(receipt(), operator_key=other, **SENT)
    late = receipt("late").replace(b'"late"', b'"included"')
    with pytest.raises(VerificationError):
        open_receipt(late, operator_key=public_hex(OPERATOR), **SENT)
