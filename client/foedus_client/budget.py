"""Between a charter and the ledger: which events, at which delta, under which cap.

One place, so that what was asked before signing, what is allotted, and what is asked before a round are the same
question.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.charter import Charter, Participant, charter_events, noise_slack, round_event, sign_charter
from foedus_protocols.charter_checks import Limits, Stage, UnitNamespace

from foedus_client.allotments import Judgement
from foedus_client.ledger import Admission, Ledger


def budget_check(
    ledger: Ledger, limits: Limits, stage: Stage, run: str | None = None
) -> Callable[[Charter, Participant], None]:
    """The ledger's answer to check 10, as `OrgView.budget` takes it.

    The returned function raises BudgetExhausted or StateError. It writes nothing but the chain of a namespace that
    has none.

    Args:
        ledger: The organisation's ledger.
        limits: Its policy.
        stage: Before signing, or before a round.
        run: Under which the charter comes: one that a person's statement covers is over for us, and refused.
    """

    def check(charter: Charter, mine: Participant) -> None:
        namespace = limits.namespaces[charter.purpose]
        if run is not None:
            ledger.require_not_stated(run)
        if stage == "round":
            ledger.require_allotted(namespace.name, charter.digest, round_event(charter, mine))
            return
        expected_epsilon(ledger, limits, charter, mine.id)

    return check


def expected_epsilon(ledger: Ledger, limits: Limits, charter: Charter, org: str) -> Judgement:
    """What the namespace would reach with this charter; of one that holds an allotment, what its admission said.

    It writes nothing but the chain of a namespace that has none.

    Raises:
        BudgetExhausted: The cap would be passed.
        StateError: Another charter goes on from the run that this one extends.
        VerificationError: The charter does not name us, or its noise tables' slack leaves nothing of delta.
    """
    mine = charter.participant(org)
    namespace = limits.namespaces[charter.purpose]
    ledger.open_namespace(namespace.name, unit=namespace.unit)
    return ledger.require_fits(
        namespace.name,
        charter.digest,
        charter_events(charter, mine),
        namespace.delta,
        namespace.epsilon_cap,
        delta_slack=_slack(charter, mine, namespace),
        extends=_extended(charter),
    )


def admit_charter(
    ledger: Ledger, limits: Limits, charter: Charter, org: str, *, signing_key: Ed25519PrivateKey
) -> Admission:
    """Sign a charter that passed its checks and was approved, and allot its events, in one transaction.

    Raises:
        BudgetExhausted: Something else was admitted since, and the cap would now be passed. Nothing was signed.
        StateError: The charter was left before, after rounds of it were spent, or another one goes on from the run
            that it extends.
    """
    mine = charter.participant(org)
    namespace = limits.namespaces[charter.purpose]
    ledger.open_namespace(namespace.name, unit=namespace.unit)
    return ledger.admit(
        namespace.name,
        charter.digest,
        charter_events(charter, mine),
        namespace.delta,
        namespace.epsilon_cap,
        expires=charter.expires,
        sign=lambda: sign_charter(signing_key, charter.digest),
        delta_slack=_slack(charter, mine, namespace),
        extends=_extended(charter),
        details={
            "name": charter.name,
            "mode": charter.privacy.mode,
            "adjacency": charter.privacy.adjacency,
            "unit": mine.unit,
            "l2_clip_norm": charter.privacy.l2_clip_norm,
            "rounds": charter.privacy.rounds,
        },
    )


def _extended(charter: Charter) -> str | None:
    return None if charter.extends is None else charter.extends.charter


def _slack(charter: Charter, mine: Participant, namespace: UnitNamespace) -> float:
    """What the noise table costs this charter at the namespace's cap, which is what the ledger claims."""
    steps = sum(event.steps for event in charter_events(charter, mine))
    return noise_slack(length=charter.adapter.length, steps=steps, epsilon=namespace.epsilon_cap)
