"""What the coordinator signs when a pushed file is on its disk.

A receipt is one flat JSON object. Its signature covers the canonical bytes of all other fields. A vector whose receipt
says ``included`` is never lost; one that says ``late`` came after the survivor set was frozen: it is spent, erased, and
never summed in another round.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.errors import VerificationError
from foedus_protocols.identity import sign, verify
from foedus_protocols.messages import Body, Digest, OrgId, Signature

RECEIPT_CONTEXT = "foedus/receipt/1"


class Receipt(Body):
    """A signed receipt; `bytes` is the file's size and `time` is in Unix seconds of the coordinator's clock."""

    federation: str
    run: str
    round: int
    org: OrgId
    digest: Digest
    bytes: Annotated[int, Field(ge=0)]
    verdict: Literal["included", "late"]
    time: int
    signature: Signature


def _signed_bytes(receipt: Receipt) -> bytes:
    """What the signature covers: every other field."""
    return canonical_bytes(receipt.model_dump(mode="json", exclude={"signature"}))


def sign_receipt(
    key: Ed25519PrivateKey,
    *,
    federation: str,
    run: str,
    round: int,
    org: str,
    digest: str,
    size: int,
    verdict: Literal["included", "late"],
    time: int,
) -> Receipt:
    """Sign a receipt as the operator, after the file is durable."""
    unsigned = Receipt(
        federation=federation,
        run=run,
        round=round,
        org=org,
        digest=digest,
        bytes=size,
        verdict=verdict,
        time=time,
        signature="0" * 128,
    )
    return unsigned.model_copy(update={"signature": sign(key, RECEIPT_CONTEXT, _signed_bytes(unsigned))})


def open_receipt(
    data: bytes, *, operator_key: str, federation: str, run: str, round: int, org: str, digest: str, size: int
) -> Receipt:
    """Decode a receipt and check that it is the operator's, for exactly what we sent.

    Raises:
        VerificationError: Malformed, for something else, or not signed by this operator.
    """
    receipt = Receipt.decode(data)
    expected = {
        "federation": federation,
        "run": run,
        "round": round,
        "org": org,
        "digest": digest,
        "bytes": size,
    }
    wrong = [name for name, value in expected.items() if getattr(receipt, name) != value]
    if wrong:
        raise VerificationError(f"expected a receipt for what we sent, got another {', '.join(wrong)}")
    verify(operator_key, RECEIPT_CONTEXT, _signed_bytes(receipt), receipt.signature)
    return receipt


def verify_told_receipt(receipt: Receipt, *, operator_key: str, federation: str, org: str) -> None:
    """Check a receipt that is told again: it is the operator's, and it was given to us. What it is for is in it.

    Raises:
        VerificationError: Another federation's or organisation's, or not signed by this operator.
    """
    for name, value in {"federation": federation, "org": org}.items():
        if getattr(receipt, name) != value:
            raise VerificationError(f"expected receipts of ours, got one of another {name}")
    verify(operator_key, RECEIPT_CONTEXT, _signed_bytes(receipt), receipt.signature)
