"""What each message is answered with: five types of question, and for each who decides.

Trouble of our own leaves as an empty answer, a failed check as its number. What can be tried again (a broken line, a
full disk) is raised, and the message comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter, Participant
from foedus_protocols.charter_checks import OrgView, Stage, check_charter
from foedus_protocols.console import printable
from foedus_protocols.envelope import Envelope
from foedus_protocols.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FoedusError,
    PolicyRefused,
    PrivacyCheckFailed,
    RoundFailed,
    StateError,
    UsageError,
    VerificationError,
)
from foedus_protocols.files import DiskTrouble
from foedus_protocols.messages import (
    AdvanceOrder,
    Agreement,
    Body,
    CharterAnswer,
    CharterOffer,
    CloseAnswer,
    CloseNotice,
    EvaluateAnswer,
    EvaluateOrder,
    TrainAnswer,
    TrainOrder,
)
from foedus_protocols.roster import Roster

from foedus_client import offers, policy, replay
from foedus_client import round as rounds
from foedus_client.config import Home, Membership
from foedus_client.gate import Permit
from foedus_client.ledger import Ledger
from foedus_client.life import require_not_left
from foedus_client.membership import org_view
from foedus_client.offers import OfferDesk
from foedus_client.seat import Ports, Seat, take_seat
from foedus_client.state import CharterRecord, ClientState

_LOG = logging.getLogger("foedus.client")

_REASON_CHARACTERS = 500
_BUDGET_CHECK = 10

Answer = tuple[Body, Permit]


@dataclass(kw_only=True)
class Answers:
    """One organisation's answers in every run of its federation.

    Attributes:
        rosters: The roster chain as the last greeting found it.
    """

    home: Home
    us: Membership
    state: ClientState
    ledger: Ledger
    signing_key: Ed25519PrivateKey
    clock: Callable[[], float]
    rosters: list[Roster] = field(default_factory=list)
    _seats: dict[str, Seat] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)

    def to(self, question: Envelope, ports: Ports) -> Answer | None:
        """Act on a message; None where a person has to decide first.

        Raises:
            ConnectError, DiskTrouble: It can be tried again.
            FoedusError: It cannot be answered.
        """
        kind, run, data = question.header.type, question.header.run, question.body
        if kind == "charter":
            return offers.consider(CharterOffer.decode(data), run, self._offer_desk(ports))
        if kind == "train":
            return self._train(TrainOrder.decode(data), run, ports)
        if kind == "evaluate":
            return self._evaluate(EvaluateOrder.decode(data), run, ports)
        if kind == "advance":
            order = AdvanceOrder.decode(data)
            return rounds.advance(order, self._seat(order.charter_digest, run, ports, trains=False), ports)
        if kind == "close":
            return self._close(CloseNotice.decode(data), run, ports)
        raise VerificationError(f"expected one of five message types, got {kind!r}")

    def instead(self, question: Envelope) -> Answer | None:
        """What is said to a message that fails again and again, where its type has an answer that says nothing."""
        header = question.header
        permit = Permit(run=header.run, round=header.round)
        if header.type == "train":
            return TrainAnswer(), permit
        if header.type == "evaluate":
            return EvaluateAnswer(), permit
        if header.type == "charter":
            self._refuse_unread(question)
            return CharterAnswer(refused_step=_BUDGET_CHECK), permit
        return None

    def _refuse_unread(self, question: Envelope) -> None:
        try:
            digest = CharterOffer.decode(question.body).charter_digest
        except VerificationError:
            return
        if self.state.knows(digest):
            reason = "it could not be judged here, again and again; see the daemon's log"
            self.state.mark_refused(digest, step=_BUDGET_CHECK, reason=reason)

    def _train(self, order: TrainOrder, run: str, ports: Ports) -> Answer:
        permit = Permit(charter=order.charter_digest, run=run, round=order.round)
        try:
            return rounds.take_part(order, self._seat(order.charter_digest, run, ports), ports)
        except FoedusError as error:
            step = refusal_of(error)
            _LOG.error("round %d: no vector: %s", order.round, error)
            return TrainAnswer(refused_step=step), permit

    def _evaluate(self, order: EvaluateOrder, run: str, ports: Ports) -> Answer:
        permit = Permit(charter=order.charter_digest, run=run, round=order.round)
        try:
            return rounds.evaluate(order, self._seat(order.charter_digest, run, ports), ports)
        except FoedusError as error:
            step = refusal_of(error)
            _LOG.error("round %d: no scores: %s", order.round, error)
            return EvaluateAnswer(refused_step=step), permit

    def _close(self, notice: CloseNotice, run: str, ports: Ports) -> Answer:
        if self.state.knows(notice.charter_digest):
            self._known(notice.charter_digest, run)
            answer: Answer = rounds.close(notice, run, ports)
        else:
            answer = CloseAnswer(), Permit(charter=notice.charter_digest, run=run)
        self._seats.pop(notice.charter_digest, None)
        self._waiting.discard(notice.charter_digest)
        _LOG.info("run %s is over: %s (%s)", run, notice.outcome, printable(notice.reason)[:_REASON_CHARACTERS])
        return answer

    # What an answer stands on.

    def _offer_desk(self, ports: Ports) -> OfferDesk:
        return OfferDesk(
            state=self.state,
            ledger=self.ledger,
            pull=ports.pull,
            view=lambda run: replace(
                self._view("sign", run),
                earlier=lambda charter: replay.earlier(charter, self.us.org, ports, self.ledger),
            ),
            auto_sign=lambda: policy.load(self.home.policy).auto_sign,
            signing_key=self.signing_key,
            waiting=self._waiting,
        )

    def _view(self, stage: Stage, run: str) -> OrgView:
        return org_view(
            self.us,
            policy=policy.load(self.home.policy),
            ledger=self.ledger,
            rosters=self.rosters,
            signing_key=self.signing_key,
            stage=stage,
            run=run,
            now=self.clock(),
        )

    def _known(self, charter_digest: str, run: str) -> CharterRecord:
        record = self.state.charter(charter_digest)
        if record.run != run:
            raise VerificationError(f"expected charter {charter_digest[:12]} in run {record.run}, got it in {run}")
        return record

    def _seat(self, charter_digest: str, run: str, ports: Ports, *, trains: bool = True) -> Seat:
        """Our seat in a run that we signed and that is not over.

        Whoever left a run still says which adapter follows from its published sums, so that the others need not wait.
        """
        record = self._known(charter_digest, run)
        if trains:
            require_not_left(self.state, charter_digest)
        if record.state not in ("signed", "agreed", "left"):
            raise PolicyRefused(3, f"expected a charter that we signed and that goes on, this one is {record.state}")
        if charter_digest not in self._seats:
            data = ports.pull(charter_digest, MAX_CHARTER_BYTES).read_bytes()
            self._seats[charter_digest] = self._make_seat(data, record)
        return self._seats[charter_digest]

    def _make_seat(self, data: bytes, record: CharterRecord) -> Seat:
        def check(agreement: Agreement, spends: bool) -> None:
            view = self._view("round", record.run)
            if not spends:
                view = replace(view, budget=_nothing_to_cover)
            check_charter(data, record.digest, record.operator_signature, view, stage="round", agreement=agreement)

        charter, rules = Charter.parse(data), policy.load(self.home.policy)
        split_key = self.home.split_key(rules.dataset_for(charter.purpose).namespace)
        return take_seat(charter, record.run, self.us, rules=rules, split_key=split_key, check=check)


def _nothing_to_cover(charter: Charter, mine: Participant) -> None:
    """The ledger's part of check 10 where nothing is spent."""


def refusal_of(error: FoedusError) -> int | None:
    """What leaves instead of a vector: a failed check's number, or nothing where the trouble is our own.

    Raises:
        FoedusError: The same error again, where the message is to be tried again.
    """
    if isinstance(error, DiskTrouble):
        raise error
    if isinstance(error, PolicyRefused):
        return error.step
    if isinstance(error, PrivacyCheckFailed):
        return _BUDGET_CHECK
    if isinstance(error, VerificationError):
        return 8
    if isinstance(error, DataError | CheckpointError | ConfigError | RoundFailed | StateError | UsageError):
        return None
    raise error
