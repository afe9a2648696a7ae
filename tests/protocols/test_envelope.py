from __future__ import annotations

import dataclasses

import pytest
from foedus_protocols.envelope import MAX_ENVELOPE_BYTES, Envelope, open_envelope, seal
from foedus_protocols.errors import VerificationError
from foedus_protocols.identity import generate_signing_key, public_hex, sign
from foedus_protocols.messages import MAX_BODY_BYTES

KEY, OTHER = generate_signing_key(), generate_signing_key()
FIELDS = {
    "type": "train",
    "federation": "test-league",
    "run": "run-1",
    "round": 3,
    "attempt": 1,
    "sender": "clinic",
    "receiver": "coordinator",
    "sequence": 7,
    "body": b'{"a":1}',
}
EXPECTED = {
    "public_key": public_hex(KEY),
    "sender": "clinic",
    "receiver": "coordinator",
    "federation": "test-league",
}


def test_what_was_sealed_opens():
    envelope = seal(KEY, **FIELDS)
    opened = open_envelope(envelope.encode(), **EXPECTED)
    assert opened == envelope
    assert opened.header.round == 3
    assert opened.body == FIELDS["body"]
    assert opened.digest == envelope.digest
    assert seal(KEY, **FIELDS | {"sequence": 8}).digest != envelope.digest


@pytest.mark.parametrize("field", ["public_key", "sender", "receiver", "federation"])
def test_a_message_of_someone_else_is_refused(field: str):
    other = public_hex(OTHER) if field == "public_key" else "other"
    with pytest.raises(VerificationError):
        open_envelope(seal(KEY, **FIELDS).encode(), **EXPECTED | {field: other})


def test_a_member_cannot_speak_for_another():
    """The bank's key and connection, the clinic's name: refused by name and, were it not, by signature."""
    forged = seal(OTHER, **FIELDS).encode()
    with pytest.raises(VerificationError, match="claims to be"):
        open_envelope(forged, **EXPECTED | {"public_key": public_hex(OTHER), "sender": "bank"})
    with pytest.raises(VerificationError, match="does not check out"):
        open_envelope(forged, **EXPECTED)


def test_every_changed_byte_is_noticed():
    data = seal(KEY, **FIELDS).encode()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(VerificationError):
            open_envelope(bytes(changed), **EXPECTED)


def test_the_body_is_bound_to_the_header():
    envelope = dataclasses.replace(seal(KEY, **FIELDS), body=b'{"a":2}')
    with pytest.raises(VerificationError, match="body"):
        open_envelope(envelope.encode(), **EXPECTED)


def test_a_header_that_is_signed_and_not_canonical_is_refused():
    envelope = seal(KEY, **FIELDS)
    for header in (envelope.header_bytes.replace(b":", b": ", 1), b"[]", b"{}", b"", b"\xff"):
        signature = bytes.fromhex(sign(KEY, "foedus/envelope/1", header))
        data = Envelope(header_bytes=header, body=envelope.body, signature=signature).encode()
        with pytest.raises(VerificationError):
            open_envelope(data, **EXPECTED)


def test_a_second_encoding_is_the_same_message():
    """An unknown field is ignored by protobuf; the id must not change, or the message would be applied twice."""
    envelope = seal(KEY, **FIELDS)
    longer = envelope.encode() + b"\x22\x01x"
    assert open_envelope(longer, **EXPECTED).digest == envelope.digest


def test_sizes_have_limits():
    seal(KEY, **FIELDS | {"body": bytes(MAX_BODY_BYTES)})
    with pytest.raises(VerificationError, match="at most"):
        seal(KEY, **FIELDS | {"body": bytes(MAX_BODY_BYTES + 1)})
    with pytest.raises(VerificationError, match="at most"):
        Envelope.decode(bytes(MAX_ENVELOPE_BYTES + 1))
    big = dataclasses.replace(seal(KEY, **FIELDS), body=bytes(MAX_BODY_BYTES + 1))
    with pytest.raises(VerificationError, match="at most"):
        Envelope.decode(big.encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [("type", "Train"), ("round", -1), ("sender", "Clinic"), ("reply_to", "00"), ("run", "a/b"), ("sequence", 2**53)],
)
def test_malformed_fields_are_not_sealed(field, value):
    with pytest.raises(VerificationError, match=field):
        seal(KEY, **FIELDS | {field: value})
