"""A real federation whose adapter has a pair of matrices for each expert, up to a variant that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.datasets.cli import shipped_base
from foedus_coordinator import views
from foedus_coordinator.config import Home
from foedus_model import cli as model_cli
from foedus_protocols.charter import Charter
from foedus_protocols.layout import unflatten
from foedus_protocols.manifest import read_config
from foedus_protocols.peft_folder import read_peft
from support.waiting import wait_for
from typer.testing import CliRunner

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]


def test_a_private_run_on_each_experts_own_pair_ends_in_a_variant_that_generates(make_federation: Any) -> None:
    shape = {"adapter": "experts", "layers": (1,), "max_tokens": 32, "max_records_per_unit": 1}
    federation, plan = make_federation(units=48, rounds=1, expected_units=8, **shape)
    run = federation.start_run(plan.charter())
    home = Home(federation.coordinator_home)
    wait_for(lambda: home.storage.run(run).state == "finished", f"run {run} to finish")
    detail = views.run_detail(home, home.storage.run(run))
    assert (detail["outcome"], detail["rounds_closed"]) == ("complete", 1), detail["reason"]
    assert detail["round_list"][0]["survivors"] == sorted(federation.organisations)

    # Layer 1 has a pair for each of the 16 experts, and the round's noise moved every one of them.
    adapter = Charter.parse(home.files.read(detail["charter"])).adapter
    assert (adapter.targets, adapter.layers) == ("experts", (1,))
    layout = adapter.layout(read_config(shipped_base()))
    assert [tensor.shape for tensor in layout.trained()] == [(16, 256, adapter.rank), (16, 128, adapter.rank)]
    moved = unflatten(layout, read_peft(Path(detail["variant"]), layout).vector)
    assert all(np.abs(pairs).max(axis=(1, 2)).all() for pairs in moved.values())

    asked = ["generate", "--variant", detail["variant"], "--prompt", "Who was seen?", "--max-new-tokens", "4"]
    said = CliRunner().invoke(model_cli.app, [*asked, "--format", "json"], catch_exceptions=False)
    answer = json.loads(said.stdout)
    assert (answer["variant"], answer["private"]) == (detail["variant"], True)
    assert answer["new_tokens"] == 4 or answer["finish"] == "end"
