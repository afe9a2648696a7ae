"""Extensions: what they may change, where they start, and what they cost with everything before them."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_protocols import accounting
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter, charter_events, delta_for_accountant
from foedus_protocols.charter_extension import (
    Earlier,
    cost,
    draft_extension,
    filter_order,
    require_follows,
    require_same_terms,
)
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.identity import generate_signing_key, public_hex

ADAPTER = "a" * 64
HISTORY = "f" * 64


def extended(league: Any, old: Charter, **changes: Any) -> tuple[Charter, dict[str, Any]]:
    values: dict[str, Any] = {
        "first": old, "run": "first-1", "history": HISTORY, "adapter": ADAPTER, "opened": 4, "rounds": 2,
        "roster": league.rosters[-1], "now": league.now + 1000, "valid_seconds": 86_400,
    }  # fmt: skip
    return draft_extension(old, **(values | changes))


def edited(charter: Charter, section: str | None, **changes: Any) -> Charter:
    value = charter.model_dump(mode="json", exclude_none=True)
    if section is None:
        value |= changes
    else:
        value[section] |= changes
    return Charter.parse(canonical_bytes(value))


def test_terms_stay_and_the_promise_covers_what_is_spent(league: Any) -> None:
    old = league.draft()
    charter, costs = extended(league, old)
    require_same_terms(charter, old)
    assert (charter.participants, charter.masks, charter.recipe) == (old.participants, old.masks, old.recipe)
    assert (charter.privacy.rounds, charter.extends.rounds_spent) == (2, 4)
    assert (charter.not_before, charter.expires) == (league.now + 1000, league.now + 87_400)
    assert charter.adapter.initial_digest == charter.extends.adapter == ADAPTER
    # Only its own rounds are allotted: those before it are in the ledger already.
    assert [event.steps for event in charter_events(charter, charter.participants[0])] == [2]
    for participant in charter.participants:
        event = accounting.Event(
            noise_multiplier=participant.noise_multiplier, sampling_prob=participant.sampling_prob, steps=6
        )
        pld = accounting.epsilon([event], delta_for_accountant(charter, participant))
        assert costs[participant.id].pld == pytest.approx(pld)
        assert 8.0 < pld < costs[participant.id].filter <= charter.privacy.epsilon
    assert charter.privacy.epsilon < max(one.filter for one in costs.values()) + 3e-4


def test_the_order_is_the_first_charters_along_a_whole_chain(league: Any) -> None:
    old = league.draft()
    second, _ = extended(league, old)
    third, costs = extended(league, second, first=old, run="second-1", opened=2)
    assert third.extends.rounds_spent == 6
    mine = third.participants[0]
    delta = delta_for_accountant(third, mine)
    event = accounting.Event(noise_multiplier=mine.noise_multiplier, sampling_prob=mine.sampling_prob, steps=8)
    order = filter_order(old, old.participants[0])
    assert costs[mine.id].filter == accounting.epsilon_rdp([event], delta, order=order)
    # An extension must not stand in for the first charter: its promise was chosen after results were seen.
    with pytest.raises(VerificationError, match="began a chain"):
        cost(third, mine, rounds=2, first=second)
    with pytest.raises(VerificationError, match="began a chain"):
        filter_order(league.draft(privacy={"mode": "none", "rounds": 4}, seed=1), mine)


def test_a_run_that_was_stopped_early_may_promise_less_than_it_did(league: Any) -> None:
    old = league.draft(privacy={"epsilon": 8, "delta": 1e-5, "rounds": 40})
    charter, _ = extended(league, old, opened=2, rounds=1)
    assert charter.privacy.epsilon < old.privacy.epsilon


def test_without_an_extension_the_cost_is_the_plds(league: Any) -> None:
    charter = league.draft()
    for participant in charter.participants:
        found = cost(charter, participant, rounds=4, first=charter)
        assert found.filter == found.pld <= 8.0
        assert cost(charter, participant, rounds=3, first=charter).filter < found.filter
        assert cost(charter, participant, rounds=0, first=charter).filter == 0


def test_mode_none_costs_nothing_and_keeps_its_seed(league: Any) -> None:
    old = league.draft(privacy={"mode": "none", "rounds": 4}, seed=1)
    charter, costs = extended(league, old)
    assert (charter.seed, charter.privacy.epsilon, costs) == (1, None, {})


def test_too_many_rounds_are_refused_before_anybody_is_asked(league: Any) -> None:
    with pytest.raises(ConfigError, match=r"at most epsilon 100 after 5004 rounds"):
        extended(league, league.draft(), rounds=5000)


def test_participants_must_be_members_under_their_keys(league: Any) -> None:
    old, roster = league.draft(), league.rosters[-1]
    gone = roster.remove("birch")
    with pytest.raises(ConfigError, match=r"'birch'.*is not"):
        extended(league, old, roster=gone)
    with pytest.raises(ConfigError, match=r"'birch'.*another key"):
        extended(league, old, roster=gone.add("birch", public_hex(generate_signing_key()), since=1))
    # A newcomer stops nothing and is not in it.
    grown = roster.add("dogwood", public_hex(generate_signing_key()), since=1)
    charter, _ = extended(league, old, roster=grown)
    assert charter.roster_digest == grown.digest
    assert [one.id for one in charter.participants] == ["ash", "birch", "cedar"]


@pytest.mark.parametrize(
    ("section", "changes", "text"),
    [
        (None, {"purpose": "advertising"}, "purpose"),
        (None, {"base": "c" * 64}, "base"),
        (None, {"name": "second"}, "name"),
        ("adapter", {"alpha": 64.0}, r"adapter\.alpha"),
        ("privacy", {"l2_clip_norm": 0.3}, r"privacy\.l2_clip_norm"),
        ("privacy", {"delta": 2e-5}, r"privacy\.delta"),
        ("recipe", {"max_tokens": 128}, "recipe"),
        ("masks", {"min_survivors": 2}, "masks"),
        ("schedule", {"vector_slot_seconds": 60}, "schedule"),
        ("evaluation", {"term": "plain"}, "evaluation"),
        ("release", {"recipients": "everybody"}, "release"),
    ],
)
def test_other_terms_are_refused_by_name(league: Any, section: str | None, changes: dict[str, Any], text: str) -> None:
    old = league.draft()
    charter = edited(extended(league, old)[0], section, **changes)
    with pytest.raises(VerificationError, match=text):
        require_same_terms(charter, old)


def test_no_participant_is_added_left_out_or_given_other_constants(league: Any) -> None:
    old = league.draft()
    charter, _ = extended(league, old)
    bent = [one.model_dump() for one in charter.participants]
    bent[0]["noise_multiplier"] *= 1.5
    for participants in (charter.model_dump()["participants"][:2], bent):
        with pytest.raises(VerificationError, match="participants"):
            require_same_terms(edited(charter, None, participants=list(participants)), old)


def test_it_must_extend_that_very_charter_and_count_on(league: Any) -> None:
    old = league.draft()
    charter, _ = extended(league, old)
    with pytest.raises(VerificationError, match="another charter"):
        require_same_terms(charter, league.draft(valid_days=2))
    with pytest.raises(VerificationError, match="another charter"):
        require_same_terms(old, old)
    third, _ = extended(league, charter, first=old, run="second-1", opened=2)
    with pytest.raises(VerificationError, match="more than the 4 rounds"):
        require_same_terms(edited(third, "extends", rounds_spent=4), charter)


def test_it_starts_where_our_own_replay_ends_and_forgets_no_round(league: Any) -> None:
    old = league.draft()
    charter, _ = extended(league, old)
    require_follows(charter, Earlier(charters=(old,), adapter=ADAPTER, rounds=4))
    with pytest.raises(VerificationError, match="follows from the sums"):
        require_follows(charter, Earlier(charters=(old,), adapter="b" * 64, rounds=4))
    with pytest.raises(VerificationError, match="at least 5 rounds"):
        require_follows(charter, Earlier(charters=(old,), adapter=ADAPTER, rounds=5))
    with pytest.raises(VerificationError, match="extends nothing"):
        require_follows(old, Earlier(charters=(old,), adapter=ADAPTER, rounds=0))
