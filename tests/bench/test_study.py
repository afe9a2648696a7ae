"""The study's table, and that a finished run is not repeated. No federation is started here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SEEDS = (0, 1, 2)


@pytest.fixture
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", Path(__file__).with_name("study.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(domain: str, seed: int, *, private: bool, rounds: int = 10, **more: Any) -> dict[str, Any]:
    """A run from a loss of 6: down by 0.4 without privacy, by 0.28, 0.3, 0.32 with it."""
    gain = 0.28 + 0.02 * seed if private else 0.4
    return {
        "domain": domain, "seed": seed, "private": private, "rounds": rounds, "epsilon": 7.99 if private else None,
        "loss_before": 6.0, "loss_after": 6.0 - gain, "seconds": 100.0 + seed,
    } | more  # fmt: skip


def test_the_table_says_what_is_kept_and_how_far_it_spreads(study: ModuleType) -> None:
    runs = [result("medical", seed, private=private) for seed in SEEDS for private in (False, True)]
    header, _, without, with_privacy = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in study.summarise(runs).splitlines()
    )
    assert len(header) == len(without) == len(with_privacy)
    free, private = dict(zip(header, without, strict=True)), dict(zip(header, with_privacy, strict=True))
    assert (free["mode"], free["epsilon"], free["fall"], free["share kept"]) == ("none", "-", "6.7%", "-")
    assert (private["epsilon"], private["seeds"]) == ("7.990", "3")
    assert private["gain (nats)"] == "0.3000 ± 0.0200"
    assert private["share kept"] == "75% (70% to 80%)"
    assert private["seconds"] == "102 at most"


def test_what_is_in_the_file_is_not_run_again(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int, bool]] = []

    def run_demo(data: Path, domain: str, *, seed: int, private: bool, rounds: int, epsilon: float) -> dict[str, Any]:
        done.append((domain, seed, private))
        if len(done) == 3:
            raise KeyboardInterrupt
        return result(domain, seed, private=private, rounds=rounds)

    monkeypatch.setattr(study, "run_demo", run_demo)
    out = tmp_path / "study.json"
    monkeypatch.setattr(sys, "argv", ["study", "--data", str(tmp_path), "--seeds", "0", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert len(json.loads(out.read_text())) == 2
    study.main()
    assert done == [("medical", 0, False), ("medical", 0, True), *[("legal", 0, False)] * 2, ("legal", 0, True)]
    assert capsys.readouterr().out.count("| legal |") == 2
