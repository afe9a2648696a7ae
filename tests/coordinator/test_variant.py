"""The variant folder: what PEFT loads, what is signed, and what the card says in plain words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_coordinator import figures
from foedus_coordinator.chain import Chain
from foedus_coordinator.figures import losses
from foedus_coordinator.rounds import execute
from foedus_coordinator.variant import MANIFEST_CONTEXT, card, epsilon_after, write_variant
from foedus_protocols import layout, peft_folder
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.errors import VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.identity import verify
from foedus_protocols.messages import Scores
from foedus_protocols.peft_folder import read_peft
from safetensors import SafetensorError

PRIVATE = {
    "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "rounds": 2, "l2_clip_norm": 1.0},
    "participants": [
        {"id": org, "unit": unit, "units_at_most": units}
        for org, unit, units in (("alpha", "patient", 64), ("beta", "patient", 256), ("gamma", "matter", 256))
    ],
    "seed": None,
}


def finished(federation: Any, **changes: Any) -> tuple[Any, Chain, dict[str, Any], Path]:
    """A run with two closed rounds as the database would have it, its variant written."""
    federation.start_run(**changes)
    run = federation.run()
    for number in (1, 2):
        run.storage.add_round(run.id, number, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64)
    run.storage.update_round(run.id, 1, state="closed", survivors=json.dumps(["alpha", "beta"]))
    run.storage.update_round(run.id, 2, state="failed", reason="short")
    run.storage.update_run(run.id, outcome="complete")
    chain = run.chain(0)
    chain.adapter = np.arange(run.charter.adapter.length, dtype=np.float32) / 100
    chain.closed = 1
    folder = write_variant(run, chain, folder=federation.root / "variants", key=federation.home.operator_key)
    manifest = json.loads((folder / "manifest.json").read_text())
    run.storage.close()
    return run, chain, manifest, folder


def test_a_private_variant(federation: Any) -> None:
    run, _, signed, folder = finished(federation, **PRIVATE)
    manifest = signed["manifest"]
    verify(federation.orgs["alpha"].operator_key, MANIFEST_CONTEXT, canonical_bytes(manifest), signed["signature"])
    assert manifest["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert (manifest["private"], manifest["rounds_offered"], manifest["rounds_closed"]) == (True, 2, 1)
    # The failed round is spent too: its vectors left the organisations.
    assert manifest["privacy"]["epsilon"] == epsilon_after(run.charter, 2)
    assert 7.0 < manifest["privacy"]["epsilon"] <= 8.0
    assert epsilon_after(run.charter, 1) < manifest["privacy"]["epsilon"]
    assert [one["rounds_included"] for one in manifest["participants"]] == [1, 1, 0]
    text = (folder / "README.md").read_text()
    assert "epsilon = " in text
    assert "the coordinator sees each organisation's noised vector" in text
    assert "Epsilon does not cover the held-out units" in text
    assert "matter, patient" in text
    assert "NOT PRIVATE" not in text


def test_an_evaluation_term_of_none_promises_and_measures_nothing_more(federation: Any) -> None:
    *_, folder = finished(federation, **PRIVATE, evaluation={"term": "none"})
    text = (folder / "README.md").read_text()
    assert "does not cover" not in text
    assert "lets no score out" in text


def test_mode_none_says_not_private_everywhere(federation: Any) -> None:
    _, _, signed, folder = finished(federation)
    assert signed["manifest"]["private"] is False
    assert signed["manifest"]["privacy"]["epsilon"] is None
    assert folder.name.endswith("-NOT-PRIVATE")
    assert (folder / "README.md").read_text().startswith("# small: NOT PRIVATE")


def test_the_peft_files_hold_the_adapter(federation: Any) -> None:
    run, chain, _, folder = finished(federation)
    shape = layout.adapter_layout(
        json.loads(federation.home.storage.run(run.id).base_config), targets="attention", rank=2
    )
    read = read_peft(folder, shape)
    assert np.array_equal(read.vector, chain.adapter)
    assert (read.rank, read.alpha, read.base_name) == (2, 4.0, "toy")


def test_writing_again_replaces_the_folder_by_the_same(federation: Any) -> None:
    _, chain, _, folder = finished(federation)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = write_variant(federation.run(), chain, folder=folder.parent, key=federation.home.operator_key)
    assert again == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_another_base_configuration_is_refused(federation: Any) -> None:
    federation.start_run()
    other = canonical_bytes(json.loads(federation.home.storage.run(federation.run_id).base_config) | {"head_dim": 8})
    federation.home.storage.update_run(federation.run_id, base_config=other)
    run = federation.run()
    chain = run.chain(0)
    with pytest.raises(VerificationError, match="expected the layout"):
        write_variant(run, chain, folder=federation.root / "variants", key=federation.home.operator_key)


def test_losses_compare_the_same_organisations_throughout() -> None:
    def score(total: float, tokens: int) -> Scores:
        return Scores(loss_sum=total, tokens=tokens, units=1)

    curve = losses(
        {0: {"a": score(30, 10), "b": score(10, 10)}, 1: {"a": score(20, 10), "b": score(0, 0), "c": score(9, 9)}}
    )
    assert [(point.after, point.loss, point.tokens) for point in curve] == [(0, 2.0, 20), (1, 2.0, 10)]
    assert losses({}) == []
    assert losses({0: {"a": score(1, 1)}, 1: {"b": score(1, 1)}}) == []


def test_the_card_needs_nothing_but_the_manifest(federation: Any) -> None:
    _, _, signed, folder = finished(federation)
    assert card(signed["manifest"]) == (folder / "README.md").read_text()


def test_a_slot_and_a_chosen_adapter_stand_on_the_card(federation: Any) -> None:
    """Scores 1.0, 0.4, 0.7: the adapter after one of two closed rounds was chosen, which the card says."""
    schedule = {"round_seconds": 60.0, "vector_slot_seconds": 30.0}
    federation.start_run(**PRIVATE, schedule=schedule, release={"adapter": "best"}, evaluation={"term": "plain"})
    run = federation.run()
    for number, survivors in ((1, ["alpha", "beta"]), (2, ["alpha", "gamma"])):
        run.storage.add_round(run.id, number, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64)
        run.storage.update_round(run.id, number, state="closed", survivors=json.dumps(survivors))
    with run.storage.write() as connection:
        for after, loss in enumerate((100.0, 40.0, 70.0)):
            figures.add_scores(connection, run.id, after, "alpha", Scores(loss_sum=loss, tokens=100, units=4))
    chain = run.chain(0)
    chain.closed = 1
    folder = write_variant(run, chain, folder=federation.root / "variants", key=federation.home.operator_key)
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    run.storage.close()
    assert manifest["released"] == {"adapter": "best", "after": 1}
    assert (manifest["rounds_closed"], manifest["evaluation"]["loss_after"]) == (2, 0.4)
    assert manifest["privacy"]["epsilon"] == epsilon_after(run.charter, 2)
    assert [one["rounds_included"] for one in manifest["participants"]] == [1, 1, 0]
    text = (folder / "README.md").read_text()
    assert "after 1 of 2 closed rounds: of those that were scored, the one with the lowest held-out loss" in text
    assert "selected on these scores" in text
    assert "multiple of 30 s" in text
    assert "leaves when it is ready" not in text


def test_the_lowest_loss_is_the_latest_of_equals() -> None:
    curve = [figures.Loss(after=after, loss=loss, tokens=10) for after, loss in ((0, 1.0), (1, 0.5), (3, 0.5))]
    assert figures.lowest(curve).after == 3
    assert figures.loss_at(curve, 1) == 0.5
    assert figures.loss_at(curve, 2) is None
    assert figures.loss_at(curve, None) == 0.5
    assert figures.loss_at([], None) is None


def test_a_full_disk_is_trouble_that_passes(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    federation.start_run()
    run = federation.run()
    chain = run.chain(0)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(peft_folder, "save_file", full)
    with pytest.raises(DiskTrouble, match="No space left"):
        write_variant(run, chain, folder=federation.root / "variants", key=federation.home.operator_key)
    assert not list((federation.root / "variants").glob("*-NOT-PRIVATE"))
    run.storage.close()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": "experts-shared", "train": "both"}, "one pair shared by a layer's experts, rank 2, 176 trained"),
        ({"targets": "experts", "layers": [0]}, "a pair for every expert in layer 0, rank 2, 288 trained parameters,"),
        ({"targets": "attention", "train": "both"}, "attention, rank 2, 448 trained parameters, both factors trained"),
    ],
    ids=["experts-shared", "experts", "attention"],
)
def test_a_run_of_every_kind_gives_a_folder_of_it(
    federation: Any, pump: Any, adapter: dict[str, Any], said: str
) -> None:
    """Organisations replay from the same start, a trained A included, and whoever has the folder can load it."""
    federation.start_run(adapter={"rank": 2, "alpha": 4.0, "seed": "tests"} | adapter)
    with pump(federation):
        execute(federation.run())
    row = federation.home.storage.run(federation.run_id)
    assert (row.state, row.outcome) == ("finished", "complete"), row.reason
    folder = Path(row.variant)
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    shape = peft_folder.folder_layout(folder, json.loads(row.base_config), manifest)
    assert shape == federation.run().charter.adapter.layout(json.loads(row.base_config))
    read = read_peft(folder, shape)
    assert layout.vector_digest(read.vector) == manifest["adapter"]
    assert manifest["adapter_terms"] == {"layers": None, "train": "b", "alpha": 4.0, "rank": 2} | adapter | {
        "parameters": shape.length
    }
    assert said in (folder / "README.md").read_text()
