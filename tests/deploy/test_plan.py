"""What a demo decides before anything starts: organisations, units, declared bounds, the charter's terms."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.cli import shipped_base
from foedus_client.datasets.load import load_dataset
from foedus_client.policy import POLICY_TEMPLATE
from foedus_client.policy import load as load_policy
from foedus_local.federation import decide
from foedus_local.plan import (
    LEAST_ORGANISATIONS,
    Plan,
    check_terms,
    plan_data,
    plan_invented,
    power_of_two,
)
from foedus_protocols.charter_draft import draft
from foedus_protocols.errors import ConfigError, DataError, UsageError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.layout import parse_layers
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.roster import Roster

BASE = shipped_base()


def write(folder: Path, name: str, units: int, **renamed: str) -> Path:
    """A file of so many units of one record; `renamed` gives columns other names."""
    folder.mkdir(exist_ok=True)
    names = {"topic": "topic", "question": "question", "answer": "answer"} | renamed
    rows = [
        {names["topic"]: f"t{index}", names["question"]: f"What is {index}?", names["answer"]: "A number."}
        for index in range(units)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "wards", "North_Ward", 20)
    write(tmp_path / "wards", "south", 9, topic="id")
    write(tmp_path / "wards", "west", 3)
    (tmp_path / "wards" / "README.txt").write_text("not data")
    return tmp_path / "wards"


def test_one_file_is_one_organisation_with_its_own_unit(folder: Path, make_terms: Any) -> None:
    plan = plan_data(folder, ["topic", "south=id"], [], BASE, make_terms())
    assert [(one.org, one.unit, one.units_at_most) for one in plan.organisations] == [
        ("north-ward", "topic", 32),
        ("south", "id", 16),
        ("west", "topic", 4),
    ]
    assert (plan.domain, plan.unit) == ("wards", "topic/id")


def test_every_organisation_holds_out_a_unit_and_trains_on_one(tmp_path: Path, make_terms: Any) -> None:
    write(tmp_path, "a", 2)
    write(tmp_path, "b", 3)
    write(tmp_path, "c", 4)
    for seed in range(4):
        for one in plan_data(tmp_path, ["topic"], [], BASE, make_terms(seed=seed)).organisations:
            found = load_dataset(
                [one.file], units=one.unit, columns={}, tokenizer_path=BASE / "tokenizer.json", max_tokens=256,
                max_records_per_unit=4, split_key=one.split_key,
            )  # fmt: skip
            assert found.train
            assert found.heldout


def test_columns_are_mapped_by_file(tmp_path: Path, make_terms: Any) -> None:
    write(tmp_path, "a", 5)
    write(tmp_path, "b", 5, question="subject", answer="body")
    write(tmp_path, "c", 5)
    with pytest.raises(DataError, match=r"b\.jsonl"):
        plan_data(tmp_path, ["topic"], [], BASE, make_terms())
    plan = plan_data(tmp_path, ["topic"], ["b:question=subject,answer=body"], BASE, make_terms())
    assert [one.columns for one in plan.organisations] == [{}, {"question": "subject", "answer": "body"}, {}]


@pytest.mark.parametrize(
    ("units", "columns", "named"),
    [
        pytest.param([], [], "--unit", id="no unit"),
        pytest.param(["south=id"], [], "North_Ward", id="a file without unit"),
        pytest.param(["topic", "suoth=id"], [], "suoth", id="a unit for no file"),
        pytest.param(["topic", "south=id"], ["suoth:text=answer"], "suoth", id="columns for no file"),
    ],
)
def test_options_that_fit_no_file_are_refused(
    units: list[str], columns: list[str], named: str, folder: Path, make_terms: Any
) -> None:
    with pytest.raises(UsageError, match=named):
        plan_data(folder, units, columns, BASE, make_terms())


def test_a_folder_needs_three_files_of_several_units_and_different_names(tmp_path: Path, make_terms: Any) -> None:
    with pytest.raises(DataError, match="expected a folder"):
        plan_data(tmp_path / "nowhere", ["topic"], [], BASE, make_terms())
    write(tmp_path, "a", 5)
    write(tmp_path, "c", 5)
    with pytest.raises(DataError, match=r"at least 3 data files .* got 2: a demo.s organisation signs with two others"):
        plan_data(tmp_path, ["topic"], [], BASE, make_terms())
    write(tmp_path, "b", 1)
    with pytest.raises(DataError, match="several units"):
        plan_data(tmp_path, ["topic"], [], BASE, make_terms())
    (tmp_path / "b.jsonl").unlink()
    write(tmp_path, "A", 5)
    with pytest.raises(UsageError, match="different organisations"):
        plan_data(tmp_path, ["topic"], [], BASE, make_terms())


def test_a_demo_has_as_many_organisations_as_a_policy_asks_for() -> None:
    policy = tomllib.loads(POLICY_TEMPLATE)
    assert policy["minimum_members"] + 1 == LEAST_ORGANISATIONS


def charter_of(plan: Plan) -> Any:
    """The plan's charter as the coordinator would draft it."""
    roster = Roster.genesis("local")
    for one in plan.organisations:
        roster = roster.add(one.org, public_hex(generate_signing_key()), since=1)
    return draft(
        plan.charter(), federation="local", roster=roster, base_digest=read_manifest(BASE).digest,
        base_config=read_config(BASE), base_name="tiny", now=1_800_000_000,
    )  # fmt: skip


