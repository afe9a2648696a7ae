"""Terms of a demo, and the detail of a run that has ended."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_local.plan import Terms

MakeTerms = Any


@pytest.fixture
def make_terms() -> MakeTerms:
    """A function that makes terms; what is given replaces a default of the command."""

    def make(**changes: Any) -> Terms:
        values: dict[str, Any] = {
            "private": True, "epsilon": 8.0, "delta": 1e-5, "rounds": 2, "seed": 3, "max_tokens": 256,
            "max_records_per_unit": 4, "expected_units": 64, "max_heldout_records": 100, "rate": 0.02,
            "l2_clip_norm": 0.15, "evaluate_every": 1, "round_seconds": 1800.0,
        }  # fmt: skip
        return Terms(**(values | changes))

    return make


@pytest.fixture
def make_detail() -> Any:
    """A function that makes what ``foedus coordinator run show`` says of a run of two rounds."""

    def make(**changes: Any) -> dict[str, Any]:
        seconds = {"offer": 0.1, "train": 2.0, "sum": 0.2, "advance": 0.3, "confirm": 0.1, "close": 0.1}
        detail = {
            "run": "demo-1",
            "charter": "0" * 64,
            "state": "finished",
            "outcome": "complete",
            "reason": "",
            "rounds": 2,
            "rounds_closed": 2,
            "answers": {"a": "signed"},
            "round_list": [
                {"round": number, "state": "closed", "survivors": ["a"], "seconds": seconds} for number in (1, 2)
            ],
            "losses": [
                {"after": 0, "loss": 6.0, "tokens": 90},
                {"after": 1, "loss": 5.5, "tokens": 90},
                {"after": 2, "loss": 5.4, "tokens": 90},
            ],
            "loss_before": 6.0,
            "loss_after": 5.4,
            "epsilon": 7.998,
            "delta": 1e-5,
            "bytes_up": 123_456,
            "bytes_down": 654_321,
            "variant": None,
        }
        return detail | changes

    return make
