"""A coordinator's state as JSON values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from foedus_coordinator import views
from foedus_coordinator.rounds import execute
from foedus_coordinator.variant import epsilon_after
from foedus_protocols.messages import CharterAnswer

PRIVATE = {
    "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "rounds": 2, "l2_clip_norm": 1.0},
    "seed": None,
}


def detail(federation: Any) -> dict[str, Any]:
    value = views.run_detail(federation.home, federation.home.storage.run(federation.run_id))
    json.dumps(value)  # What the command prints with --format json.
    return value


def test_a_run_before_during_and_after(federation: Any, pump: Any) -> None:
    charter = federation.start_run(**PRIVATE)
    before = detail(federation)
    assert (before["state"], before["epsilon"], before["epsilon_agreed"]) == ("agreeing", None, 8.0)
    assert set(before["answers"].values()) == {"waiting"}
    with pump(federation):
        execute(federation.run())
    after = detail(federation)
    assert (after["state"], after["outcome"], after["rounds_closed"]) == ("finished", "complete", 2)
    assert set(after["answers"].values()) == {"signed"}
    assert after["epsilon"] == pytest.approx(epsilon_after(charter, 2))
    assert (after["loss_before"], after["loss_after"]) == (pytest.approx(0.99), pytest.approx(0.5))
    assert [point["after"] for point in after["losses"]] == [0, 1, 2]
    for one in after["round_list"]:
        assert one["missing"] == []
        assert set(one["seconds"]) == {"offer", "train", "sum", "advance", "confirm", "close"}
    # Up: two packed vectors of each organisation, and small answers.
    packed = charter.coding().packed_bytes
    assert 6 * packed < after["bytes_up"] < 6 * packed + 60_000
    # Down: at least both sums to each organisation.
    assert after["bytes_down"] > 6 * packed


def test_a_refused_run_has_spent_nothing(federation: Any, pump: Any) -> None:

    federation.start_run(**PRIVATE)
    federation.orgs["beta"].change = lambda kind, body: CharterAnswer(refused_step=10) if kind == "charter" else body
    with pump(federation):
        execute(federation.run())
    after = detail(federation)
    assert (after["outcome"], after["epsilon"], after["variant"]) == ("refused", 0.0, None)
    assert after["answers"]["beta"] == "refused at check 10"


def test_the_federation_at_a_glance(federation: Any) -> None:
    federation.start_run()
    federation.desk.hello("alpha", {"protocol": 1, "org": "alpha"}, "")
    seen = views.status(federation.home)
    assert [one["org"] for one in seen["members"]] == ["alpha", "beta", "gamma"]
    assert [one["last_seen"] is not None for one in seen["members"]] == [True, False, False]
    assert seen["secure_aggregation"] is False
    assert [one["run"] for one in seen["runs"]] == [federation.run_id]
    json.dumps(seen)
