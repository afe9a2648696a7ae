"""`foedus simulate`: whole units are dealt out, and Flower's engine gives the bits of a federation of processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.cli import shipped_base
from foedus_client.ledger import Ledger
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_local.demo import finished, watch
from foedus_local.federation import NAMESPACE, Budget, LocalFederation
from foedus_local.plan import Plan, plan_split
from foedus_local.processes import run_command
from foedus_local.text import write_demo_text
from foedus_protocols.errors import DataError, MissingExtra, UsageError

BASE = shipped_base()
SMALL = {
    "max_tokens": 96, "max_records_per_unit": 2, "expected_units": 16, "max_heldout_records": 4, "private": False,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    """Three files of invented text of one population."""
    return list(write_demo_text(tmp_path / "text", domain="medical", seed=3).files.values())


def units_of(path: Path) -> set[str]:
    return {json.loads(line)["unit"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_every_unit_goes_whole_to_one_organisation(text: list[Path], tmp_path: Path, make_terms: Any) -> None:
    plan = plan_split(text, 7, ["patient"], [], tmp_path / "split", BASE, make_terms(**SMALL))
    given = [units_of(one.file) for one in plan.organisations]
    rows = [json.loads(line) for path in text for line in path.read_text(encoding="utf-8").splitlines()]
    assert set.union(*given) == {row["patient"] for row in rows}
    assert sum(map(len, given)) == len(set.union(*given))
    assert max(map(len, given)) - min(map(len, given)) <= 1
    lines = sum(len(one.file.read_text(encoding="utf-8").splitlines()) for one in plan.organisations)
    assert lines == len(rows)


def test_the_deal_follows_the_seed(text: list[Path], tmp_path: Path, make_terms: Any) -> None:
    def deal(folder: str, seed: int) -> list[set[str]]:
        plan = plan_split(text[2:], 3, ["patient"], [], tmp_path / folder, BASE, make_terms(**SMALL, seed=seed))
        return [units_of(one.file) for one in plan.organisations]

    assert deal("a", 3) == deal("b", 3)
    assert deal("a", 3) != deal("c", 4)


def test_too_few_units_or_organisations_are_refused(tmp_path: Path, make_terms: Any) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"id": f"u{n}", "text": "A text."}) + "\n" for n in range(5)))
    with pytest.raises(DataError, match="at least 6 units for 3 organisations, got 5"):
        plan_split([path], 3, ["id"], [], tmp_path / "split", BASE, make_terms(**SMALL))
    with pytest.raises(UsageError, match="at least two organisations, got 1"):
        plan_split([path], 1, ["id"], [], tmp_path / "split", BASE, make_terms(**SMALL))
    assert not (tmp_path / "split").exists()


def test_without_ray_it_says_what_to_install(
    text: list[Path], tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foedus_local.simulate import simulate

    plan = plan_split(text[2:], 2, ["patient"], [], tmp_path / "split", BASE, make_terms(**SMALL))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"foedus\[simulation\]"):
        simulate(plan, tmp_path / "sim", BASE, actors=1)
    assert not (tmp_path / "sim").exists()


def adapters(folder: Path, run: str) -> list[str]:
    home = Home(folder / "coordinator")
    return [one["adapter"] for one in views.run_detail(home, home.storage.run(run))["round_list"]]


def real(plan: Plan, folder: Path) -> str:
    """Run the same organisations as processes; the run's id."""
    federation = LocalFederation(folder, plan.organisations, BASE)
    try:
        federation.create(Budget(epsilon_cap=8.0, delta=1e-5, allow_unprotected=True), lambda line: None)
        run = federation.start_run(plan.charter())
        finished(plan, watch(Home(federation.coordinator_home), run, federation.check), folder, seconds=0.0)
    finally:
        federation.stop()
    return run


@pytest.mark.e2e
@pytest.mark.xdist_group("e2e")
def test_without_noise_the_engine_gives_the_bits_of_a_federation_of_processes(
    text: list[Path], tmp_path: Path, make_terms: Any
) -> None:
    options = (
        "--unit", "patient", "--orgs", "3", "--seed", "3", "--rounds", "2", "--no-privacy", "--max-tokens", "96",
        "--max-records-per-unit", "2", "--expected-units", "16", "--max-heldout-records", "4", "--actors", "2",
    )  # fmt: skip
    found = run_command("simulate", "--data", *map(str, text), *options, "--folder", str(tmp_path / "simulated"))
    assert found["rounds"] == 2
    assert found["loss_after"] < found["loss_before"]
    ledger = Ledger(tmp_path / "simulated" / "orgs" / "org-0" / "ledger.db")
    assert [entry.round for entry in ledger.entries(NAMESPACE) if entry.kind == "commit"] == [1, 2]

    plan = plan_split(text, 3, ["patient"], [], tmp_path / "split", BASE, make_terms(**SMALL))
    run = real(plan, tmp_path / "real")
    (simulated,) = (row.id for row in Home(tmp_path / "simulated" / "coordinator").storage.runs())
    assert adapters(tmp_path / "simulated", simulated) == adapters(tmp_path / "real", run)
    weights = [tmp_path / name / "variant" / "adapter_model.safetensors" for name in ("simulated", "real")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
