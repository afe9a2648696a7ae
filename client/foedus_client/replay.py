"""From published sums to the adapter: every organisation computes it, and a member that was away catches up.

A run's history names, for each closed round, whose vectors are in the sum, the sum's file, and the digest of the
adapter that follows. The sums are kept by the coordinator, so a member that missed any number of rounds pulls them and
runs `rules.py` over them, optimiser state included: the same function, the same bits, the same digest as everybody
else.

An extension (`charter.Extends`) starts where an ended run stopped. Before it is signed, and again where the kept
position is lost, the ended run's sums are pulled and replayed in the same way, down to the first run of the chain.

The last position is kept as a file in the work folder. It saves time and is never trusted: a wrong one ends in a wrong
digest, and the replay begins again at the start.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from foedus_protocols import codec, rules
from foedus_protocols.canonical import digest
from foedus_protocols.charter import MAX_CHARTER_BYTES, Charter, Extends
from foedus_protocols.charter_extension import Earlier, require_same_terms
from foedus_protocols.errors import VerificationError
from foedus_protocols.files import disk_errors
from foedus_protocols.messages import MAX_HISTORY_BYTES, ClosedRound, History

from foedus_client.branches import extensions
from foedus_client.ledger import Ledger
from foedus_client.life import require_not_left
from foedus_client.seat import Course, Sources
from foedus_client.state import RoundRecord

Vector = npt.NDArray[np.float32]

_FACTS_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after some closed rounds: the adapter, the optimiser's state, and the adapter's digest."""

    after: int
    adapter: Vector  # (d,)
    state: rules.State
    digest: str


class AdapterDiffers(VerificationError):
    """The adapter that follows from the sums is not the one that was announced."""

    def __init__(self, *, ours: str, theirs: str, number: int) -> None:
        super().__init__(
            f"expected the adapter {ours[:12]} after round {number}, as it follows from the published sums, got "
            f"{theirs[:12]}; the coordinator or this program computes another rule: compare versions"
        )
        self.ours = ours


def catch_up(history_digest: str, course: Course, ports: Sources) -> Position:
    """Replay what was not replayed yet, and return where the run stands.

    Raises:
        VerificationError: The history rewrites what was seen, names strangers, too few survivors or our own vector
            where we made none, or says something else of it than our receipt; or a sum has not the size of this
            charter's words; or the run that this one extends does not lead to its start.
        AdapterDiffers: The rule gives another adapter than the history says.
    """
    history = read_history(ports.pull(history_digest, MAX_HISTORY_BYTES), course)
    _check_history(history, course, ports)
    kept = _resume(history, course, ports)
    try:
        position = _replay(kept or start(course, ports), history.rounds, course, ports)
    except AdapterDiffers:
        if kept is None:
            raise
        position = _replay(start(course, ports), history.rounds, course, ports)
    if position is not kept:
        _save(position, course, ports)
    return position


def read_history(path: Path, course: Course) -> History:
    """Parse a history file of this charter.

    Raises:
        VerificationError: Too long, malformed, or of another charter.
    """
    size = path.stat().st_size
    if size > MAX_HISTORY_BYTES:  # Before it is in memory.
        raise VerificationError(f"expected a history of at most {MAX_HISTORY_BYTES} bytes, got {size}")
    history = History.decode(path.read_bytes())
    if history.charter_digest != course.digest:
        raise VerificationError(
            f"expected the history of charter {course.digest[:12]}, got that of {history.charter_digest[:12]}"
        )
    return history


def start(course: Course, ports: Sources) -> Position:
    """Before round 1: B = 0 and no moments, or where the run that is extended ended.

    Raises:
        VerificationError: The charter starts from another adapter, or what it extends is not as it says (`earlier`).
    """
    if course.charter.extends is None:
        adapter = np.zeros(course.charter.adapter.length, dtype=np.float32)
        state = rules.initial_state(course.rule, adapter.size)
        position = Position(after=0, adapter=adapter, state=state, digest=digest(adapter_bytes(adapter)))
    else:
        position = replace(_end_of(course.charter.extends, course, ports), after=0)
    if position.digest != course.charter.adapter.initial_digest:
        raise VerificationError(
            f"expected the charter to start from the adapter {position.digest[:12]}, it starts from "
            f"{course.charter.adapter.initial_digest[:12]}"
        )
    return position


