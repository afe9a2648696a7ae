"""`foedus client privacy plan`: the fourth of four quantities."""

from __future__ import annotations

import json

import pytest
from foedus_client.cli import app
from foedus_protocols.errors import ConfigError
from typer.testing import CliRunner


def test_the_noise_for_a_budget_costs_no_more_than_the_budget() -> None:
    done = CliRunner().invoke(
        app,
        ["privacy", "plan", "--epsilon", "8", "--sampling-prob", "0.0625", "--steps", "10", "--format", "json"],
        catch_exceptions=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 7.9 < found["epsilon"] <= 8.0
    assert found["epsilon"] < found["epsilon_rdp"]
    assert found["steps"] == 10


def test_two_of_four_are_not_enough() -> None:
    with pytest.raises(ConfigError, match="exactly three"):
        CliRunner().invoke(app, ["privacy", "plan", "--epsilon", "8", "--steps", "10"], catch_exceptions=False)
