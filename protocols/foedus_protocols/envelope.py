"""Signed control messages: who says what to whom, in which run, round and attempt.

An envelope is a header in canonical JSON, a body, and the sender's signature over the header's bytes; the header holds
the digest of the body. Its id is the digest of the header, so that another encoding of the same message is the same
message. What it does not do: keep anything secret (TLS does), or remember what was seen. The receiver stores ids and
sequence numbers and applies each message once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foedus_protocols.canonical import canonical_bytes, digest, parse_canonical
from foedus_protocols.errors import VerificationError
from foedus_protocols.identity import sign, verify
from foedus_protocols.messages import MAX_BODY_BYTES, Digest, OrgId
from foedus_protocols.v1 import envelope_pb2

ENVELOPE_CONTEXT = "foedus/envelope/1"
MAX_HEADER_BYTES = 4 * 1024
MAX_ENVELOPE_BYTES = MAX_BODY_BYTES + MAX_HEADER_BYTES + 4 * 1024

_Counter = Annotated[int, Field(ge=0, lt=2**53)]


class Header(BaseModel):
    """What a message's signature covers.

    Attributes:
        type: The message type (`messages.py`).
        federation: The federation's name.
        run: The run's id; empty where a message belongs to none.
        round: The round, from 1; 0 outside rounds.
        attempt: The attempt of the round, from 1; 0 outside rounds.
        sender: An organisation id, or ``coordinator``.
        receiver: An organisation id, or ``coordinator``.
        sequence: Grows with each message of this sender to this receiver.
        reply_to: The id of the envelope that this one answers.
        body_digest: SHA-256 of the body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Annotated[str, Field(pattern=r"^[a-z][a-z.-]{0,31}$")]
    federation: Annotated[str, Field(max_length=63)]
    run: Annotated[str, Field(pattern=r"^[a-z0-9-]{0,64}$")]
    round: _Counter
    attempt: _Counter
    sender: OrgId
    receiver: OrgId
    sequence: _Counter
    reply_to: Digest | None = None
    body_digest: Digest


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A message as it travels: the header's exact bytes, the body, and the signature (64 bytes)."""

    header_bytes: bytes
    body: bytes
    signature: bytes

    @property
    def header(self) -> Header:
        """The header, decoded.

        Raises:
            VerificationError: Not canonical, or not a header.
        """
        try:
            return Header.model_validate(parse_canonical(self.header_bytes))
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
            raise VerificationError(f"expected an envelope header, got wrong or missing fields: {fields}") from None

    @property
    def digest(self) -> str:
        """The message's id."""
        return digest(self.header_bytes)

    def encode(self) -> bytes:
        """The bytes on the wire."""
        message = envelope_pb2.Envelope(header=self.header_bytes, body=self.body, signature=self.signature)
        encoded: bytes = message.SerializeToString(deterministic=True)
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> Envelope:
        """Read an envelope **without** checking its signature; `open_envelope` does both.

        Raises:
            VerificationError: Too long, or not an envelope.
        """
        if len(data) > MAX_ENVELOPE_BYTES:
            raise VerificationError(f"expected an envelope of at most {MAX_ENVELOPE_BYTES} bytes, got {len(data)}")
        try:
            message = envelope_pb2.Envelope.FromString(data)
        except DecodeError as error:
            raise VerificationError(f"expected an envelope, got {len(data)} bytes that are none") from error
        if len(message.header) > MAX_HEADER_BYTES or len(message.body) > MAX_BODY_BYTES:
            raise VerificationError(
                f"expected a header of at most {MAX_HEADER_BYTES} bytes and a body of at most {MAX_BODY_BYTES}, got "
                f"{len(message.header)} and {len(message.body)}"
            )
        return cls(header_bytes=message.header, body=message.body, signature=message.signature)


def seal(
    key: Ed25519PrivateKey,
    *,
    type: str,
    federation: str,
    run: str,
    round: int,
    attempt: int,
    sender: str,
    receiver: str,
    sequence: int,
    body: bytes,
    reply_to: str | None = None,
) -> Envelope:
    """Sign a message; the fields are those of `Header`.

    Raises:
        VerificationError: A field is malformed, or the body is longer than 64 KiB.
    """
    if len(body) > MAX_BODY_BYTES:
        raise VerificationError(f"expected a body of at most {MAX_BODY_BYTES} bytes, got {len(body)}")
    try:
        header = Header(
            type=type,
            federation=federation,
            run=run,
            round=round,
            attempt=attempt,
            sender=sender,
            receiver=receiver,
            sequence=sequence,
            reply_to=reply_to,
            body_digest=digest(body),
        )
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise VerificationError(f"expected well-formed header fields, got wrong ones: {fields}") from None
    header_bytes = canonical_bytes(header.model_dump(mode="json"))
    return Envelope(
        header_bytes=header_bytes, body=body, signature=bytes.fromhex(sign(key, ENVELOPE_CONTEXT, header_bytes))
    )


def open_envelope(data: bytes, *, public_key: str, sender: str, receiver: str, federation: str) -> Envelope:
    """Decode a message and check it, in this order.

    1. It MUST decode, within the size limits, to a canonical header.
    2. The federation MUST be ours.
    3. The claimed sender MUST be the member that the connection's certificate names (`sender`).
    4. The receiver MUST be us.
    5. The body MUST have the digest in the header.
    6. The signature MUST be the sender's, by the key that the roster has for it (`public_key`).

    Args:
        data: The bytes as they arrived.
        public_key: The sender's signing key from the roster, or the operator's.
        sender: The sender by the TLS identity of the connection.
        receiver: Our own name.
        federation: Our federation's name.

    Raises:
        VerificationError: A check failed; the text says which.
    """
    envelope = Envelope.decode(data)
    header = envelope.header  # 1
    if header.federation != federation:  # 2
        raise VerificationError(f"expected a message of federation {federation!r}, got one of {header.federation!r}")
    if header.sender != sender:  # 3
        raise VerificationError(f"expected a message from {sender!r}, it claims to be from {header.sender!r}")
    if header.receiver != receiver:  # 4
        raise VerificationError(f"expected a message to {receiver!r}, it is addressed to {header.receiver!r}")
    if header.body_digest != digest(envelope.body):  # 5
        raise VerificationError("expected the body that the header names, got another")
    verify(public_key, ENVELOPE_CONTEXT, envelope.header_bytes, envelope.signature.hex())  # 6
    return envelope
