"""Who is a member of a federation: a chain of versions, each naming the digest of the one before.

A charter names the roster that it was drawn up under. An organisation accepts it when that roster is an ancestor of the
current one and none of the charter's participants has left since, so that a newcomer does not stop a run and a removed
member does. The coordinator signs each version and could invent members; that is why organisations confirm each other's
fingerprints over another channel before they sign a first charter together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foedus_protocols.canonical import canonical_bytes, digest, parse_canonical
from foedus_protocols.errors import ConfigError, StateError, VerificationError
from foedus_protocols.identity import COORDINATOR, PeerName, key_fingerprint, sign, verify
from foedus_protocols.messages import Digest, OrgId, Signature

ROSTER_CONTEXT = "foedus/roster/1"
MAX_ROSTER_BYTES = 1 << 20

# What canonical JSON can write; text that reads like a number is none.
_Counter = Annotated[int, Field(strict=True, ge=0, lt=2**53)]

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_AnyModel = TypeVar("_AnyModel", bound=_Model)


class Member(_Model):
    """One organisation: its id, signing key, the URI in its TLS certificate, and when it joined (Unix seconds)."""

    id: OrgId
    signing_key: PublicKey
    tls_name: str
    since: _Counter

    @property
    def fingerprint(self) -> str:
        """What peers compare before they sign with this member."""
        return key_fingerprint(self.signing_key)


class Roster(_Model):
    """One version of the member list, sorted by id."""

    federation: str
    version: _Counter
    previous: Digest | None
    members: tuple[Member, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        ids = [member.id for member in self.members]
        if ids != sorted(set(ids)):
            raise ValueError("members must be sorted by id, each once")
        if len({member.signing_key for member in self.members}) != len(ids):
            raise ValueError("no two members may share a signing key")
        if (self.version == 0) != (self.previous is None):
            raise ValueError("exactly version 0 has no version before it")
        for member in self.members:
            if member.id == COORDINATOR:
                raise ValueError("no member may have the coordinator's name")
            if member.tls_name != PeerName(federation=self.federation, org=member.id).uri:
                raise ValueError("a member's TLS name must be its SPIFFE URI in this federation")
        return self

    @classmethod
    def genesis(cls, federation: str) -> Roster:
        """Version 0: nobody has joined yet."""
        return cls(federation=federation, version=0, previous=None, members=())

    @classmethod
    def parse(cls, data: bytes) -> Roster:
        """Read canonical bytes.

        Raises:
            VerificationError: Too long, not canonical, or not a roster.
        """
        return _validated(cls, _parse(data))

    def canonical(self) -> bytes:
        """The bytes that are signed and named by digest."""
        return canonical_bytes(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes."""
        return digest(self.canonical())

    def member(self, org: str) -> Member:
        """The member with this id.

        Raises:
            VerificationError: There is none.
        """
        for member in self.members:
            if member.id == org:
                return member
        raise VerificationError(f"expected a member of roster version {self.version}, {org!r} is not one")

    def add(self, org: str, signing_key: str, *, since: int) -> Roster:
        """The next version, with one more member.

        Raises:
            StateError: The id or the key is taken.
            ConfigError: The id or the key is malformed.
        """
        if any(member.id == org or member.signing_key == signing_key for member in self.members):
            raise StateError(f"expected a new organisation and a new key, {org!r} or its key is in the roster already")
        tls_name = PeerName(federation=self.federation, org=org).uri
        try:
            member = Member(id=org, signing_key=signing_key, tls_name=tls_name, since=since)
            return self._next((*self.members, member))
        except ValidationError as error:
            raise ConfigError(
                f"expected an organisation id and an Ed25519 key for {org!r}, wrong: {_fields(error)}"
            ) from error

    def remove(self, org: str) -> Roster:
        """The next version, without a member; a VerificationError where there is no such member."""
        gone = self.member(org)
        return self._next(tuple(member for member in self.members if member is not gone))

    def _next(self, members: tuple[Member, ...]) -> Roster:
        ordered = tuple(sorted(members, key=lambda member: member.id))
        return Roster(federation=self.federation, version=self.version + 1, previous=self.digest, members=ordered)


class SignedRoster(_Model):
    """A roster with its operator's signature: what lies in a file and travels to members."""

    roster: Roster
    signature: Signature

    @classmethod
    def make(cls, key: Ed25519PrivateKey, roster: Roster) -> SignedRoster:
        """Sign a roster as the operator."""
        return cls(roster=roster, signature=sign(key, ROSTER_CONTEXT, roster.canonical()))

    def encode(self) -> bytes:
        """Canonical JSON."""
        return canonical_bytes(self.model_dump(mode="json"))

    @classmethod
    def open(cls, data: bytes, *, operator_key: str, federation: str) -> Roster:
        """Read a signed roster and check it.

        Raises:
            VerificationError: Malformed, of another federation, or not signed by this operator.
        """
        signed = _validated(cls, _parse(data))
        if signed.roster.federation != federation:
            raise VerificationError(
                f"expected a roster of federation {federation!r}, got one of {signed.roster.federation!r}"
            )
        verify(operator_key, ROSTER_CONTEXT, signed.roster.canonical(), signed.signature)
        return signed.roster


def check_chain(chain: Sequence[Roster]) -> None:
    """Check that rosters, oldest first, are one unbroken chain of one federation.

    Raises:
        VerificationError: Empty, a gap, a fork, or another federation.
    """
    if not chain:
        raise VerificationError("expected at least one roster, got none")
    for before, after in itertools.pairwise(chain):
        if after.federation != before.federation or after.version != before.version + 1:
            raise VerificationError(
                f"expected roster version {before.version + 1} of {before.federation!r}, got version {after.version} "
                f"of {after.federation!r}"
            )
        if after.previous != before.digest:
            raise VerificationError(f"expected roster version {after.version} to follow ours, it follows a fork")


def ancestor(chain: Sequence[Roster], roster_digest: str) -> Roster:
    """The roster of this digest in a checked chain whose last entry is the current one.

    Raises:
        VerificationError: It is not in the chain.
    """
    for roster in chain:
        if roster.digest == roster_digest:
            return roster
    raise VerificationError(f"expected an ancestor of our current roster, {roster_digest[:16]}... is not one")


def stayed_since(chain: Sequence[Roster], roster_digest: str) -> frozenset[str]:
    """Ids that were members, with the same key and entry date, in each version from `roster_digest` to the last.

    Who left and came back is not among them: the old membership, and what was signed under it, ended.

    Raises:
        VerificationError: The digest is not in the chain.
    """
    first = ancestor(chain, roster_digest)
    stayed = set(first.members)
    for roster in chain:
        if roster.version > first.version:
            stayed &= set(roster.members)
    return frozenset(member.id for member in stayed)


def _parse(data: bytes) -> object:
    if len(data) > MAX_ROSTER_BYTES:
        raise VerificationError(f"expected a roster of at most {MAX_ROSTER_BYTES} bytes, got {len(data)}")
    return parse_canonical(data)


def _validated(cls: type[_AnyModel], value: object) -> _AnyModel:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise VerificationError(f"expected a {cls.__name__}, got wrong or missing fields: {_fields(error)}") from None


def _fields(error: ValidationError) -> str:
    return ", ".join(re.sub(r"\s+", " ", ".".join(map(str, item["loc"])) or item["msg"]) for item in error.errors())
