"""The introduction on the link: who speaks which version, whose certificates are trusted, which receipts are known.

`Hello` travels as canonical JSON both ways, at the start of each connection and each minute after. Unlike a message's
body it tolerates fields that it does not know: that is how a newer side speaks to an older one.

The protocol has a major and a minor number. Another major number is refused. Minor numbers may differ by one: the lower
one is spoken, and what is new in the higher one is left out. A larger difference is refused, with the side to update.

    1.0   the first federation
    1.1   renewal of certificates over the link, rotation of the CA, receipts told again at hello
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foedus_protocols.errors import VerificationError
from foedus_protocols.messages import Digest, OrgId, Signature
from foedus_protocols.receipt import Receipt

PROTOCOL = 1
MINOR = 1
RENEWAL_MINOR = 1  # Who speaks less knows nothing of renewal, CAs and receipts in hello.
PROGRAM = version_of("foedus")  # Said in hello, for people: decisions are made by the protocol's numbers.
RECEIPTS_PER_HELLO = 40

_Pem = Annotated[str, Field(max_length=16 * 1024)]


class _Hello(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    protocol: Annotated[int, Field(ge=0, lt=2**31)]
    minor: Annotated[int, Field(ge=0, lt=2**31)] = 0
    version: Annotated[str, Field(max_length=32)] = "0.1.0"

    def encode(self) -> dict[str, Any]:
        """As the JSON object that `LinkClient.hello` sends."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Self:
        """Read the other side's object.

        Raises:
            VerificationError: A field is missing or of another type. The text names fields, never values.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
            raise VerificationError(
                f"expected a hello of this protocol, got wrong or missing fields: {fields}"
            ) from None


class HelloRequest(_Hello):
    """What an organisation says of itself.

    Attributes:
        receipts_from: How many of its own receipts it has accounted for in this connection: the next page begins there.
        authorities: SPKI fingerprints of the CAs that it trusts.
        request: A certificate request (PEM), where its certificate is due.
    """

    org: OrgId
    receipts_from: Annotated[int, Field(ge=0, lt=2**53)] = 0
    authorities: Annotated[list[Digest], Field(max_length=8)] = []
    request: _Pem | None = None


class ToldReceipt(BaseModel):
    """A receipt that the coordinator gave this organisation, told again, with the charter that its run is about."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    charter: Digest
    receipt: Receipt


class Authorities(BaseModel):
    """The CAs to trust from now on: PEM certificates one after the other, newest last, signed by the operator."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    pem: _Pem
    signature: Signature


class HelloAnswer(_Hello):
    """What the coordinator says of itself, and what it has for this organisation.

    Attributes:
        receipts: The organisation's receipts from number `receipts_from` + 1 on, oldest first, at most
            `RECEIPTS_PER_HELLO` of them; `receipts_total` counts all.
        authorities: Absent where nothing changes.
        renew: The organisation is to send a certificate request: its certificate is due, or of a CA on its way out.
        certificate: The renewed certificate (PEM), in answer to a request.
    """

    federation: str
    org: OrgId
    operator_key: str
    roster_digest: Digest
    roster_version: int
    roster_signature: Signature
    server_time: Annotated[float, Field(allow_inf_nan=False)] | int
    receipts: Annotated[list[ToldReceipt], Field(max_length=RECEIPTS_PER_HELLO)] = []
    receipts_total: Annotated[int, Field(ge=0, lt=2**53)] = 0
    authorities: Authorities | None = None
    renew: bool = False
    certificate: _Pem | None = None


def negotiate(theirs: _Hello, *, us: str, them: str, protocol: int = PROTOCOL, minor: int = MINOR) -> int:
    """The minor version that both sides speak.

    Args:
        theirs: The other side's hello.
        us: What this side is called in the error's text: ``coordinator`` or ``organisation``.
        them: What the other side is called.
        protocol: This side's major version.
        minor: This side's minor version.

    Raises:
        VerificationError: The versions are too far apart; the text says which side to update.
    """
    ours, other = (protocol, minor), (theirs.protocol, theirs.minor)
    if theirs.protocol == protocol and abs(theirs.minor - minor) <= 1:
        return min(theirs.minor, minor)
    older = us if ours < other else them
    raise VerificationError(
        f"expected protocol {protocol}.{max(minor - 1, 0)} to {protocol}.{minor + 1}, the {them} speaks "
        f"{theirs.protocol}.{theirs.minor} (foedus {theirs.version}): update the {older}"
    )
