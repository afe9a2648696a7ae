"""The twelve checks: each refuses by its number, in order, and a good charter passes them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from foedus_protocols import identity
from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.charter import Charter, Participant, sign_charter
from foedus_protocols.charter_checks import Limits, OrgView, Stage, UnitNamespace, check_charter
from foedus_protocols.charter_extension import Earlier, cost, draft_extension
from foedus_protocols.errors import (
    BudgetExhausted,
    ConnectError,
    FoedusError,
    PolicyRefused,
    StateError,
    VerificationError,
)
from foedus_protocols.roster import Roster


@pytest.fixture
def charter(league: Any) -> Charter:
    return league.draft()


@pytest.fixture
def view(league: Any) -> OrgView:
    """What birch knows, with a policy that just allows the league's charter."""
    limits = Limits(
        coordinators=frozenset({league.operator_key}),
        minimum_members=2,
        peers={org: identity.key_fingerprint(league.public(org)) for org in ("ash", "cedar")},
        namespaces={
            "research": UnitNamespace(name="patients", unit="patient", units_at_most=256, epsilon_cap=8.0, delta=1e-5)
        },
        allow_unprotected=False,
        evaluation=frozenset({"none"}),
        max_tokens=256,
        max_records_per_unit=4,
        max_rounds=4,
        max_rate=0.02,
        max_rank=4,
        min_survivors=3,
    )
    return OrgView(
        org="birch",
        signing_key=league.public("birch"),
        federation=league.name,
        operator_key=league.operator_key,
        rosters=league.rosters,
        limits=limits,
        base_configs={league.base: league.config},
        budget=lambda charter, mine: None,
        now=float(league.now),
    )


def check(league: Any, charter: Charter, view: OrgView, stage: Stage = "sign", **changes: Any) -> Charter:
    """Check a charter as its operator offers it."""
    return check_charter(charter.canonical(), charter.digest, league.signature(charter), view, stage=stage, **changes)


def refused(step: int, call: Callable[[], object], text: str = ".") -> None:
    """Expect a refusal with exactly this number."""
    with pytest.raises(PolicyRefused, match=text) as caught:
        call()
    assert caught.value.step == step


def edited(charter: Charter, section: str, **changes: Any) -> Charter:
    """The charter with some fields of a section replaced, valid in form."""
    value = charter.model_dump(mode="json", exclude_none=True)
    value[section] |= changes
    return Charter.parse(canonical_bytes(value))


def limited(view: OrgView, **changes: Any) -> OrgView:
    return replace(view, limits=replace(view.limits, **changes))


def test_a_good_charter_passes_at_both_stages(league: Any, charter: Charter, view: OrgView) -> None:
    assert check(league, charter, view) == charter
    assert check(league, charter, view, "round", agreement=league.agreement(charter)) == charter


def test_step_1_bytes_and_digest(league: Any, charter: Charter, view: OrgView) -> None:
    signature = league.signature(charter)
    spaced = charter.canonical().replace(b",", b", ", 1)
    for data, name in ((charter.canonical(), "0" * 64), (spaced, digest(spaced)), (b"{}", digest(b"{}"))):
        refused(1, lambda data=data, name=name: check_charter(data, name, signature, view, stage="sign"))


def test_step_2_operators_signature(league: Any, charter: Charter, view: OrgView) -> None:
    forged = sign_charter(identity.generate_signing_key(), charter.digest)
    refused(2, lambda: check_charter(charter.canonical(), charter.digest, forged, view, stage="sign"))
    refused(2, lambda: check(league, charter, limited(view, coordinators=frozenset())), "policy.toml")


def test_step_3_validity(league: Any, charter: Charter, view: OrgView) -> None:
    refused(3, lambda: check(league, charter, replace(view, now=float(charter.expires))), "expired")
    early = replace(view, now=charter.not_before - 3600.0)
    check(league, charter, early)
    refused(3, lambda: check(league, charter, early, "round", agreement=league.agreement(charter)), "starts in")
    check(league, charter, replace(view, now=charter.expires - 1.0))