def earlier(charter: Charter, org: str, ports: Sources, ledger: Ledger) -> Earlier:
    """What an extension goes on from, recomputed before it is signed (check 8).

    The position is kept for the first round, and the sums of the ended runs, which it no longer needs, are erased.
    Rounds of other extensions of these runs, which the ledger knows, count as spent with theirs (`branches.py`).

    Raises:
        VerificationError: A charter of the chain was not signed here or has other terms, a history contradicts what was
            seen, or the sums do not lead to where the charter starts.
        PolicyRefused: A person here has left one of the ended runs (check 3).
        ConnectError: The line broke while something was fetched.
    """
    course = Course(charter=charter, org=org, run="")
    ended = [course]
    while ended[-1].charter.extends is not None:
        ended.append(_ended(ended[-1].charter.extends, ended[-1], ports))
    del ended[0]
    for one in ended:
        require_not_left(ports.state, one.digest)
    position = _kept(course, ports)
    if position is None or position.after or position.digest != charter.adapter.initial_digest:
        position = start(course, ports)
        _save(position, course, ports)
    chain = {one.digest for one in ended}
    others = {other for one in chain for other in extensions(ledger.accounts().values(), one)} - chain
    rounds = sum(_rounds_seen(one, ports) for one in chain | (others - {charter.digest}))
    return Earlier(charters=tuple(one.charter for one in reversed(ended)), adapter=position.digest, rounds=rounds)


def _ended(extends: Extends, course: Course, ports: Sources) -> Course:
    """The run that an extension goes on from: one that we signed, on the same terms."""
    known = ports.state.charter(extends.charter) if ports.state.knows(extends.charter) else None
    if known is None or known.signature is None or known.run != extends.run:
        raise VerificationError(
            f"expected an extension of a run whose charter was signed here, got one of {extends.run} under charter "
            f"{extends.charter[:12]}, which was not"
        )
    charter = Charter.parse(ports.pull(extends.charter, MAX_CHARTER_BYTES).read_bytes())
    require_same_terms(course.charter, charter)
    return Course(charter=charter, org=course.org, run=extends.run)


def _end_of(extends: Extends, course: Course, ports: Sources) -> Position:
    """Where the ended run stands after its last closed round, from its sums."""
    ended = _ended(extends, course, ports)
    history = read_history(ports.pull(extends.history, MAX_HISTORY_BYTES), ended)
    _check_history(history, ended, ports)
    try:
        position = _replay(start(ended, ports), history.rounds, ended, ports)
    except AdapterDiffers as error:
        # Of the ended run, and so no answer to the question which adapter follows in this one.
        raise VerificationError(
            f"expected the ended run {extends.run} to lead where its history says: {error}"
        ) from None
    for entry in history.rounds:
        ports.store.delete(entry.sum_digest)
    ports.store.delete(extends.history)
    return position


def _rounds_seen(charter: str, ports: Sources) -> int:
    """How many rounds of an ended run were opened, as far as we saw: those that we made words for, and closed ones."""
    made = [one.round for one in ports.state.rounds(charter)]
    closed = [entry.round for entry in ports.state.history(charter)]
    return max([*made, *closed], default=0)


def adapter_bytes(adapter: Vector) -> bytes:
    """An adapter's file: raw little-endian float32."""
    return adapter.astype("<f4", copy=False).tobytes()


def step(position: Position, entry: ClosedRound, course: Course, ports: Sources) -> Position:
    """One closed round further. The arrays of `position` are overwritten: at 100 MB each, three more would count."""
    path = ports.pull(entry.sum_digest, course.coding.packed_bytes)
    key = course.charter.coding_key(course.run, entry.round)
    mean = rules.mean_of_sum(
        codec.decode_file(path, coding=course.coding, key=key), course.weights(entry.survivors)
    )  # (d,)
    adapter, state = rules.advance(position.adapter, mean, rule=course.rule, state=position.state, in_place=True)
    return Position(after=position.after + 1, adapter=adapter, state=state, digest=digest(adapter_bytes(adapter)))


