"""The comparison on a small federation: who trains on what, under which terms, measured on the same held-out units."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foedus_client.datasets.units import is_held_out, key_hash
from foedus_client.session import Session
from foedus_client.work import Setup, TrainTask
from foedus_local import compare as module
from foedus_local.compare import compare
from foedus_local.plan import Plan, Terms, plan_data
from foedus_local.report import show_comparison
from foedus_model.attention import NAME
from foedus_model.presets import TINY
from foedus_protocols import accounting
from foedus_protocols.charter import Charter, delta_for_accountant
from foedus_protocols.charter_draft import draft
from foedus_protocols.errors import CheckpointError, ConfigError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.layout import vector_digest
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.peft_folder import file_digests, write_peft
from rich.console import Console

ROLES = ("Facts", "Ratio", "Statute")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two organisations of unlike size; no file has all roles."""
    folder = tmp_path / "courts"
    folder.mkdir()
    for org, units in (("north", 6), ("south", 10)):
        rows = [
            {"case": f"{org}-{unit}", "role": ROLES[(unit + (org == "south")) % 2 + (org == "south")], "text": text}
            for unit in range(units)
            for text in (f"The claim {unit} of the {org} is heard.", f"It was filed in {org} in year {1900 + unit}.")
        ]
        (folder / f"{org}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _plan(folder: Path, terms: Terms) -> Plan:
    """The folder's first two organisations; a third lies there because a demo wants three."""
    rows = [{"case": str(unit), "text": f"Claim {unit}."} for unit in range(4)]
    (folder / "west.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_data(folder, ["case"], [], TINY, terms)
    return replace(plan, organisations=plan.organisations[:2])


def _charter(plan: Plan, **adapter: Any) -> Charter:
    roster: Any = SimpleNamespace(
        digest="0" * 64, member=lambda org: SimpleNamespace(signing_key=public_hex(generate_signing_key()))
    )
    return draft(
        plan.charter() | {"adapter": {"rank": 2, **adapter}}, federation="test", roster=roster, now=1_000_000,
        base_digest=read_manifest(TINY).digest, base_config=read_config(TINY), base_name="tiny",
    )  # fmt: skip


def _variant(charter: Charter, folder: Path, vector: np.ndarray[Any, Any]) -> Path:
    layout = charter.adapter.layout(read_config(TINY))
    adapter = charter.adapter
    write_peft(
        folder,
        layout=layout,
        vector=vector,
        seed=adapter.seed,
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_name="tiny",
    )
    manifest = {"base": charter.base, "adapter": vector_digest(vector), "private": charter.private}
    manifest |= {"files": file_digests(folder)}
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "signature": ""}))
    return folder


def _compare(
    plan: Plan, charter: Charter, tmp_path: Path, vector: np.ndarray[Any, Any] | None = None
) -> dict[str, Any]:
    """The comparison, whose variant is zeros where no other vector is given."""
    zeros = np.zeros(charter.adapter.length, np.float32)
    variant = _variant(charter, tmp_path / "variant", zeros if vector is None else vector)
    said: list[str] = []
    return compare(charter, plan.organisations, variant, TINY, folder=tmp_path, seed=0, say=said.append)


