"""Drafting: the printed rule, the defaults, and what is refused."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from foedus_protocols import accounting, codec, layout
from foedus_protocols.charter import Charter, Optimiser, Terms, charter_events, delta_for_accountant
from foedus_protocols.charter_draft import CharterDraft, charter_template, read_draft
from foedus_protocols.errors import ConfigError


def test_constants_follow_the_printed_rule(league: Any) -> None:
    charter = league.draft()
    for participant, units_at_most in zip(charter.participants, (64, 256, 512), strict=True):
        assert participant.sampling_prob == min(1.0, 64 / units_at_most)
        assert participant.expected_units == 64
        assert participant.weight == 64 / participant.noise_multiplier
    # Less sampling needs less noise.
    noises = [participant.noise_multiplier for participant in charter.participants]
    assert noises == sorted(noises, reverse=True)


def test_noise_is_the_smallest_that_keeps_the_promise(league: Any) -> None:
    charter = league.draft()
    for participant in charter.participants:
        delta = delta_for_accountant(charter, participant)
        (event,) = charter_events(charter, participant)
        assert 7.9 < accounting.epsilon([event], delta) <= 8.0
        less = accounting.Event(
            noise_multiplier=participant.noise_multiplier - 2 * accounting.NOISE_GRID,
            sampling_prob=participant.sampling_prob,
            steps=event.steps,
        )
        assert accounting.epsilon([less], delta) > 8.0


def test_update_bound_and_adapter_are_what_every_party_computes(league: Any) -> None:
    charter = league.draft()
    described = layout.adapter_layout(league.config, targets="attention", rank=4)
    assert (charter.adapter.length, charter.adapter.layout_digest) == (described.length, described.digest)
    assert charter.adapter.initial_digest == layout.vector_digest(
        layout.initial_vector(described, charter.adapter.seed)
    )
    constants = [(one.weight, one.expected_units, one.noise_multiplier) for one in charter.participants]
    assert charter.masks.update_bound == codec.update_bound(constants, described.length)


def test_mode_none_weighs_by_expected_units_and_codes_finely(league: Any) -> None:
    charter = league.draft(privacy={"mode": "none", "target_units": 128}, seed=1)
    assert [one.weight for one in charter.participants] == [64, 128, 128]
    assert [one.noise_multiplier for one in charter.participants] == [0, 0, 0]
    assert charter.masks.ring_bits == 24


@pytest.mark.parametrize(("members", "survivors"), [(2, 2), (3, 3)])
def test_default_survivors_are_two_thirds_and_one(league: Any, members: int, survivors: int) -> None:
    participants = league.toml()["participants"][:members]
    assert league.draft(participants=participants).masks.min_survivors == survivors


def test_validity_starts_now(league: Any) -> None:
    charter = league.draft(valid_days=2)
    assert (charter.not_before, charter.expires) == (league.now, league.now + 2 * 86_400)


def test_drafting_twice_gives_the_same_digest(league: Any) -> None:
    assert league.draft().digest == league.draft().digest


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"surprise": 1}, "surprise"),
        ({"privacy": {"epsilon": "8"}}, "privacy.epsilon"),
        ({"privacy": {"epsilon": math.inf}}, "privacy.epsilon"),
        ({"privacy": {"mode": "none", "epsilon": 8.0}}, "promises nothing"),
        ({"seed": 1}, "takes no seed"),
        ({"name": "First Run"}, "name"),
        ({"masks": {"enabled": True}}, "masks.enabled"),
        ({"masks": {"ring_bits": 17}}, "ring_bits"),
        ({"masks": {"ring_bits": 0}}, "masks.ring_bits"),
        ({"masks": {"min_survivors": 0}}, "masks.min_survivors"),
        ({"privacy": {"l2_clip_norm": 1e7}}, "privacy.l2_clip_norm"),
        ({"participants": [{"id": "yew", "unit": "patient", "units_at_most": 64}]}, "yew"),
        ({"participants": [{"id": "ash", "unit": "patient", "units_at_most": 100}]}, "power of two"),
        ({"participants": [{"id": "ash", "unit": "patient", "units_at_most": 2**14}]}, "at most 1/"),
        ({"recipe": {"optimiser": {"name": "lion"}}}, "recipe.optimiser.name"),
        ({"release": {"adapter": "best"}}, "held-out scores"),
        ({"release": {"adapter": "first"}}, "release.adapter"),
        ({"schedule": {"vector_slot_seconds": -1}}, "schedule.vector_slot_seconds"),
        ({"schedule": {"round_seconds": 10.0, "vector_slot_seconds": 10.0}}, "shorter than round_seconds"),
    ],
)
def test_a_wrong_draft_is_refused_by_the_fields_name(league: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        league.draft(**changes)


def test_records_longer_than_the_models_text_are_not_drafted(league: Any) -> None:
    league.config = league.config | {"max_position_embeddings": 512}
    assert league.draft(recipe={"max_tokens": 512}).recipe.max_tokens == 512
    with pytest.raises(ConfigError, match=r"max_tokens up to 512, the base's longest text, got 513"):
        league.draft(recipe={"max_tokens": 513})


def test_template_is_a_draft_and_its_comments_are_the_defaults(league: Any) -> None:
    plain = CharterDraft.model_validate(tomllib.loads(charter_template()))
    lines = charter_template().splitlines()
    switched_on = "\n".join(line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in lines)
    value = tomllib.loads(switched_on)
    # Those that have no default of their own: computed from the mode, the targets or the number of members.
    assert (value.pop("seed"), value["masks"].pop("min_survivors"), value["masks"].pop("ring_bits")) == (1, 2, 16)
    assert (value["privacy"].pop("epsilon"), value["privacy"].pop("delta")) == (8.0, 1e-5)
    adapter = value["adapter"]
    assert (adapter.pop("layers"), adapter.pop("rank"), adapter.pop("alpha")) == ([0, 1], 16, 32.0)
    assert CharterDraft.model_validate(value) == plain


def all_switched_on() -> dict[str, Any]:
    """The template with every line uncommented that names a key, whatever stands before the key."""
    lines = [re.sub(r"^#\s*(?=[a-z0-9_]+ = )", "", line) for line in charter_template().splitlines()]
    return tomllib.loads("\n".join(lines))


def test_every_default_of_the_template_is_one_line_with_an_explanation() -> None:
    """A comment that swallowed a key, or a key that swallowed another's comment, shows here."""
    lines = [line for line in charter_template().splitlines() if line.startswith("#") and not line.startswith("# ")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"#[a-z0-9_]+ = \S.*?  +# \S.*", line), line
    value = all_switched_on()
    assert value.keys() == CharterDraft.model_fields.keys()
    for name, field in CharterDraft.model_fields.items():
        if isinstance(field.default, Terms):
            assert value[name].keys() == type(field.default).model_fields.keys(), name
    assert value["recipe"]["optimiser"].keys() == Optimiser.model_fields.keys()