def test_step_4_federation_and_roster(league: Any, charter: Charter, view: OrgView) -> None:
    refused(4, lambda: check(league, charter, replace(view, federation="another")), "federation")
    refused(4, lambda: check(league, charter, replace(view, rosters=league.rosters[:-1])))
    fork = Roster.genesis(league.name).add("ash", league.public("ash"), since=1)
    refused(4, lambda: check(league, charter, replace(view, rosters=[Roster.genesis(league.name), fork])))


def test_step_4_a_newcomer_stops_nothing_a_removed_member_does(league: Any, charter: Charter, view: OrgView) -> None:
    newcomer = identity.public_hex(identity.generate_signing_key())
    grown = league.rosters[-1].add("dogwood", newcomer, since=league.now)
    check(league, charter, replace(view, rosters=[*league.rosters, grown]))
    shrunk = grown.remove("cedar")
    refused(4, lambda: check(league, charter, replace(view, rosters=[*league.rosters, grown, shrunk])), "cedar")
    back = shrunk.add("cedar", league.public("cedar"), since=league.now + 1)
    chain = [*league.rosters, grown, shrunk, back]
    refused(4, lambda: check(league, charter, replace(view, rosters=chain)), "cedar")


def test_step_4_a_key_that_the_roster_does_not_have(league: Any, charter: Charter, view: OrgView) -> None:
    other = identity.public_hex(identity.generate_signing_key())
    swapped = [one.model_dump() | ({"signing_key": other} if one.id == "cedar" else {}) for one in charter.participants]
    value = charter.model_dump(mode="json", exclude_none=True) | {"participants": swapped}
    refused(4, lambda: check(league, Charter.parse(canonical_bytes(value)), view), "cedar")


def test_step_5_we_are_named_by_our_key(league: Any, charter: Charter, view: OrgView) -> None:
    refused(5, lambda: check(league, charter, replace(view, org="yew")))
    refused(5, lambda: check(league, charter, replace(view, signing_key=league.public("ash"))), "our signing key")


def test_step_6_enough_confirmed_members(league: Any, charter: Charter, view: OrgView) -> None:
    refused(6, lambda: check(league, charter, limited(view, minimum_members=3)), "minimum_members")
    some = {"ash": view.limits.peers["ash"]}
    refused(6, lambda: check(league, charter, limited(view, peers=some)), "--confirm cedar")
    wrong = view.limits.peers | {"cedar": view.limits.peers["ash"]}
    refused(6, lambda: check(league, charter, limited(view, peers=wrong)), "confirmed here")


def test_step_7_base_that_we_hold(league: Any, charter: Charter, view: OrgView) -> None:
    refused(7, lambda: check(league, charter, replace(view, base_configs={"0" * 64: league.config})), "bases")


def test_step_8_adapter_as_we_compute_it(league: Any, charter: Charter, view: OrgView) -> None:
    refused(8, lambda: check(league, edited(charter, "adapter", layout_digest="0" * 64), view), "layout")
    refused(8, lambda: check(league, edited(charter, "adapter", length=charter.adapter.length + 1), view), "layout")
    refused(8, lambda: check(league, edited(charter, "adapter", initial_digest="0" * 64), view), "initial")
    wider = league.config | {"hidden_size": 128}
    refused(8, lambda: check(league, charter, replace(view, base_configs={league.base: wider})), "layout")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_tokens": 255}, "max_tokens"),
        ({"max_records_per_unit": 3}, "max_records_per_unit"),
        ({"max_rounds": 3}, "rounds"),
        ({"max_rate": 0.019}, "rate"),
        ({"max_rank": 3}, "rank"),
        ({"max_parameters": 100}, "parameters"),
        ({"namespaces": {}}, "purpose"),
        ({"evaluation": frozenset()}, "evaluation"),
    ],
)
def test_step_9_bounds(league: Any, charter: Charter, view: OrgView, changes: dict[str, Any], text: str) -> None:
    refused(9, lambda: check(league, charter, limited(view, **changes)), text)


def test_step_9_records_within_the_models_text(league: Any, charter: Charter, view: OrgView) -> None:
    for positions in (charter.recipe.max_tokens, charter.recipe.max_tokens - 1):
        short = league.config | {"max_position_embeddings": positions}
        held = replace(view, base_configs={league.base: short})
        if positions < charter.recipe.max_tokens:
            refused(9, lambda: check(league, charter, held), "longest text")  # noqa: B023
        else:
            check(league, charter, held)


