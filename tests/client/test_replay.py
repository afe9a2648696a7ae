"""What an extension goes on from, as an organisation finds it for itself: charters, sums, adapter and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.replay import catch_up, earlier, forget, start
from foedus_client.seat import Course
from foedus_protocols import rules
from foedus_protocols.canonical import canonical_bytes
from foedus_protocols.charter import Charter
from foedus_protocols.errors import ConnectError, PolicyRefused, StateError, VerificationError
from foedus_protocols.messages import ClosedRound, History

NEW_RUN = "north-2"


@dataclass
class Ended:
    """A desk whose run is over, and the charter that goes on from it."""

    desk: Any
    history: str
    charter: Charter

    @property
    def course(self) -> Course:
        return Course(charter=self.charter, org="ahorn", run=NEW_RUN)

    def earlier(self) -> Any:
        return earlier(self.charter, "ahorn", self.desk.ports, self.desk.ledger)


def extension(old: Charter, *, run: str, history: str, adapter: str, spent: int, **changes: Any) -> Charter:
    """A charter that extends another; `changes` replace whole sections."""
    value = old.model_dump(mode="json", exclude_none=True)
    value["adapter"] |= {"initial_digest": adapter}
    value["privacy"] |= {"rounds": 2} | ({"epsilon": 20.0} if old.private else {})
    value["extends"] = {
        "run": run, "charter": old.digest, "history": history, "adapter": adapter, "rounds_spent": spent,
    }  # fmt: skip
    return Charter.parse(canonical_bytes(value | changes))


@pytest.fixture
def ended(make_desk: Callable[..., Any], tmp_path: Path) -> Ended:
    """A run of mode none with momentum that closed three rounds without us, and is over."""
    recipe = {"optimiser": {"name": "adam", "beta1": 0.9}}
    desk = make_desk(private=False, recipe=recipe)
    desk.state.mark_signed(desk.charter.digest, "a" * 128)
    for number in (1, 2, 3):
        rng = np.random.default_rng(number)
        vectors = {org: rng.normal(0, 0.05, 300).astype(np.float32) for org in ("birke", "celtis")}
        desk.coordinator.close_round(number, vectors, tmp_path)
    catch_up(desk.coordinator.history_digest, desk.seat, desk.ports)
    for entry in desk.coordinator.history:
        desk.store.delete(entry.sum_digest)
    forget(desk.charter.digest, desk.ports.work)
    desk.state.mark_closed(desk.charter.digest, "complete: 3 of 4 rounds")
    charter = extension(
        desk.charter,
        run="north-1",
        history=desk.coordinator.history_digest,
        adapter=desk.coordinator.adapter_digest,
        spent=4,
    )
    desk.coordinator.store.put_bytes(desk.charter.canonical())
    desk.pulls.clear()
    return Ended(desk, desk.coordinator.history_digest, charter)


def test_the_ended_run_is_replayed_from_its_sums(ended: Ended) -> None:
    found = ended.earlier()
    assert found.charters == (ended.desk.charter,)
    assert found.adapter == ended.desk.coordinator.adapter_digest
    assert found.rounds == 3
    sums = [entry.sum_digest for entry in ended.desk.coordinator.history]
    assert [one for one in ended.desk.pulls if one in sums] == sums
    # They have done their work; the daemon's disk does not keep every run that was ever extended.
    assert not any(ended.desk.store.has(one) for one in sums)
    ended.desk.pulls.clear()
    assert ended.earlier() == found
    assert ended.desk.pulls == []


def test_the_optimisers_state_goes_on(ended: Ended) -> None:
    position = start(ended.course, ended.desk.ports)
    state, theirs = position.state, ended.desk.coordinator.optimiser
    assert (position.after, state.step) == (0, 3)
    assert state.first.any()
    np.testing.assert_array_equal(state.first, theirs.first)
    np.testing.assert_array_equal(state.second, theirs.second)


def test_a_round_of_the_extension_is_replayed_with_kept_moments_and_without(ended: Ended, tmp_path: Path) -> None:
    desk, old = ended.desk, ended.desk.coordinator
    ended.earlier()
    new = type(old)(ended.charter, old.key, old.store)
    new.adapter, new.optimiser = old.adapter, old.optimiser
    desk.state.note_offer(
        digest=ended.charter.digest, run=NEW_RUN, name="trial", purpose="research", operator_signature="b" * 128
    )
    vectors = {org: np.random.default_rng(9).normal(0, 0.05, 300).astype(np.float32) for org in ("birke", "celtis")}
    new.close_round(1, vectors, tmp_path)
    assert rules.initial_state(ended.charter.rule(), 300).step == 0
    assert new.optimiser.step == 4
    desk.pulls.clear()
    position = catch_up(new.history_digest, ended.course, desk.ports)
    assert (position.after, position.digest) == (1, new.adapter_digest)
    assert not {entry.sum_digest for entry in old.history} & set(desk.pulls)
    # Right adapter, wrong moments in the kept file: the digest is wrong after one more round, and all is replayed.
    (kept,) = desk.ports.work.glob("position-*")
    head, _, arrays = kept.read_bytes().partition(b"\n")
    kept.write_bytes(head + b"\n" + arrays[: 300 * 4] + np.ones(300, "<f4").tobytes() + arrays[600 * 4 :])
    new.close_round(2, vectors, tmp_path)
    assert catch_up(new.history_digest, ended.course, desk.ports).digest == new.adapter_digest
    assert {entry.sum_digest for entry in old.history} <= set(desk.pulls)


def test_a_run_that_was_never_signed_here_is_not_gone_on_with(ended: Ended) -> None:
    state = ended.desk.state
    state._db.execute("UPDATE charters SET signature = NULL")
    with pytest.raises(VerificationError, match="signed here"):
        ended.earlier()
    ended.charter = extension(
        ended.desk.charter,
        run="another-run",
        history=ended.history,
        adapter=ended.charter.adapter.initial_digest,
        spent=4,
    )
    state.mark_signed(ended.desk.charter.digest, "a" * 128)
    with pytest.raises(VerificationError, match="another-run"):
        ended.earlier()


def test_a_run_that_a_person_left_is_not_gone_on_with(ended: Ended) -> None:
    """Not even by a policy that signs by itself; what leaves is the number of the check that leaving has."""
    ended.desk.state.mark_left(ended.desk.charter.digest, "no more")
    ended.desk.state.mark_closed(ended.desk.charter.digest, "complete: 3 of 4 rounds")
    with pytest.raises(PolicyRefused, match="has left it") as refusal:
        ended.earlier()
    assert refusal.value.step == 3
    assert ended.desk.pulls == [ended.desk.charter.digest]


def test_another_adapter_than_the_sums_give(ended: Ended) -> None:
    lie = "e" * 64
    ended.charter = extension(ended.desk.charter, run="north-1", history=ended.history, adapter=lie, spent=4)
    with pytest.raises(VerificationError, match="starts from eeee"):
        ended.earlier()
    assert not list(ended.desk.ports.work.glob("position-*"))


@pytest.mark.parametrize("what", ["shorter", "rewritten", "other sums"])
def test_another_history_than_was_seen(ended: Ended, what: str) -> None:
    old = ended.desk.coordinator
    rounds: list[ClosedRound] = list(old.history)
    if what == "shorter":
        rounds = rounds[:2]
    elif what == "rewritten":
        rounds[1] = rounds[1].model_copy(update={"attempt": 2})
    else:
        rounds[2] = rounds[2].model_copy(update={"sum_digest": rounds[1].sum_digest})
    history = old.store.put_bytes(History(charter_digest=ended.desk.charter.digest, rounds=rounds).encode())
    ended.charter = extension(
        ended.desk.charter, run="north-1", history=history, adapter=rounds[-1].adapter_digest, spent=4
    )
    with pytest.raises(VerificationError, match="continues the 3 rounds"):
        ended.earlier()


def test_a_history_whose_end_we_did_not_see_must_follow_from_its_sums(ended: Ended) -> None:
    """An organisation that was away at the end has only the sums to go by, and they decide."""
    old, state = ended.desk.coordinator, ended.desk.state
    state._db.execute("DELETE FROM history WHERE position = 2")
    assert ended.earlier().rounds == 3
    forget(ended.charter.digest, ended.desk.ports.work)
    state._db.execute("DELETE FROM history WHERE position = 2")
    wrong = old.history[2].model_copy(update={"sum_digest": old.history[1].sum_digest})
    history = History(charter_digest=ended.desk.charter.digest, rounds=[*old.history[:2], wrong])
    ended.charter = extension(
        ended.desk.charter,
        run="north-1",
        history=old.store.put_bytes(history.encode()),
        adapter=wrong.adapter_digest,
        spent=4,
    )
    with pytest.raises(VerificationError, match="lead where its history says"):
        ended.earlier()


def test_other_terms_are_another_run(ended: Ended) -> None:
    privacy = ended.charter.privacy.model_dump(mode="json", exclude_none=True) | {"l2_clip_norm": 0.25}
    ended.charter = Charter.parse(
        canonical_bytes(ended.charter.model_dump(mode="json", exclude_none=True) | {"privacy": privacy})
    )
    with pytest.raises(VerificationError, match=r"privacy\.l2_clip_norm"):
        ended.earlier()


def test_a_broken_line_is_no_ground_for_refusing(ended: Ended) -> None:
    def cut(wanted: str, limit: int) -> Path:
        raise ConnectError("the line is cut")

    object.__setattr__(ended.desk.ports, "pull", cut)
    with pytest.raises(ConnectError):
        ended.earlier()


def test_the_command_line_sees_what_the_daemon_kept(ended: Ended) -> None:
    """A person who approves beside the daemon has its files and no line."""
    sources = ended.desk.ports
    object.__setattr__(sources, "pull", lambda wanted, limit: ended.desk.store.path(wanted))
    with pytest.raises(StateError, match="store"):
        ended.earlier()
    object.__setattr__(sources, "pull", ended.desk.pull)
    found = ended.earlier()
    object.__setattr__(sources, "pull", lambda wanted, limit: ended.desk.store.path(wanted))
    assert ended.earlier() == found