@pytest.mark.parametrize("mode", ["local", "none"])
def test_the_template_with_everything_switched_on_drafts_a_charter(league: Any, mode: str) -> None:
    value = all_switched_on()
    for participant, org in zip(value["participants"], ("ash", "birch"), strict=True):
        participant["id"] = org
    if mode == "local":
        del value["seed"]  # The template says that it belongs to mode none.
    else:
        value["privacy"] = {k: v for k, v in value["privacy"].items() if k not in ("epsilon", "delta")}
        value["privacy"]["mode"] = "none"
    charter = league.draft(**value)
    assert charter.privacy.mode == mode
    assert (charter.privacy.rounds, charter.privacy.target_units) == (10, 64)
    assert (charter.masks.min_survivors, charter.masks.ring_bits) == (2, 16)
    assert charter.schedule.on_short_round == "wait"


def test_what_the_whole_gets_wrong_is_named(league: Any) -> None:
    twice = [league.toml()["participants"][0]] * 2
    with pytest.raises(ConfigError, match=r"the whole: .*same id"):
        league.draft(participants=twice)


def test_the_last_adapter_is_what_a_charter_that_says_nothing_means(league: Any) -> None:
    assert league.draft(release={"adapter": "last"}).digest == league.draft().digest


def test_reading_a_draft(tmp_path: Path) -> None:
    path = tmp_path / "charter.toml"
    with pytest.raises(ConfigError, match=r"charter\.toml"):
        read_draft(path)
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="TOML"):
        read_draft(path)
    path.write_text('name = "a"')
    assert read_draft(path) == {"name": "a"}