def test_an_adapter_beyond_our_bounds_is_refused_before_it_is_made(
    league: Any, charter: Charter, view: OrgView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foedus_protocols.layout.initial_digest", Mock(side_effect=AssertionError("made")))
    refused(9, lambda: check(league, charter, limited(view, max_parameters=100)), "parameters of at most 100")


def test_step_9_plain_evaluation_must_be_allowed(league: Any, charter: Charter, view: OrgView) -> None:
    plain = edited(charter, "evaluation", term="plain")
    refused(9, lambda: check(league, plain, view), "plain")
    check(league, plain, limited(view, evaluation=frozenset({"plain"})))


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"unit": "visit"}, "visit"), ({"units_at_most": 512}, "512"), ({"delta": 5e-6}, "delta")],
)
def test_step_10_declared_constants(
    league: Any, charter: Charter, view: OrgView, changes: dict[str, Any], text: str
) -> None:
    declared = {"research": replace(view.limits.namespaces["research"], **changes)}
    refused(10, lambda: check(league, charter, limited(view, namespaces=declared)), text)


def test_step_10_delta_of_at_most_a_tenth_of_the_units(league: Any, charter: Charter, view: OrgView) -> None:
    loose = {"research": replace(view.limits.namespaces["research"], delta=0.5)}
    # 1/(10 x 256) = 3.90625e-4
    check(league, edited(charter, "privacy", delta=3.9e-4), limited(view, namespaces=loose))
    refused(
        10, lambda: check(league, edited(charter, "privacy", delta=3.91e-4), limited(view, namespaces=loose)), "delta"
    )


@pytest.mark.parametrize("field", ["sampling_prob", "expected_units", "weight"])
def test_step_10_constants_of_everybody_follow_the_rule(
    league: Any, charter: Charter, view: OrgView, field: str
) -> None:
    one = charter.participants[2]
    bent = [*charter.participants[:2], one.model_copy(update={field: getattr(one, field) * 0.99})]
    value = charter.model_dump(mode="json", exclude_none=True) | {"participants": [each.model_dump() for each in bent]}
    refused(10, lambda: check(league, Charter.parse(canonical_bytes(value)), view), "cedar")


def test_step_10_our_own_accountant_must_find_the_promise_kept(league: Any, charter: Charter, view: OrgView) -> None:
    refused(10, lambda: check(league, edited(charter, "privacy", epsilon=7.9), view), "promises")
    refused(10, lambda: check(league, edited(charter, "privacy", delta=9e-6), view), "promises")


def test_step_10_mode_none_needs_permission(league: Any, view: OrgView) -> None:
    open_terms = league.draft(privacy={"mode": "none", "rounds": 4}, seed=1)
    refused(10, lambda: check(league, open_terms, view), "allow_unprotected")
    check(league, open_terms, limited(view, allow_unprotected=True))


def test_step_10_asks_the_ledger_about_us(league: Any, charter: Charter, view: OrgView) -> None:
    asked: list[str] = []

    def exhausted(charter: Charter, mine: Participant) -> None:
        asked.append(mine.id)
        raise BudgetExhausted(10, "spent")

    refused(10, lambda: check(league, charter, replace(view, budget=exhausted)), "spent")
    assert asked == ["birch"]


def test_step_11_survivors_and_bound(league: Any, charter: Charter, view: OrgView) -> None:
    refused(11, lambda: check(league, edited(charter, "masks", min_survivors=2), view), "min_survivors")
    refused(11, lambda: check(league, edited(charter, "masks", min_survivors=4), view), "min_survivors")
    bound = charter.masks.update_bound
    refused(11, lambda: check(league, edited(charter, "masks", update_bound=bound * 1.01), view), "update_bound")


def test_step_11_two_participants_at_least(league: Any, view: OrgView) -> None:
    alone = league.draft(participants=[league.toml()["participants"][1]])
    refused(11, lambda: check(league, alone, limited(view, minimum_members=0, min_survivors=1)), "at least 2")


