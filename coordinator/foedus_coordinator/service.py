"""What the two ports do with what arrives: enrolment requests, and everything that members send and fetch.

`foedus_protocols.enrolment` and `link` own the sockets, the certificates and the chunks; here is what a coordinator
makes of it all. Whatever is answered is in the database first. `org` is always the name in the caller's certificate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.authorities import bundle_pem, fingerprints, sign_authorities
from foedus_protocols.charter import Charter
from foedus_protocols.enrolment import EnrolmentRequest, EnrolmentStatus, check_collect
from foedus_protocols.envelope import open_envelope
from foedus_protocols.errors import VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.hello import MINOR, PROGRAM, PROTOCOL, RENEWAL_MINOR, HelloAnswer, HelloRequest, negotiate
from foedus_protocols.identity import COORDINATOR, check_org_id, public_hex
from foedus_protocols.messages import (
    AdvanceAnswer,
    Body,
    CharterAnswer,
    CloseAnswer,
    EvaluateAnswer,
    TrainAnswer,
)
from foedus_protocols.receipt import sign_receipt
from foedus_protocols.roster import Roster
from foedus_protocols.store import FileStore, Part
from sqlalchemy.exc import SQLAlchemyError

from foedus_coordinator import figures, receipts
from foedus_coordinator.authorities import Authorities
from foedus_coordinator.mailbox import Mailbox, Question
from foedus_coordinator.members import Introduced, Members, Request
from foedus_coordinator.storage import Storage, Verdict

_ANSWERS: dict[str, type[Body]] = {
    "charter": CharterAnswer,
    "train": TrainAnswer,
    "advance": AdvanceAnswer,
    "evaluate": EvaluateAnswer,
    "close": CloseAnswer,
}
# A message that was handed out is not handed out again for this long: a charter that waits for a person must not stand
# before the next round of another run. A new `hello` ends the pause, since it may come from a restarted daemon.
_HANDED_OUT_SECONDS = 5.0
_SEEN_SECONDS = 5.0
# A member has a vector on its way in each run that it takes part in, and seldom more than one run at a time.
_MOST_UNFINISHED = 4


@dataclass(frozen=True, kw_only=True)
class EnrolmentDesk:
    """The enrolment port's handlers (`foedus_protocols.enrolment.EnrolmentHandlers`)."""

    members: Members
    federation: str
    operator_key: str
    authorities: Authorities
    link_address: str

    def enrol(self, request: EnrolmentRequest) -> EnrolmentStatus:
        """Use the token up, and keep the request for a person to decide."""
        check_org_id(request.org)
        kept = self.members.request(
            request.org, request.token, csr_pem=request.csr_pem, signing_key=request.signing_key
        )
        return self._status(kept)

    def collect(self, request_id: str, proof: str) -> EnrolmentStatus:
        """Tell who holds the request's signing key what became of it."""
        request = self.members.find(request_id)
        check_collect(request.signing_key, request_id, proof)
        return self._status(request)

    def _status(self, request: Request) -> EnrolmentStatus:
        if request.state != "approved" or request.certificate_pem is None:
            return EnrolmentStatus(state=request.state, request_id=request.id, fingerprint=request.fingerprint)
        return EnrolmentStatus(
            state="approved",
            request_id=request.id,
            fingerprint=request.fingerprint,
            certificate_pem=request.certificate_pem,
            ca_pem=bundle_pem(self.authorities.trusted()),
            federation=self.federation,
            operator_key=self.operator_key,
            link_address=self.link_address,
        )