def test_every_row_is_trained_and_measured_on_the_same_units(data: Path, tmp_path: Path, make_terms: Any) -> None:
    plan = _plan(data, make_terms(private=False, max_tokens=32, rounds=2))
    result = _compare(plan, _charter(plan), tmp_path)
    assert list(result["models"]) == ["base", "alone: north", "alone: south", "pooled", "federation"]
    loss = {name: one["loss"]["value"] for name, one in result["models"].items()}
    assert loss["federation"] == loss["base"]  # A variant of zeros.
    assert result["models"]["federation"]["loss_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for name in ("alone: north", "alone: south", "pooled"):
        assert loss[name] < loss["base"] - 0.01
        assert result["models"][name]["loss_difference"]["value"] == pytest.approx(loss[name] - loss["base"])
    assert result["tasks"]["role"]["options"] == list(ROLES)
    own = result["by_organisation"]
    assert own["north"]["alone: north"]["value"] < own["north"]["base"]["value"]
    shown = io.StringIO()
    show_comparison(result, Console(file=shown, width=250))
    assert "pooled" in shown.getvalue()
    assert "costs its epsilon again" not in shown.getvalue()


@pytest.mark.parametrize(("targets", "pairs"), [("experts-shared", 1), ("experts", 16)])
def test_pairs_on_experts_are_trained_and_measured_too(
    data: Path, tmp_path: Path, make_terms: Any, targets: str, pairs: int
) -> None:
    plan = _plan(data, make_terms(private=False, max_tokens=32, rounds=1))
    charter = _charter(plan, targets=targets, layers=[1])
    layout = charter.adapter.layout(read_config(TINY))
    assert [tensor.shape for tensor in layout.trained()] == [(pairs, 256, 2), (pairs, 128, 2)]
    vector = np.random.default_rng(0).normal(scale=0.02, size=layout.length).astype(np.float32)
    result = _compare(plan, charter, tmp_path, vector)
    loss = {name: one["loss"]["value"] for name, one in result["models"].items()}
    assert abs(loss["federation"] - loss["base"]) > 1e-4  # The variant's folder gave its pairs.
    assert all(loss[name] < loss["base"] - 0.001 for name in ("alone: north", "alone: south", "pooled"))
    assert result["by_organisation"]["south"]["pooled"]["value"] < result["by_organisation"]["south"]["base"]["value"]


class _Noting(Session):
    """Trains nothing, and notes what it was to train with."""

    asked: list[tuple[Any, Setup, TrainTask]] = []  # noqa: RUF012 - emptied by the test
    models: list[tuple[Any, Any]] = []  # noqa: RUF012 - model and streamer

    def train(self, task: TrainTask) -> Any:
        self.asked.append((self._data, self._setup, task))
        self.models.append((self._adapter.model, self._streaming))
        np.zeros(self._adapter.vector().size, "<f4").tofile(task.output)


def test_private_arms_keep_the_charters_promise(
    data: Path, tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(data, make_terms(max_tokens=32, rounds=1, expected_units=8, delta=1e-3))
    charter = _charter(plan)
    monkeypatch.setattr(module, "Session", _Noting)
    _Noting.asked.clear()
    result = _compare(plan, charter, tmp_path)
    (north, _, task_north), (south, _, _), (pool, _, task_pool) = _Noting.asked
    mine = charter.participant("north")
    assert task_north.terms.noise_multiplier == mine.noise_multiplier
    assert (task_north.terms.sampling_prob, task_north.terms.seed) == (mine.sampling_prob, None)
    assert [unit.key_hash for unit in pool.train] == sorted(unit.key_hash for unit in (*north.train, *south.train))
    assert not {unit.key_hash for unit in pool.train} & {unit.key_hash for unit in (*north.heldout, *south.heldout)}
    terms = task_pool.terms
    assert terms.expected_units == sum(one.expected_units for one in charter.participants)
    event = accounting.Event(noise_multiplier=terms.noise_multiplier, sampling_prob=terms.sampling_prob, steps=1)
    assert 7.5 < accounting.epsilon([event], delta_for_accountant(charter, mine)) <= 8.0
    shown = io.StringIO()
    show_comparison(result, Console(file=shown, width=250))
    assert "to release one costs its epsilon again" in shown.getvalue()


def test_the_comparison_trains_and_measures_as_the_environment_says(
    data: Path, tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(data, make_terms(private=False, max_tokens=32, rounds=1))
    charter = _charter(plan)
    monkeypatch.setattr(module, "Session", _Noting)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    wanted = {"ATTENTION": "fused", "CHECKPOINTING": "on", "EXPERTS": "dequantised", "THREADS": "2", "DEVICE": "cpu"}
    for name, value in wanted.items():
        monkeypatch.setenv(f"FOEDUS_{name}", value)
    _Noting.models.clear()
    _compare(plan, charter, tmp_path)
    (model, streaming), *_ = _Noting.models
    assert (model.config._attn_implementation, streaming, asked) == (NAME, None, [2])
    assert all(hasattr(layer, "_foedus_recomputed") for layer in model.model.layers)
    monkeypatch.setenv("FOEDUS_EXPERTS", "fused")
    with pytest.raises(ConfigError, match="experts: expected what the fused path needs"):
        _compare(plan, charter, tmp_path)


def test_a_streamed_comparison_has_the_same_figures_and_leaves_no_copy_running(
    data: Path, tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(data, make_terms(private=False, max_tokens=32, rounds=1))
    charter = _charter(plan)
    want = _compare(plan, charter, tmp_path)
    monkeypatch.setenv("FOEDUS_STREAMING", "3")
    monkeypatch.setattr(module, "Session", _Streaming)
    _Streaming.copying.clear()
    assert _compare(plan, charter, tmp_path) == want
    assert _Streaming.copying == [True] * 3  # Two organisations and the pool.
    assert not _copying()


class _Streaming(Session):
    """Notes after each step whether a copy engine runs."""

    copying: list[bool] = []  # noqa: RUF012 - emptied by the test

    def train(self, task: TrainTask) -> Any:
        super().train(task)
        self.copying.append(bool(_copying()))


def _copying() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-copies")]


def test_what_one_holds_out_and_another_trains_on_is_left_out(
    tmp_path: Path, make_terms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty cases lie in both files, spelt in two ways; five and ten in one alone."""
    folder = tmp_path / "courts"
    folder.mkdir()
    cases = {"north": range(25), "south": [*range(20), *range(30, 40)]}
    for org, numbers in cases.items():
        rows = [
            {"case": str(number) if org == "north" else number, "role": ROLES[number % 3], "text": f"Claim {number}."}
            for number in numbers
        ]
        (folder / f"{org}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = _plan(folder, make_terms(max_tokens=32, rounds=1, expected_units=8, delta=1e-3))
    monkeypatch.setattr(module, "Session", _Noting)
    _Noting.asked.clear()
    result = _compare(plan, _charter(plan), tmp_path)
    held = {
        one.org: {n for n in cases[one.org] if is_held_out(key_hash(one.split_key, str(n)))}
        for one in plan.organisations
    }
    trained = {org: set(cases[org]) - held[org] for org in cases}
    out = {"north": held["north"] & trained["south"], "south": held["south"] & trained["north"]}
    count = sum(map(len, out.values()))
    assert count > 2
    assert result["trained_elsewhere"] == {"units": count, "questions": count}
    assert result["units"] == sum(map(len, held.values())) - count > 0
    assert result["tasks"]["role"]["questions"] == result["units"]
    assert [len(data.train) for data, _, _ in _Noting.asked[:2]] == [len(trained["north"]), len(trained["south"])]
    shown = io.StringIO()
    show_comparison(result, Console(file=shown, width=250))
    assert f"{count} held-out units are not among them" in shown.getvalue()


def test_a_variant_that_is_not_its_manifests_is_refused(data: Path, tmp_path: Path, make_terms: Any) -> None:
    plan = _plan(data, make_terms(max_tokens=32, rounds=1, expected_units=8, delta=1e-3))
    charter = _charter(plan)
    folder = _variant(charter, tmp_path / "variant", np.zeros(charter.adapter.length, np.float32))
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 4'))
    with pytest.raises(CheckpointError, match="with the digest"):
        compare(charter, plan.organisations, folder, TINY, folder=tmp_path, seed=0, say=lambda _: None)