def test_step_12_everyone_signed_before_a_round(league: Any, charter: Charter, view: OrgView) -> None:
    refused(12, lambda: check(league, charter, view, "round"), "got none")
    agreement = league.agreement(charter)
    short = agreement.model_copy(update={"signatures": {"ash": agreement.signatures["ash"]}})
    refused(12, lambda: check(league, charter, view, "round", agreement=short), "birch, cedar")


def test_the_first_failure_is_the_one_that_is_told(league: Any, charter: Charter, view: OrgView) -> None:
    bad_everywhere = replace(limited(view, max_rounds=1, minimum_members=9), federation="another", base_configs={})
    refused(4, lambda: check(league, charter, bad_everywhere))
    refused(6, lambda: check(league, charter, replace(bad_everywhere, federation=league.name)))


# Extensions.


@pytest.fixture
def extension(league: Any, charter: Charter) -> Charter:
    """Two rounds more than the league's four."""
    drawn, _ = draft_extension(
        charter, first=charter, run="first-1", history="f" * 64, adapter="a" * 64, opened=4, rounds=2,
        roster=league.rosters[-1], now=league.now, valid_seconds=86_400,
    )  # fmt: skip
    return drawn


def with_earlier(view: OrgView, charter: Charter, **changes: Any) -> OrgView:
    """A view that replayed the ended run, with a policy for six rounds in all."""
    earlier = Earlier(**({"charters": (charter,), "adapter": "a" * 64, "rounds": 4} | changes))
    return replace(limited(view, max_rounds=6), earlier=lambda extension: earlier)


def test_an_extension_passes_at_both_stages(league: Any, charter: Charter, extension: Charter, view: OrgView) -> None:
    ready = with_earlier(view, charter)
    check(league, extension, ready)
    # Before a round nothing is replayed here: the round itself does, down to the same start.
    check(league, extension, limited(view, max_rounds=6), "round", agreement=league.agreement(extension))


def test_step_8_an_extension_is_replayed_before_it_is_signed(
    league: Any, charter: Charter, extension: Charter, view: OrgView
) -> None:
    refused(8, lambda: check(league, extension, with_earlier(view, charter, adapter="b" * 64)), "follows from the sums")
    refused(8, lambda: check(league, extension, with_earlier(view, charter, rounds=5)), "at least 5 rounds")
    refused(8, lambda: check(league, extension, limited(view, max_rounds=6)), "cannot here")
    refused(8, lambda: check(league, edited(extension, "adapter", layout_digest="0" * 64), view), "layout")

    def unsigned(extension: Charter) -> Earlier:
        raise VerificationError("not signed here")

    refused(8, lambda: check(league, extension, replace(limited(view, max_rounds=6), earlier=unsigned)), "not signed")


@pytest.mark.parametrize("trouble", [ConnectError("the line is cut"), StateError("the disk is full")])
def test_trouble_in_fetching_what_is_extended_is_no_refusal(
    league: Any, extension: Charter, view: OrgView, trouble: FoedusError
) -> None:
    def fails(extension: Charter) -> Earlier:
        raise trouble

    with pytest.raises(type(trouble)) as caught:
        check(league, extension, replace(view, earlier=fails))
    assert caught.value is trouble


def test_step_9_bounds_the_rounds_of_the_whole_chain(
    league: Any, charter: Charter, extension: Charter, view: OrgView
) -> None:
    refused(9, lambda: check(league, extension, limited(with_earlier(view, charter), max_rounds=5)), "at most 5, got 6")


def test_step_10_an_extension_promises_for_everything_spent_by_the_filter(
    league: Any, charter: Charter, extension: Charter, view: OrgView
) -> None:
    ready = with_earlier(view, charter)
    # PLD over the six rounds is not enough: whether to extend was decided after four of them.
    pld = cost(extension, extension.participants[1], rounds=2, first=charter).pld
    refused(10, lambda: check(league, edited(extension, "privacy", epsilon=pld + 0.1), ready), "promises")
    refused(10, lambda: check(league, edited(extension, "privacy", epsilon=8.0), ready), "promises")