def _replay(position: Position, entries: list[ClosedRound], course: Course, ports: Sources) -> Position:
    for index in range(position.after, len(entries)):
        entry = entries[index]
        position = step(position, entry, course, ports)
        if position.digest != entry.adapter_digest:
            raise AdapterDiffers(ours=position.digest, theirs=entry.adapter_digest, number=entry.round)
        ports.state.append_history(course.digest, index, entry)
        ports.tick()
    return position


def _check_history(history: History, course: Course, ports: Sources) -> None:
    known = ports.state.history(course.digest)
    if history.rounds[: len(known)] != known:
        raise VerificationError(
            f"expected a history that continues the {len(known)} rounds seen before, got another one: "
            "the coordinator shows this organisation a different run, or forgot rounds"
        )
    named = {participant.id for participant in course.charter.participants}
    made = {one.round: one for one in ports.state.rounds(course.digest)}
    before = 0
    for entry in history.rounds:
        if not before < entry.round <= course.charter.privacy.rounds:
            raise VerificationError(f"expected rising rounds up to {course.charter.privacy.rounds}, got {entry.round}")
        before = entry.round
        survivors = set(entry.survivors)
        if len(survivors) != len(entry.survivors) or not survivors <= named:
            raise VerificationError(f"expected survivors of round {entry.round} to be participants, each once")
        if len(survivors) < course.charter.masks.min_survivors:
            raise VerificationError(
                f"expected at least {course.charter.masks.min_survivors} survivors in round {entry.round}, "
                f"got {len(survivors)}"
            )
        _check_our_part(entry, made.get(entry.round), course)


def _check_our_part(entry: ClosedRound, made: RoundRecord | None, course: Course) -> None:
    """A closed round says of our own vector what we know of it."""
    included = course.org in entry.survivors
    if included and made is None:
        raise VerificationError(
            f"expected a vector of {course.org} in round {entry.round} only if this daemon made one; it made none. "
            "Either somebody sent one in its name, or client.db was restored from a backup"
        )
    if made is not None and made.receipt is not None and included != (made.receipt["verdict"] == "included"):
        raise VerificationError(
            f"expected our vector of round {entry.round} to be {made.receipt['verdict']} as its signed receipt says, "
            "the survivors say otherwise: keep the receipt, the coordinator broke its word"
        )


# The kept position.


def forget(charter_digest: str, work: Path) -> None:
    """Drop the kept position of a run."""
    _place(charter_digest, work).unlink(missing_ok=True)


def _place(charter_digest: str, work: Path) -> Path:
    return work / f"position-{charter_digest[:16]}.f32"


def _save(position: Position, course: Course, ports: Sources) -> None:
    """One line of JSON, then three raw arrays, piece by piece and without waiting for the disk: nobody trusts it."""
    state, place = position.state, _place(course.digest, ports.work)
    facts = {"after": position.after, "step": state.step, "charter": course.digest}
    part = place.with_suffix(".part")
    with disk_errors(place):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(facts).encode() + b"\n")
            for array in (position.adapter, state.first, state.second):
                file.write(array.astype("<f4", copy=False).data)
        part.replace(place)


def _resume(history: History, course: Course, ports: Sources) -> Position | None:
    """The kept position where it lies on this history."""
    position = _kept(course, ports)
    if position is None or position.after > len(history.rounds):
        return None
    closed = history.rounds[position.after - 1].adapter_digest if position.after else None
    return position if position.digest == (closed or course.charter.adapter.initial_digest) else None


def _kept(course: Course, ports: Sources) -> Position | None:
    """What the file says, where it can be read and has the shapes of this run; whether it is right shows later."""
    length = course.charter.adapter.length
    sizes = (length, length, rules.initial_state(course.rule, length).second.size)
    try:
        with _place(course.digest, ports.work).open("rb") as file:
            facts = json.loads(file.readline(_FACTS_BYTES))
            adapter, first, second = (np.fromfile(file, "<f4", size).astype(np.float32, copy=False) for size in sizes)
        after, count = int(facts["after"]), int(facts["step"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    found = (adapter.size, first.size, second.size)
    if facts.get("charter") != course.digest or found != sizes or after < 0 or count < 0:
        return None
    state = rules.State(step=count, first=first, second=second)
    return Position(after=after, adapter=adapter, state=state, digest=digest(adapter_bytes(adapter)))
