"""`foedus simulate`: whole units are dealt out, and Flower's engine gives the bits of a federation of processes."""

from __future__ import annotations

import json
import os
import subprocess
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
from foedus_local.plan import Plan, Terms, plan_split, read_deal
from foedus_local.processes import run_command
from foedus_local.text import write_demo_text
from foedus_protocols.errors import DataError, FoedusError, MissingExtra, UsageError

BASE = shipped_base()
SMALL = {
    "max_tokens": 96, "max_records_per_unit": 2, "expected_units": 16, "max_heldout_records": 4, "private": False,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    """Three files of invented text of one population."""
    return list(write_demo_text(tmp_path / "text", domain="medical", seed=3).files.values())


def split(files: list[Path], orgs: int, folder: Path, terms: Terms) -> Plan:
    return plan_split(read_deal(files, orgs, ["patient"], []), orgs, folder, BASE, terms)


def units_of(path: Path) -> set[str]:
    return {json.loads(line)["unit"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_every_unit_goes_whole_to_one_organisation(text: list[Path], tmp_path: Path, make_terms: Any) -> None:
    plan = split(text, 7, tmp_path / "split", make_terms(**SMALL))
    given = [units_of(one.file) for one in plan.organisations]
    rows = [json.loads(line) for path in text for line in path.read_text(encoding="utf-8").splitlines()]
    assert set.union(*given) == {row["patient"] for row in rows}
    assert sum(map(len, given)) == len(set.union(*given))
    assert max(map(len, given)) - min(map(len, given)) <= 1
    lines = sum(len(one.file.read_text(encoding="utf-8").splitlines()) for one in plan.organisations)
    assert lines == len(rows)


def test_the_deal_follows_the_seed(text: list[Path], tmp_path: Path, make_terms: Any) -> None:
    def deal(folder: str, seed: int) -> list[set[str]]:
        plan = split(text[2:], 3, tmp_path / folder, make_terms(**SMALL, seed=seed))
        return [units_of(one.file) for one in plan.organisations]

    assert deal("a", 3) == deal("b", 3)
    assert deal("a", 3) != deal("c", 4)


def test_too_few_units_or_organisations_are_refused_and_empty_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"id": f"u{n}", "text": "A text."}) + "\n" for n in range(5)))
    with pytest.raises(UsageError, match="at least 3 organisations, got 2: each signs with two others"):
        read_deal([path], 2, ["id"], [])
    with pytest.raises(
        DataError, match=r"got 0; 5 rows are unusable, the first is few\.jsonl line 1: the unit field no"
    ):
        read_deal([path], 3, ["no"], [])
    # From the root command on: an earlier simulation's folder stays as it is.
    earlier = tmp_path / "sim"
    earlier.mkdir()
    (earlier / "demo.json").write_text(json.dumps({"process": None}))
    (earlier / "kept").write_text("the earlier result")
    options = ("--unit", "id", "--orgs", "3", "--folder", str(earlier))
    with pytest.raises(FoedusError, match="at least 6 units for 3 organisations, got 5") as refused:
        run_command("simulate", "--data", str(path), *options)
    assert refused.value.exit_code == 8
    assert (earlier / "kept").read_text() == "the earlier result"


def test_without_ray_it_says_what_to_install(
    text: list[Path], tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foedus_local.simulate import simulate

    plan = split(text[2:], 3, tmp_path / "split", make_terms(**SMALL))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"foedus\[simulation\]"):
        simulate(plan, tmp_path / "sim", BASE, actors=1)
    assert not (tmp_path / "sim").exists()


RAY = """
import os
from foedus_local.simulate import lock_ray
lock_ray()
import ray
made = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print(made.address_info["gcs_address"], os.environ["RAY_AUTH_TOKEN"], flush=True)
input()
"""
CALL = """
import os, sys
if sys.argv[2] != "none":
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": sys.argv[2]}
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
"""


@pytest.mark.e2e
@pytest.mark.xdist_group("e2e")
def test_ray_serves_nobody_without_this_process_s_token() -> None:
    # A simulation earlier in this process has set the variables here; the processes below start without.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as ray:
        assert ray.stdout is not None
        address, token = ray.stdout.readline().split()

        def call(token: str) -> int:
            line = [sys.executable, "-c", CALL, address, token]
            return subprocess.run(line, capture_output=True, check=False, timeout=120, env=environment).returncode

        try:
            assert call("none") != 0
            assert call("0" * 64) != 0
            assert call(token) == 0
        finally:
            ray.communicate("\n")


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

    plan = split(text, 3, tmp_path / "split", make_terms(**SMALL))
    run = real(plan, tmp_path / "real")
    (simulated,) = (row.id for row in Home(tmp_path / "simulated" / "coordinator").storage.runs())
    assert adapters(tmp_path / "simulated", simulated) == adapters(tmp_path / "real", run)
    weights = [tmp_path / name / "variant" / "adapter_model.safetensors" for name in ("simulated", "real")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
