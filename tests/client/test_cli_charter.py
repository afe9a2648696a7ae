"""A person approves a charter: what stands against it is said at once, by its exit code, and nothing changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.ledger import Ledger
from foedus_client.replay import adapter_bytes
from foedus_protocols import codec, rules
from foedus_protocols.canonical import digest
from foedus_protocols.charter import charter_events
from foedus_protocols.charter_extension import draft_extension
from foedus_protocols.messages import ClosedRound, History
from foedus_protocols.store import FileStore
from support.coded import decode_sum, read_packed
from support.desk import US, Desk


@pytest.fixture
def desk(tmp_path: Path, league: Any) -> Desk:
    return Desk(tmp_path / "home", league)


def test_a_charter_within_the_policy_is_approved(desk: Desk) -> None:
    assert desk.approve() == 0
    assert desk.stands() == "approved"


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        pytest.param("max_tokens = 1024", "max_tokens = 64", 5, "error: check 9:", id="longer records than allowed"),
        pytest.param("max_rounds = 1000", "max_rounds = 3", 5, "error: check 9:", id="more rounds than allowed"),
        pytest.param("minimum_members = 2", "minimum_members = 3", 5, "error: check 6:", id="too few members"),
        pytest.param("epsilon_cap = 8.0", "epsilon_cap = 7.5", 6, "error: check 10:", id="a cap that is too low"),
    ],
)
@pytest.mark.parametrize("stands", ["offered", "refused"])
def test_a_charter_that_asks_for_more_is_refused_by_its_exit_code(
    stands: str, before: str, after: str, code: int, said: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the daemon has refused it by itself, or the policy was changed while it waited."""
    desk.change(before, after)
    if stands == "refused":
        desk.state.mark_refused(desk.charter.digest, step=9, reason="check 9: too much")
    assert desk.approve() == code
    assert said in capsys.readouterr().err
    assert desk.stands() == stands
    assert Ledger(desk.home.ledger).admission(desk.charter.digest) is None


def test_a_budget_that_was_given_to_another_charter_is_gone(
    desk: Desk, league: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = league.draft(name="second")
    mine = other.participant(US)
    ledger = Ledger(desk.home.ledger)
    ledger.open_namespace("people", unit="patient")
    ledger.admit(
        "people", other.digest, charter_events(other, mine), 1e-5, 8.5, expires=other.expires, sign=lambda: "s"
    )
    assert desk.approve() == 6
    assert "raise epsilon_cap" in capsys.readouterr().err
    assert desk.stands() == "offered"


def ended_run(desk: Desk, folder: Path) -> tuple[History, bytes]:
    """The desk's charter is signed and its run over after one round; its history, and the sum's bytes."""
    charter = desk.charter
    desk.state.mark_signed(charter.digest, "a" * 128)
    coding, key = charter.coding(), charter.coding_key("r-1", 1)
    paths = []
    for one in charter.participants:
        vector = np.random.default_rng(len(paths)).normal(0, 0.01, coding.length).astype(np.float32)
        encoded = codec.encode(vector, coding=coding, key=key, uniform=codec.seeded_uniform(one.id.encode()))
        paths.append(folder / one.id)
        paths[-1].write_bytes(codec.pack(encoded.words, coding.ring_bits))
    desk.state.save_words(charter.digest, 1, digest="d" * 64, size=coding.packed_bytes)
    codec.add_packed_files(paths, coding=coding, out=folder / "sum")
    total = decode_sum(read_packed(folder / "sum", coding), coding=coding, key=key)
    orgs = [one.id for one in charter.participants]
    mean = rules.mean_of_sum(total, [charter.relative_weight(org) for org in orgs])
    start = np.zeros(coding.length, np.float32)
    adapter, _ = rules.advance(
        start, mean, rule=charter.rule(), state=rules.initial_state(charter.rule(), coding.length)
    )
    entry = ClosedRound(
        round=1, attempt=1, survivors=orgs, sum_digest=digest((folder / "sum").read_bytes()),
        adapter_digest=digest(adapter_bytes(adapter)),
    )  # fmt: skip
    desk.state.mark_closed(charter.digest, "complete: 1 of 4 rounds")
    return History(charter_digest=charter.digest, rounds=[entry]), (folder / "sum").read_bytes()


def test_a_person_approves_an_extension_after_the_same_replay_as_the_daemons(
    desk: Desk, league: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history, total = ended_run(desk, tmp_path)
    old, files = desk.charter, FileStore(desk.home.files)
    desk.change("epsilon_cap = 8.0", "epsilon_cap = 20.0")

    def offer(start: str) -> None:
        desk.charter, _ = draft_extension(
            old, first=old, run="r-1", history=digest(history.encode()), adapter=start, opened=1, rounds=4,
            roster=league.rosters[-1], now=int(time.time()), valid_seconds=86_400,
        )  # fmt: skip
        for data in (desk.charter.canonical(), history.encode(), total):
            files.put_bytes(data)
        desk.state.note_offer(
            digest=desk.charter.digest, run=f"r-{start[:4]}", name="first", purpose="research",
            operator_signature=league.signature(desk.charter),
        )  # fmt: skip

    offer("e" * 64)
    assert desk.approve() == 5
    assert "error: check 8:" in capsys.readouterr().err
    assert desk.stands() == "offered"
    offer(history.rounds[0].adapter_digest)
    assert desk.approve() == 0
    assert desk.stands() == "approved"