@dataclass(frozen=True, kw_only=True)
class LinkDesk:
    """The link port's handlers (`foedus_protocols.link.LinkHandlers`)."""

    storage: Storage
    mailbox: Mailbox
    members: Members
    authorities: Authorities
    files: FileStore
    vectors: FileStore
    key: Ed25519PrivateKey
    federation: str
    clock: Callable[[], float] = time.time
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _rosters: dict[int, Roster] = field(default_factory=dict)
    _charters: dict[str, Charter] = field(default_factory=dict)
    _handed: dict[str, dict[str, float]] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    _unfinished: dict[str, dict[tuple[str, int], str]] = field(default_factory=dict)

    def check_member(self, org: str, leaf_serial: str) -> None:
        """Refuse who is not in the newest roster, or comes with a certificate that was revoked or never issued."""
        self.members.gate.check(org, leaf_serial)
        self._note(org)  # Also in the middle of a long transfer, so that nobody takes it for away.

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        """Introduce the coordinator: versions, roster, operator key and time; and what it has for this member.

        Raises:
            VerificationError: Malformed, another organisation's, or a version too far from ours.
        """
        said = HelloRequest.decode(body)
        if said.org != org:
            raise VerificationError(f"expected a hello of {org}, whose certificate this is, got another organisation's")
        minor = negotiate(said, us="coordinator", them="organisation", minor=MINOR)
        with self._lock:
            self._handed.pop(org, None)
        self._note(org)
        signed = self.members.signed_roster()
        answer = HelloAnswer(
            protocol=PROTOCOL,
            minor=MINOR,
            version=PROGRAM,
            federation=self.federation,
            org=org,
            operator_key=public_hex(self.key),
            roster_digest=signed.roster.digest,
            roster_version=signed.roster.version,
            roster_signature=signed.signature,
            server_time=self.clock(),
        )
        issued = self.members.certificate(leaf_serial)
        issuer = "" if issued is None else issued.issuer
        spoken = f"{said.protocol}.{said.minor}"
        self.members.introduce(
            org, Introduced(protocol=spoken, version=said.version, trusts=tuple(said.authorities), issuer=issuer)
        )
        if minor >= RENEWAL_MINOR:
            answer = answer.model_copy(update=self._news(org, said, leaf_serial))
        return answer.encode()

    def _news(self, org: str, said: HelloRequest, serial: str) -> dict[str, Any]:
        """What a hello brings beyond the introduction: receipts, CAs, and a certificate or the word that one is due."""
        with self.storage.read() as connection:
            told, total = receipts.page(connection, org, said.receipts_from)
        news: dict[str, Any] = {"receipts": told, "receipts_total": total}
        trusted = self.authorities.trusted()
        if set(said.authorities) != set(fingerprints(trusted)):
            news["authorities"] = sign_authorities(self.key, self.federation, trusted)
        if said.request is not None:
            newest = self.authorities.newest()
            certificate = self.members.renew(org, serial, said.request.encode(), authority=newest, now=self.clock())
            return news | {"certificate": certificate.decode()}
        held = self.members.certificate(serial)
        outgoing = held is not None and len(trusted) > 1 and held.issuer != fingerprints(trusted)[-1]
        return news | {"renew": held is not None and (outgoing or self.clock() > held.half_life)}

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        """The oldest message that waits for this organisation and was not handed out just now."""
        self._note(org)
        deadline = time.monotonic() + wait_seconds
        while True:
            since = self.mailbox.generation
            found = self.mailbox.next_open(org, skip=self._recent(org))
            if found is not None:
                digest, envelope = found
                with self._lock:
                    self._handed.setdefault(org, {})[digest] = time.monotonic()
                return envelope
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self.mailbox.wait(left, since=since)

    def deliver(self, org: str, envelope: bytes) -> None:
        """Check an answer in full, and store it.

        Raises:
            VerificationError: Another sender, signature, run, round or type than the question's, or a malformed body.
            StateError: It answers nothing that was asked, or another answer came before.
        """
        member = self._roster().member(org)
        opened = open_envelope(
            envelope, public_key=member.signing_key, sender=org, receiver=COORDINATOR, federation=self.federation
        )
        header = opened.header
        if header.reply_to is None:
            raise VerificationError("expected an answer to a message, got an envelope that answers none")
        question = self.mailbox.question(header.reply_to, org)
        said = Question(run=header.run, round=header.round, attempt=header.attempt, type=header.type, org=org)
        if said != question:
            raise VerificationError(f"expected an answer about {question}, got one about {said}")
        _ANSWERS[question.type].decode(opened.body)
        self.mailbox.answer(header.reply_to, answer=envelope, answer_digest=opened.digest)

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        """Open a place for a vector, once it is one that this round asked for.

        Raises:
            VerificationError: Not a participant, another size than the charter's words have, or a malformed context.
            StateError: An unknown run, or a round that was never offered.
        """
        run, number = _context(context)
        expected = self._charter(run, org).coding().packed_bytes
        if size != expected:
            raise VerificationError(f"expected a vector of {expected} bytes in run {run}, got {size} announced")
        self.storage.round(run, number)
        self.storage.require_first_vector(run, number, org, digest)
        for given_up in self._begin(org, (run, number), digest):
            self.vectors.drop_part(given_up)
        return self.vectors.open_part(digest, size)

    def received(self, org: str, digest: str, size: int, context: dict[str, Any]) -> bytes:
        """Decide whether the vector is in its round, and sign that."""
        run, number = _context(context)

        def receipt(verdict: Verdict) -> bytes:
            return sign_receipt(
                self.key,
                federation=self.federation,
                run=run,
                round=number,
                org=org,
                digest=digest,
                size=size,
                verdict=verdict,
                time=int(self.clock()),
            ).encode()

        with self._lock:
            self._unfinished.get(org, {}).pop((run, number), None)
        signed = self.storage.accept_vector(run=run, number=number, org=org, digest=digest, size=size, receipt=receipt)
        if self.storage.round(run, number).state in ("closed", "failed"):
            self.storage.erase_vectors(run, number, self.vectors.delete)
        return signed

    def path_of(self, org: str, digest: str) -> Path:
        """A published file.

        Raises:
            VerificationError: Not published, or not for this organisation. One text for both.
        """
        with self.storage.read() as connection:
            run = figures.run_of_file(connection, digest, org)
        if run is None:
            raise VerificationError(f"expected a file that {org} may pull, {digest[:16]}... is not one")
        path = self.files.path(digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:  # Erased this moment, with the end of its run.
            raise VerificationError(f"expected a file that {org} may pull, {digest[:16]}... is not one") from error
        if run:
            with self.storage.write() as connection:
                figures.count_bytes(connection, run, org, down=size)
        return path

    def _begin(self, org: str, place: tuple[str, int], digest: str) -> list[str]:
        """Note that a vector is on its way in, and name the unfinished ones that it puts an end to.

        One vector a round: whoever begins another gives up the first. And a few in all: whoever begins one after the
        other and finishes none must not fill the disk.
        """
        with self._lock:
            mine = self._unfinished.setdefault(org, {})
            given_up = [mine.pop(place)] if mine.get(place, digest) != digest else []
            mine.pop(place, None)
            mine[place] = digest
            while len(mine) > _MOST_UNFINISHED:
                given_up.append(mine.pop(next(iter(mine))))
            wanted = {one for unfinished in self._unfinished.values() for one in unfinished.values()}
        return [one for one in given_up if one not in wanted]

    def _roster(self) -> Roster:
        """The newest roster; parsed once for each version."""
        newest = self.members.version()
        if newest not in self._rosters:
            self._rosters[newest] = self.members.roster()
        return self._rosters[newest]

    def _charter(self, run: str, org: str) -> Charter:
        if run not in self._charters:
            found = self.storage.run(run).charter_digest
            self._charters[run] = Charter.parse(self.files.path(found).read_bytes())
        charter = self._charters[run]
        charter.participant(org)
        return charter

    def _recent(self, org: str) -> list[str]:
        horizon = time.monotonic() - _HANDED_OUT_SECONDS
        with self._lock:
            handed = self._handed.setdefault(org, {})
            for digest in [digest for digest, at in handed.items() if at < horizon]:
                del handed[digest]
            return list(handed)

    def _note(self, org: str) -> None:
        """Note when a member was heard of: for people and for waits, so that a full disk is no reason to refuse it."""
        now = self.clock()
        if now - self._seen.get(org, 0.0) > _SEEN_SECONDS:
            self._seen[org] = now
            with suppress(SQLAlchemyError, DiskTrouble):
                self.members.seen(org, now)


def _context(context: dict[str, Any]) -> tuple[str, int]:
    """The run and round that a pushed file belongs to."""
    run, number = context.get("run"), context.get("round")
    if not isinstance(run, str) or not isinstance(number, int):
        raise VerificationError("expected the run and round of a pushed vector in its header, got something else")
    return run, number
