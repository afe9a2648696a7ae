"""The charter: canonical bytes, consistency, accounting terms, signatures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from foedus_protocols import identity
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import (
    Charter,
    charter_events,
    delta_for_accountant,
    less_slack,
    noise_slack,
    round_event,
    verify_agreement,
    verify_charter_signature,
)
from foedus_protocols.errors import VerificationError


def changed(charter: Charter, **changes: Any) -> bytes:
    """Canonical bytes with some top-level fields replaced."""
    return canonical_bytes(charter.model_dump(mode="json", exclude_none=True) | changes)


def section(charter: Charter, name: str, **changes: Any) -> bytes:
    """Canonical bytes with some fields of one section replaced."""
    return changed(charter, **{name: getattr(charter, name).model_dump(mode="json", exclude_none=True) | changes})


def test_parse_gives_back_the_same_bytes_and_digest(league: Any) -> None:
    charter = league.draft()
    again = Charter.parse(charter.canonical())
    assert again == charter
    assert again.digest == charter.digest


def test_every_term_is_in_the_digest(league: Any) -> None:
    charter = league.draft()
    other = Charter.parse(section(charter, "privacy", l2_clip_norm=0.2))
    assert other.digest != charter.digest


def test_parse_refuses_another_spelling(league: Any) -> None:
    spaced = json.dumps(json.loads(league.draft().canonical())).encode()
    with pytest.raises(VerificationError, match="canonical"):
        Charter.parse(spaced)


def test_parse_refuses_what_leans_on_defaults(league: Any) -> None:
    charter = league.draft()
    with pytest.raises(VerificationError, match="defaults"):
        Charter.parse(changed(charter, schedule={}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("privacy", {"steps_per_round": 2}),
        ("privacy", {"adjacency": "replace-one"}),
        ("privacy", {"mode": "distributed"}),
        ("privacy", {"surprise": 1}),
        ("privacy", {"rounds": "10"}),
        ("privacy", {"rounds": 0}),
        ("privacy", {"l2_clip_norm": 1e200}),
        ("privacy", {"l2_clip_norm": 1e-200}),
        ("masks", {"enabled": True}),
        ("masks", {"ring_bits": 17}),
        ("schedule", {"vector_slot_seconds": -1}),
        ("schedule", {"vector_slot_seconds": "60"}),
        ("release", {"adapter": "worst"}),
        ("adapter", {"targets": "router"}),
        ("adapter", {"initial_digest": "B" * 64}),
    ],
)
def test_parse_refuses_what_this_version_cannot_keep(league: Any, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match=rf"{name}\.{next(iter(changes))}"):
        Charter.parse(section(league.draft(), name, **changes))


def test_parse_names_fields_and_never_values(league: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        Charter.parse(section(league.draft(), "privacy", mode="a-secret-value"))
    assert "a-secret-value" not in str(caught.value)


def test_charters_of_the_version_before_keep_their_bytes_and_digests() -> None:
    """What was added since is left out where it is absent: who signed then has signed the same bytes now."""
    kept = json.loads((Path(__file__).parents[1] / "vectors" / "charter-1.json").read_bytes())
    assert kept
    for name, one in kept.items():
        charter = Charter.parse(canonical_bytes(one["charter"]))
        assert charter.digest == one["digest"], name
        assert charter.schedule.vector_slot_seconds == 0
        assert (charter.release.adapter, charter.extends) == (None, None)


def test_slots_are_shorter_than_a_round(league: Any) -> None:
    charter = league.draft(schedule={"round_seconds": 600.0, "vector_slot_seconds": 60})
    assert charter.schedule.vector_slot_seconds == 60
    assert Charter.parse(charter.canonical()) == charter
    with pytest.raises(VerificationError, match="shorter than round_seconds"):
        Charter.parse(section(charter, "schedule", vector_slot_seconds=600))


def test_the_best_adapter_needs_scores_to_choose_by(league: Any) -> None:
    charter = league.draft(evaluation={"term": "plain"}, release={"adapter": "best"})
    assert b'"adapter":"best"' in charter.canonical()
    assert Charter.parse(charter.canonical()).release.adapter == "best"
    with pytest.raises(VerificationError, match="needs held-out scores"):
        Charter.parse(section(charter, "evaluation", term="none"))


def test_seeded_draws_do_not_repeat_in_an_extension(league: Any) -> None:
    charter = league.draft(privacy={"mode": "none", "rounds": 4}, seed=3)
    extends = dict.fromkeys(("charter", "history", "adapter"), "a" * 64) | {"run": "first-1", "rounds_spent": 4}
    adapter = charter.adapter.model_dump(mode="json", exclude_none=True) | {"initial_digest": "a" * 64}
    extension = Charter.parse(changed(charter, extends=extends, adapter=adapter))
    assert [extension.draw_number(number) for number in (1, 2)] == [5, 6]
    assert extension.coding_key("second-1", 1) == charter.coding_key("first-1", 5)
    assert extension.coding_key("second-1", 1) != charter.coding_key("first-1", 1)
    with pytest.raises(VerificationError, match=r"starts from extends\.adapter"):
        Charter.parse(changed(charter, extends=extends))


def test_private_mode_needs_a_promise_and_noise_and_takes_no_seed(league: Any) -> None:
    charter = league.draft()
    silent = charter.participants[0].model_dump() | {"noise_multiplier": 0.0}
    rest = [one.model_dump() for one in charter.participants[1:]]
    promise = charter.privacy.model_dump(mode="json")
    del promise["epsilon"]
    for data in (
        changed(charter, participants=[silent, *rest]),
        changed(charter, seed=1),
        changed(charter, privacy=promise),
    ):
        with pytest.raises(VerificationError, match="mode local"):
            Charter.parse(data)


def test_mode_none_promises_nothing(league: Any) -> None:
    charter = league.draft(privacy={"mode": "none"}, seed=3)
    assert (charter.privacy.epsilon, charter.privacy.delta, charter.seed) == (None, None, 3)
    assert b'epsilon":8' not in charter.canonical()
    assert round_event(charter, charter.participants[0]) is None
    assert charter_events(charter, charter.participants[0]) == ()
    with pytest.raises(VerificationError, match="mode none"):
        Charter.parse(section(charter, "privacy", epsilon=8.0, delta=1e-5))
    with pytest.raises(VerificationError, match="private charter"):
        delta_for_accountant(charter, charter.participants[0])


@pytest.mark.parametrize("noise", [1e-300, 0.09, 1e300])
def test_noise_that_no_accountant_can_count_does_not_parse(league: Any, noise: float) -> None:
    """1e300 overflowed in the accountant, 1e-300 in the weights: neither error carries a check's number."""
    charter = league.draft()
    bent = [one.model_dump() for one in charter.participants]
    bent[1]["noise_multiplier"] = noise
    with pytest.raises(VerificationError, match="noise"):
        Charter.parse(changed(charter, participants=bent))