EXPERTS = {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("terms", "rank", "alpha"),
    [
        ({"targets": "attention"}, 16, 32.0),
        ({"targets": "attention", "layers": [1]}, 16, 32.0),
        ({"targets": "experts-shared"}, 16, 32.0),
        # As many matrices as with one pair meet a token: 16 over its 2 experts.
        ({"targets": "experts"}, 8, 16.0),
        ({"targets": "experts", "layers": [0], "rank": 3}, 3, 6.0),
        ({"targets": "experts", "layers": [0], "rank": 3, "alpha": 5.0}, 3, 5.0),
    ],
)
def test_every_kind_of_adapter_is_drafted(league: Any, terms: dict[str, Any], rank: int, alpha: float) -> None:
    league.config |= EXPERTS
    charter = league.draft(adapter=terms)
    layers = None if "layers" not in terms else tuple(terms["layers"])
    described = layout.adapter_layout(league.config, targets=terms["targets"], rank=rank, layers=layers)
    adapter = charter.adapter
    assert (adapter.rank, adapter.alpha, adapter.layers, adapter.train) == (rank, alpha, layers, None)
    assert (adapter.length, adapter.layout_digest) == (described.length, described.digest)
    assert adapter.layout(league.config) == described
    assert not adapter.start(lambda: league.config).any()
    assert Charter.parse(charter.canonical()) == charter
    assert b'"train"' not in charter.canonical()
    assert (b'"layers"' in charter.canonical()) == (layers is not None)


def test_both_factors_train_without_noise_only_and_start_from_the_seed(league: Any) -> None:
    league.config |= EXPERTS
    terms = {"targets": "experts-shared", "rank": 2, "train": "both"}
    charter = league.draft(adapter=terms, privacy={"mode": "none"}, seed=1)
    start = charter.adapter.start(lambda: league.config)
    assert start.any()
    assert layout.vector_digest(start) == charter.adapter.initial_digest
    assert start.size == charter.adapter.length == 2 * 2 * (64 + 48 + 24 + 64)
    with pytest.raises(ConfigError, match=r"takes mode none"):
        league.draft(adapter=terms)


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ({"targets": "all-linear"}, "adapter.targets"),
        ({"targets": "experts", "layers": [2]}, "from 0 to 1 for this base"),
        ({"targets": "experts", "layers": []}, "from 0 to 1 for this base"),
        ({"train": "a"}, "adapter.train"),
    ],
)
def test_an_adapter_that_reaches_nothing_is_not_drafted(league: Any, terms: dict[str, Any], text: str) -> None:
    league.config |= EXPERTS
    with pytest.raises(ConfigError, match=text):
        league.draft(adapter=terms)


def test_a_base_that_does_not_say_its_experts_needs_a_rank(league: Any) -> None:
    league.config |= EXPERTS | {"num_experts_per_tok": None}
    with pytest.raises(ConfigError, match=r"give adapter\.rank"):
        league.draft(adapter={"targets": "experts"})
    assert league.draft(adapter={"targets": "experts", "rank": 2}).adapter.rank == 2
