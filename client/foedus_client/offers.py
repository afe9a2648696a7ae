"""What happens to an offered charter: eleven checks, a decision, a signature with its allotment.

A daemon signs by itself only where its policy says `auto_sign`. Otherwise the offer waits in ``client.db`` until a
person runs `foedus client charter approve` or `refuse`. Of a refusal only the failed check's number leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter
from foedus_protocols.charter_checks import OrgView, check_charter
from foedus_protocols.errors import PolicyRefused, StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.messages import CharterAnswer, CharterOffer

from foedus_client.budget import admit_charter
from foedus_client.gate import PERSON_DECLINED, Permit
from foedus_client.ledger import Ledger
from foedus_client.life import LEFT
from foedus_client.state import CharterRecord, ClientState

_LOG = logging.getLogger("foedus.client")

UNREADABLE = "(unreadable)"


@dataclass(frozen=True, kw_only=True)
class OfferDesk:
    """What a decision needs.

    Attributes:
        view: The organisation's knowledge at the stage of signing, for one run; read afresh for each offer.
        auto_sign: The policy's word on signing without a person; read afresh.
        waiting: Offers that passed the checks and wait for a person; they are checked again when one has decided.
    """

    state: ClientState
    ledger: Ledger
    pull: Callable[[str, int], Path]
    view: Callable[[str], OrgView]
    auto_sign: Callable[[], bool]
    signing_key: Ed25519PrivateKey
    waiting: set[str] = field(default_factory=set)


def consider(offer: CharterOffer, run: str, desk: OfferDesk) -> tuple[CharterAnswer, Permit] | None:
    """Sign, refuse, or wait for a person (None).

    Raises:
        ConnectError: The charter could not be fetched; the offer will come again.
        DiskTrouble: Nothing can be written down now; the offer will come again.

    Guarantees:
        A signature is made inside the ledger's transaction that allots the charter's events, and nowhere else. Asked
        again, the same answer is given.
    """
    digest = offer.charter_digest
    data = _fetch(digest, desk)
    name, purpose = _title(data)
    record = desk.state.note_offer(
        digest=digest, run=run, name=name, purpose=purpose, operator_signature=offer.operator_signature
    )
    if record.state == "offered" and digest in desk.waiting:
        return None
    if (admitted := desk.ledger.admission(digest)) is not None:
        desk.state.mark_signed(digest, admitted.signature)
        return _signed(admitted.signature, digest, run)
    if desk.state.was_left(digest):
        return _refused(LEFT, digest, run)
    if record.state in ("refused", "declined", "closed"):
        return _refused(record.refused_step or PERSON_DECLINED, digest, run)
    try:
        view = desk.view(run)
        charter = check_charter(data, digest, offer.operator_signature, view, stage="sign")
        if not desk.auto_sign() and record.state != "approved":
            _ask(record, desk)
            return None
        admission = admit_charter(desk.ledger, view.limits, charter, view.org, signing_key=desk.signing_key)
    except PolicyRefused as error:
        _LOG.error("charter %s (%s) refused: %s", digest[:12], name, error)
        desk.state.mark_refused(digest, step=error.step, reason=str(error))
        return _refused(error.step, digest, run)
    except DiskTrouble:
        raise
    except (StateError, VerificationError) as error:  # The ledger cannot take this charter on.
        _LOG.error("charter %s (%s) refused: %s", digest[:12], name, error)
        desk.state.mark_refused(digest, step=10, reason=str(error))
        return _refused(10, digest, run)
    desk.waiting.discard(digest)
    desk.state.mark_signed(digest, admission.signature)
    _LOG.info(
        "charter %s (%s) signed: epsilon of the namespace up to %.4g (%s)",
        digest[:12],
        name,
        admission.epsilon,
        admission.accountant,
    )
    return _signed(admission.signature, digest, run)


def _fetch(digest: str, desk: OfferDesk) -> bytes:
    """The charter's bytes; empty where the coordinator has none of that digest and size, which check 1 then refuses."""
    try:
        return desk.pull(digest, MAX_CHARTER_BYTES).read_bytes()
    except VerificationError:
        return b""


def _title(data: bytes) -> tuple[str, str]:
    try:
        charter = Charter.parse(data)
    except VerificationError:
        return UNREADABLE, UNREADABLE
    return charter.name, charter.purpose


def _ask(record: CharterRecord, desk: OfferDesk) -> None:
    desk.waiting.add(record.digest)
    _LOG.warning(
        "charter %s (%s) passed the checks and waits for a person: `foedus client charter show|approve|refuse`",
        record.digest[:12],
        record.name,
    )


def _signed(signature: str, digest: str, run: str) -> tuple[CharterAnswer, Permit]:
    return CharterAnswer(signature=signature), Permit(charter=digest, run=run, signature=signature)


def _refused(step: int, digest: str, run: str) -> tuple[CharterAnswer, Permit]:
    return CharterAnswer(refused_step=step), Permit(charter=digest, run=run)