@pytest.mark.parametrize("field", ["id", "signing_key"])
def test_no_two_participants_share_an_identity(league: Any, field: str) -> None:
    charter = league.draft()
    one, two, three = (participant.model_dump() for participant in charter.participants)
    with pytest.raises(VerificationError, match=f"same {field}"):
        Charter.parse(changed(charter, participants=[one, two | {field: one[field]}, three]))


def test_charter_events_are_all_rounds_of_the_round_event(league: Any) -> None:
    charter = league.draft()
    for participant in charter.participants:
        (whole,) = charter_events(charter, participant)
        one = round_event(charter, participant)
        assert one is not None
        assert one.steps == 1
        assert whole.steps == charter.privacy.rounds
        assert (whole.noise_multiplier, whole.sampling_prob) == (one.noise_multiplier, one.sampling_prob)


def test_delta_for_accountant_is_less_by_at_least_the_slack(league: Any) -> None:
    charter = league.draft()
    slack = noise_slack(length=charter.adapter.length, steps=4, epsilon=8.0)
    assert slack == (1 + math.exp(8)) * charter.adapter.length * 4 * 2.0**-100
    left = delta_for_accountant(charter, charter.participants[0])
    assert 1e-5 * (1 - 1e-12) < left < 1e-5


def test_less_slack_rounds_down_and_refuses_to_reach_zero() -> None:
    assert less_slack(1e-5, 0.0) < 1e-5
    assert less_slack(1e-5, 1e-30) < 1e-5  # Too small for a float to notice without rounding down.
    with pytest.raises(VerificationError, match="slack"):
        less_slack(1e-30, 1e-29)


def test_relative_weights_are_at_most_one_and_the_coding_follows_the_charter(league: Any) -> None:
    charter = league.draft()
    weights = [charter.relative_weight(participant.id) for participant in charter.participants]
    assert max(weights) == 1.0
    assert min(weights) > 0
    coding = charter.coding()
    assert (coding.length, coding.ring_bits, coding.members) == (charter.adapter.length, 16, 3)
    with pytest.raises(VerificationError, match="participant"):
        charter.relative_weight("yew")


@pytest.mark.parametrize("name", ["adam", "sgd", "adambc"])
def test_rule_carries_the_optimiser(league: Any, name: str) -> None:
    rule = league.draft(recipe={"optimiser": {"name": name, "rate": 0.02}}).rule()
    assert (rule.name, rule.rate) == (name, 0.02)
    assert (rule.noise_variance > 0) == (name == "adambc")


def test_agreement_of_everyone_is_accepted(league: Any) -> None:
    charter = league.draft()
    verify_agreement(charter, league.agreement(charter), league.operator_key)


def test_agreement_is_refused_unless_it_is_everyones_for_this_charter(league: Any) -> None:
    charter = league.draft()
    good = league.agreement(charter)
    stranger = identity.generate_signing_key()
    signatures = good.signatures
    refused = {
        "charter": good.model_copy(update={"charter_digest": "0" * 64}),
        "none of birch": good.model_copy(update={"signatures": {k: v for k, v in signatures.items() if k != "birch"}}),
        "one of yew": good.model_copy(update={"signatures": signatures | {"yew": signatures["ash"]}}),
        "ash's signature": good.model_copy(update={"signatures": signatures | {"ash": signatures["birch"]}}),
    }
    for text, agreement in refused.items():
        with pytest.raises(VerificationError, match=text):
            verify_agreement(charter, agreement, league.operator_key)
    with pytest.raises(VerificationError):
        verify_agreement(charter, good, identity.public_hex(stranger))


def test_a_charter_signature_is_of_no_use_in_another_context(league: Any) -> None:
    charter = league.draft()
    elsewhere = identity.sign(league.operator, "foedus/roster/1", bytes.fromhex(charter.digest))
    with pytest.raises(VerificationError):
        verify_charter_signature(league.operator_key, charter.digest, elsewhere)


def test_the_text_about_a_charter_that_does_not_parse_stays_short(league: Any) -> None:
    charter = league.draft()
    value = json.loads(charter.canonical())
    value["adapter"]["layers"] = [-1] * 300_000
    with pytest.raises(VerificationError) as refused:
        Charter.parse(canonical_bytes(value))
    assert len(str(refused.value)) < 3_000
    value = json.loads(charter.canonical()) | {f"unknown_{number:05d}": 0 for number in range(20_000)}
    with pytest.raises(VerificationError, match="and 19992 more") as refused:
        Charter.parse(canonical_bytes(value))
    assert len(str(refused.value)) < 3_000
