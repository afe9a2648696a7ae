"""The daemon's memory: what was written stands, also beside another process."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from foedus_client.state import ClientState
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.messages import ClosedRound, Scores

pytestmark = pytest.mark.unit

CHARTER = "ab" * 32


@pytest.fixture
def state(tmp_path: Path) -> ClientState:
    memory = ClientState(tmp_path / "client.db")
    memory.note_offer(digest=CHARTER, run="run-1", name="trial", purpose="research", operator_signature="0" * 128)
    return memory


def _entry(number: int, adapter: str = "1") -> ClosedRound:
    return ClosedRound(round=number, attempt=1, survivors=["a", "b"], sum_digest="2" * 64, adapter_digest=adapter * 64)


def test_the_first_answer_stands(state: ClientState) -> None:
    assert state.save_answer("m1", 5, b"first") == b"first"
    assert state.save_answer("m1", 5, b"second") == b"first"
    assert state.answer_to("m1") == b"first"
    assert state.answer_to("m2") is None


def test_a_sequence_number_is_used_once(state: ClientState) -> None:
    state.save_answer("m1", 5, b"first")
    with pytest.raises(VerificationError, match="number"):
        state.save_answer("m2", 5, b"another")


def test_our_own_numbers_rise_across_restarts(state: ClientState, tmp_path: Path) -> None:
    first = [state.next_sequence() for _ in range(3)]
    state.close()
    assert [*first, ClientState(tmp_path / "client.db").next_sequence()] == [1, 2, 3, 4]


def test_a_round_has_one_set_of_words(state: ClientState) -> None:
    state.save_words(CHARTER, 1, digest="3" * 64, size=10)
    state.save_words(CHARTER, 1, digest="3" * 64, size=10)
    with pytest.raises(StateError, match="one set of words"):
        state.save_words(CHARTER, 1, digest="4" * 64, size=10)
    assert state.round(CHARTER, 1).words == "3" * 64


def test_scores_are_kept_by_adapter_and_none_is_a_score(state: ClientState) -> None:
    assert state.scores(CHARTER, 0) == (False, None)
    state.save_scores(CHARTER, 0, None)
    state.save_scores(CHARTER, 1, Scores(loss_sum=3.0, tokens=2, units=1))
    state.save_scores(CHARTER, 1, Scores(loss_sum=9.0, tokens=2, units=1))
    assert state.scores(CHARTER, 0) == (True, None)
    assert state.scores(CHARTER, 1) == (True, Scores(loss_sum=3.0, tokens=2, units=1))


def test_history_is_appended_and_never_rewritten(state: ClientState) -> None:
    state.append_history(CHARTER, 0, _entry(1))
    state.append_history(CHARTER, 0, _entry(1))
    state.append_history(CHARTER, 1, _entry(3))
    with pytest.raises(VerificationError, match="rewritten"):
        state.append_history(CHARTER, 1, _entry(3, adapter="9"))
    assert state.history(CHARTER) == [_entry(1), _entry(3)]


def test_a_charter_keeps_its_run(state: ClientState) -> None:
    with pytest.raises(VerificationError, match="run"):
        state.note_offer(digest=CHARTER, run="run-2", name="x", purpose="x", operator_signature="0" * 128)


def test_a_decision_from_another_connection_is_seen(state: ClientState, tmp_path: Path) -> None:
    ClientState(tmp_path / "client.db").decide(CHARTER[:8], approve=True)
    assert state.charter(CHARTER).state == "approved"


def test_a_decided_charter_cannot_be_decided_otherwise(state: ClientState) -> None:
    state.decide(CHARTER, approve=False, reason="no")
    with pytest.raises(StateError, match="declined"):
        state.decide(CHARTER, approve=True)


def test_an_ambiguous_or_unknown_beginning_is_an_error(state: ClientState) -> None:
    state.note_offer(digest="ab" * 31 + "ff", run="run-2", name="x", purpose="x", operator_signature="0" * 128)
    for beginning in ("abab", "cdcd", "a", "%%%%"):
        with pytest.raises(StateError):
            state.charter(beginning)


def test_our_own_reason_outlives_the_end_of_a_refused_run(tmp_path: Path) -> None:
    state = ClientState(tmp_path / "client.db")
    for digest in ("a" * 64, "b" * 64):
        state.note_offer(digest=digest, run=f"r-{digest[0]}", name="n", purpose="p", operator_signature="0" * 128)
    state.mark_refused("a" * 64, step=10, reason="the cap would be passed")
    for digest in ("a" * 64, "b" * 64):
        state.mark_closed(digest, "refused: somebody said no")
    assert [state.charter(digest).reason for digest in ("a" * 64, "b" * 64)] == [
        "the cap would be passed",
        "refused: somebody said no",
    ]
    assert state.charter("a" * 64).state == "closed"


def test_a_full_disk_writes_nothing_and_room_is_enough_to_go_on(tmp_path: Path) -> None:
    memory = ClientState(tmp_path / "client.db")
    memory.save_answer("m1", 1, b"small")
    (pages,) = memory._db.execute("PRAGMA page_count").fetchone()
    memory._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskTrouble, match="free some space"):
        memory.save_answer("m2", 2, b"x" * 500_000)
    assert memory.answer_to("m2") is None
    memory._db.execute("PRAGMA max_page_count = 100000")
    assert memory.save_answer("m2", 2, b"x" * 500_000) == b"x" * 500_000


def test_a_disk_that_cannot_be_written_is_named(state: ClientState) -> None:
    state._db.execute("PRAGMA query_only = 1")
    with pytest.raises(DiskTrouble, match="cannot be written"):
        state.remember("name", "value")
    with pytest.raises(DiskTrouble):
        state.decide(CHARTER, approve=True)
    assert state.charter(CHARTER).state == "offered"


@pytest.mark.parametrize("damage", [b"not a database", b""])
def test_a_file_that_is_no_memory_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "client.db"
    path.write_bytes(damage * 1000)
    if damage:
        with pytest.raises(DiskTrouble, match="damaged"):
            ClientState(path)
    else:
        assert ClientState(path).charters() == []


def test_a_newer_format_is_refused_with_what_to_update(tmp_path: Path) -> None:
    ClientState(tmp_path / "client.db").close()
    with closing(sqlite3.connect(tmp_path / "client.db")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match="update Foedus"):
        ClientState(tmp_path / "client.db")


def test_a_run_that_was_left_stays_left_after_its_end(state: ClientState) -> None:
    assert not state.was_left(CHARTER)
    state.mark_left(CHARTER, "we are out")
    assert state.charter(CHARTER).state == "left"
    state.mark_closed(CHARTER, "complete: done")
    assert (state.charter(CHARTER).state, state.charter(CHARTER).reason) == ("closed", "we are out")
    assert state.was_left(CHARTER)


def test_a_round_is_restored_only_where_it_was_forgotten(state: ClientState) -> None:
    state.save_words(CHARTER, 1, digest="3" * 64, size=10)
    for number in (1, 2):
        state.restore_round(CHARTER, number, words="4" * 64, size=20, receipt={"verdict": "included"})
    known, restored = state.rounds(CHARTER)
    assert (known.words, known.receipt) == ("3" * 64, None)
    assert (restored.words, restored.words_bytes, restored.receipt) == ("4" * 64, 20, {"verdict": "included"})


def test_a_noted_status_line_leaves_later_writes_durable(state: ClientState) -> None:
    state.note({"life:doing": "training"})
    assert state.fact("life:doing") == "training"
    assert state._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_one_run_has_one_charter(tmp_path: Path) -> None:
    with closing(ClientState(tmp_path / "client.db")) as state:
        offer = {"run": "r-1", "name": "n", "purpose": "p", "operator_signature": "s"}
        state.note_offer(digest="a" * 64, **offer)
        with pytest.raises(VerificationError, match="expected one charter in run r-1"):
            state.note_offer(digest="b" * 64, **offer)
        assert [one.digest for one in state.charters()] == ["a" * 64]
