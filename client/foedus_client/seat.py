"""An organisation's seat in one run: the charter, what follows from it for us, and the ports of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foedus_protocols import accounting
from foedus_protocols.charter import Charter, Participant, charter_events, delta_for_accountant
from foedus_protocols.codec import Coding
from foedus_protocols.errors import VerificationError
from foedus_protocols.messages import Agreement
from foedus_protocols.rules import Rule
from foedus_protocols.store import FileStore

from foedus_client.config import Membership
from foedus_client.gate import Gate
from foedus_client.ledger import Ledger
from foedus_client.policy import Policy
from foedus_client.state import ClientState
from foedus_client.work import CheckTask, Setup, StepTermsTask, Tick, WorkerPort


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run as far as replaying it goes: what its sums mean, and how they turn into the next adapter.

    Attributes:
        org: Our own id, one of the charter's participants.
        run: The run's id, from the first offer; part of the coding keys.
    """

    charter: Charter
    org: str
    run: str

    @cached_property
    def digest(self) -> str:
        """The charter's digest."""
        return self.charter.digest

    @cached_property
    def coding(self) -> Coding:
        """The ring in which vectors are added."""
        return self.charter.coding()

    @cached_property
    def rule(self) -> Rule:
        """How the sum turns into the next adapter."""
        return self.charter.rule()

    def weights(self, orgs: list[str]) -> list[float]:
        """w_i / max w of some participants, in their order."""
        return [self.charter.relative_weight(org) for org in orgs]


@dataclass(frozen=True, kw_only=True)
class Seat(Course):
    """Everything about a run that does not change from round to round.

    Attributes:
        namespace: The unit namespace that the run draws on, by our own policy.
        setup: What the worker has to hold for this run.
        check: Steps 1 to 12 of ``docs/protocol.md`` section 2, given everyone's signatures and whether what follows
            spends a round's budget. It raises and returns nothing.
    """

    federation: str
    operator_key: str
    namespace: str
    setup: Setup
    check: Callable[[Agreement, bool], None]

    @cached_property
    def me(self) -> Participant:
        """Our constants."""
        return self.charter.participant(self.org)

    @property
    def terms(self) -> StepTermsTask:
        """Our step's constants, for the worker."""
        return StepTermsTask(
            private=self.charter.private,
            l2_clip_norm=self.charter.privacy.l2_clip_norm,
            noise_multiplier=self.me.noise_multiplier,
            sampling_prob=self.me.sampling_prob,
            expected_units=self.me.expected_units,
            seed=self.charter.seed,
        )

    def check_task(self) -> CheckTask:
        """What the worker checks before round 1: in a private mode against the promise of the charter's events."""
        if not self.charter.private:
            return CheckTask(terms=self.terms)
        events, delta = charter_events(self.charter, self.me), delta_for_accountant(self.charter, self.me)
        return CheckTask(
            terms=self.terms,
            steps=sum(event.steps for event in events),
            delta=delta,
            epsilon=accounting.epsilon(events, delta),
        )

    def scores_allowed(self, after: int, *, last: bool) -> bool:
        """Whether scores of the adapter after so many closed rounds may leave: every so many, and the last one's."""
        term = self.charter.evaluation
        due = last or after % term.every == 0
        return term.term == "plain" and due and 0 <= after <= self.charter.privacy.rounds


def take_seat(
    charter: Charter,
    run: str,
    us: Membership,
    *,
    rules: Policy,
    split_key: str,
    check: Callable[[Agreement, bool], None],
) -> Seat:
    """Our seat under a charter, on the data set and the base that our policy has for it.

    Raises:
        PolicyRefused: The policy no longer allows the purpose (step 9) or the base (step 7).
    """
    data = rules.dataset_for(charter.purpose)
    setup = Setup(
        base=str(rules.base_path(charter.base)),
        base_digest=charter.base,
        targets=charter.adapter.targets,
        layers=None if charter.adapter.layers is None else list(charter.adapter.layers),
        train=charter.adapter.trains,
        rank=charter.adapter.rank,
        alpha=charter.adapter.alpha,
        adapter_seed=charter.adapter.seed,
        layout_digest=charter.adapter.layout_digest,
        files=data.files,
        units=data.units,
        columns=data.columns,
        split_key=split_key,
        max_tokens=charter.recipe.max_tokens,
        max_records_per_unit=charter.recipe.max_records_per_unit,
    )
    return Seat(
        charter=charter,
        org=us.org,
        run=run,
        federation=us.federation,
        operator_key=us.operator_key,
        namespace=data.namespace,
        setup=setup,
        check=check,
    )


def _no_tick() -> None:
    return None


def _say_nothing(what: str) -> None:
    return None


def _no_base(base: str) -> Mapping[str, Any]:
    raise VerificationError(f"expected the config.json of base {base[:12]} to start an adapter from, have none here")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a replay reaches for. Nothing leaves through it.

    Attributes:
        pull: Fetch a file by digest into `store` and return its path; at once where the store has it. The second
            argument is the longest that it may be, in bytes: a coordinator must not fill our disk or memory.
        work: Folder shared with the worker; nothing in it outlives a run.
        tick: Called between two steps of long work; it may end it by an exception.
        base_config: The ``config.json`` of a base by its digest: an A that trains starts from the layout on it.
    """

    state: ClientState
    store: FileStore
    pull: Callable[[str, int], Path]
    work: Path
    tick: Tick = _no_tick
    base_config: Callable[[str], Mapping[str, Any]] = _no_base


@dataclass(frozen=True, kw_only=True)
class Ports(Sources):
    """What a round reaches for. Everything that leaves goes through `gate`.

    Attributes:
        clock: Unix seconds of the coordinator's clock.
        doing: Takes one line of what is done now, for `foedus client status`.
    """

    ledger: Ledger
    gate: Gate
    worker: WorkerPort
    clock: Callable[[], float] = time.time
    doing: Callable[[str], None] = _say_nothing
