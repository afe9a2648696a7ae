"""A small federation of real processes: three organisations, invented text, a few units a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.cli import shipped_base
from foedus_local.federation import Budget, LocalFederation
from foedus_local.plan import Plan, Terms, plan_invented

MakeFederation = Callable[..., tuple[LocalFederation, Plan]]


def terms(**changes: Any) -> Terms:
    """Terms of a run of seconds."""
    values: dict[str, Any] = {
        "private": True, "epsilon": 8.0, "delta": 1e-5, "rounds": 2, "seed": 3, "max_tokens": 96,
        "max_records_per_unit": 2, "expected_units": 16, "max_heldout_records": 4, "rate": 0.01, "l2_clip_norm": 0.2,
        "evaluate_every": 1, "round_seconds": 120.0,
    }  # fmt: skip
    return Terms(**(values | changes))


@pytest.fixture
def make_federation(tmp_path: Path) -> Iterator[MakeFederation]:
    """Create and start federations; whatever is still running at the end of the test is stopped."""
    started: list[LocalFederation] = []

    def make(
        *, epsilon_cap: float = 8.0, log_format: str = "text", units: int = 600, **changes: Any
    ) -> tuple[LocalFederation, Plan]:
        plan = plan_invented(tmp_path / "data", "medical", terms(**changes), units=units)
        federation = LocalFederation(tmp_path / "federation", plan.organisations, shipped_base(), log_format=log_format)
        started.append(federation)
        budget = Budget(epsilon_cap=epsilon_cap, delta=1e-5, allow_unprotected=not plan.terms.private)
        federation.create(budget, lambda text: None)
        return federation, plan

    yield make
    for federation in started:
        federation.stop()