def test_a_private_charter_promises_epsilon_and_takes_no_seed(tmp_path: Path, make_terms: Any) -> None:
    charter = charter_of(plan_invented(tmp_path, "medical", make_terms(epsilon=6.0)))
    assert (charter.privacy.mode, charter.privacy.epsilon, charter.privacy.delta) == ("local", 6.0, 1e-5)
    assert charter.seed is None
    assert all(one.noise_multiplier > 0 for one in charter.participants)
    assert (charter.evaluation.term, charter.evaluation.max_records) == ("plain", 100)
    assert (charter.recipe.max_tokens, charter.recipe.max_records_per_unit) == (256, 4)
    assert max(one.expected_units for one in charter.participants) <= 64


def test_without_privacy_the_charter_promises_nothing_and_says_its_seed(tmp_path: Path, make_terms: Any) -> None:
    charter = charter_of(plan_invented(tmp_path, "legal", make_terms(private=False)))
    assert (charter.private, charter.privacy.epsilon, charter.seed) == (False, None, 3)
    assert {one.noise_multiplier for one in charter.participants} == {0.0}


def test_an_unknown_domain_is_refused(tmp_path: Path, make_terms: Any) -> None:
    with pytest.raises(UsageError, match="cooking"):
        plan_invented(tmp_path, "cooking", make_terms())


@pytest.mark.parametrize(("count", "bound"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_declared_bound_is_the_next_power_of_two(count: int, bound: int) -> None:
    assert power_of_two(count) == bound


@pytest.mark.parametrize(
    ("targets", "layers", "rank", "alpha", "length"),
    [
        ("attention", None, 16, 32.0, 24_576),
        ("attention", (0, 3), 16, 32.0, 12_288),
        ("experts-shared", None, 16, 32.0, 24_576),
        # A pair for each expert of rank 16 over the two experts of a token.
        ("experts", (3,), 8, 16.0, 16 * 8 * (256 + 128)),
    ],
)
def test_an_adapter_and_its_layers_are_the_charters(
    tmp_path: Path, make_terms: Any, targets: str, layers: tuple[int, ...] | None, rank: int, alpha: float, length: int
) -> None:
    adapter = charter_of(plan_invented(tmp_path, "medical", make_terms(adapter=targets, layers=layers))).adapter
    assert (adapter.targets, adapter.layers, adapter.rank, adapter.alpha) == (targets, layers, rank, alpha)
    assert adapter.length == length
    assert adapter.train is None


def test_layers_are_numbers_between_commas() -> None:
    assert parse_layers(None) is None
    assert parse_layers("0, 12") == (0, 12)
    for wrong in ("", "all", "1,0", "1,1", "-1", "0;2", "12345"):
        with pytest.raises(UsageError, match="--layers"):
            parse_layers(wrong)


def test_an_adapter_that_no_policy_allows_is_refused_before_anything_starts(make_terms: Any) -> None:
    large = read_config(BASE) | {"num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880}
    check_terms(make_terms(adapter="experts", layers=(1,)), large)
    with pytest.raises(ConfigError, match=r"at most 134217728 trained coordinates, got \d+: adapt fewer"):
        check_terms(
            make_terms(adapter="experts"), large | {"num_hidden_layers": 36, "layer_types": ["full_attention"] * 36}
        )


def test_a_demos_policies_grant_what_its_run_asks_for(folder: Path, tmp_path: Path, make_terms: Any) -> None:
    plan = plan_data(folder, ["topic", "south=id"], [], BASE, make_terms(max_tokens=2048, rounds=3))
    path = tmp_path / "policy.toml"
    path.write_text(POLICY_TEMPLATE)
    usual = load_policy(path).bounds
    decide(path, plan.budget())
    bounds = load_policy(path).bounds
    assert (usual.max_tokens, bounds.max_tokens) == (1024, 2048)
    assert (bounds.max_rounds, bounds.max_rate, bounds.max_rank) == (usual.max_rounds, usual.max_rate, usual.max_rank)
