"""From published sums to the adapter: every organisation computes it, and a member that was away catches up.

A run's history names, for each closed round, whose vectors are in the sum, the sum's file, and the digest of the
adapter that follows. The sums are kept for the whole run, so a member that missed any number of rounds pulls them and
runs `rules.py` over them, optimiser state included: the same function, the same bits, the same digest as everybody
else.

The last position is kept as a file in the work folder. It saves time and is never trusted: a wrong one ends in a wrong
digest, and the replay begins again at the start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from foedus_protocols import codec, rules
from foedus_protocols.canonical import digest, parse_canonical
from foedus_protocols.errors import VerificationError
from foedus_protocols.files import write_durably
from foedus_protocols.messages import ClosedRound, History
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from foedus_client.seat import PHASE, Ports, Seat

Vector = npt.NDArray[np.float32]

MAX_HISTORY_BYTES = 64 << 20


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


def catch_up(history_digest: str, seat: Seat, ports: Ports) -> Position:
    """Replay what was not replayed yet, and return where the run stands.

    Raises:
        VerificationError: The history rewrites what was seen, names strangers, too few survivors or our own vector
            where we made none, or says something else of it than our receipt; or a sum has not the size of this
            charter's words.
        AdapterDiffers: The rule gives another adapter than the history says.
    """
    history = read_history(ports.pull(history_digest, MAX_HISTORY_BYTES), seat)
    _check_history(history, seat, ports)
    position = _resume(history, seat, ports)
    try:
        position = _replay(position, history.rounds, seat, ports)
    except AdapterDiffers:
        if position.after == 0:
            raise
        position = _replay(start(seat), history.rounds, seat, ports)
    _save(position, seat, ports)
    return position


def read_history(path: Path, seat: Seat) -> History:
    """Parse a history file of this charter.

    Raises:
        VerificationError: Too long, malformed, or of another charter.
    """
    size = path.stat().st_size
    if size > MAX_HISTORY_BYTES:
        raise VerificationError(f"expected a history of at most {MAX_HISTORY_BYTES} bytes, got {size}")
    try:
        history = History.model_validate(parse_canonical(path.read_bytes()))
    except ValidationError:
        raise VerificationError("expected the history of a run, got a file of another shape") from None
    if history.charter_digest != seat.digest:
        raise VerificationError(
            f"expected the history of charter {seat.digest[:12]}, got that of {history.charter_digest[:12]}"
        )
    return history


def start(seat: Seat) -> Position:
    """Before round 1: B = 0, no moments.

    Raises:
        VerificationError: The charter's initial adapter is another one.
    """
    adapter = np.zeros(seat.charter.adapter.length, dtype=np.float32)
    found = digest(adapter_bytes(adapter))
    if found != seat.charter.adapter.initial_digest:
        raise VerificationError(
            f"expected the charter to start from the adapter {found[:12]}, it starts from "
            f"{seat.charter.adapter.initial_digest[:12]}"
        )
    return Position(after=0, adapter=adapter, state=rules.initial_state(seat.rule, adapter.size), digest=found)


def adapter_bytes(adapter: Vector) -> bytes:
    """An adapter's file: raw little-endian float32."""
    return adapter.astype("<f4", copy=False).tobytes()


def step(position: Position, entry: ClosedRound, seat: Seat, ports: Ports) -> Position:
    """One closed round further."""
    path = ports.pull(entry.sum_digest, seat.coding.packed_bytes)
    words = codec.read_packed(path, seat.coding)
    key = codec.coding_key(seat.digest, seat.run, entry.round, PHASE)
    total = codec.decode_sum(words, coding=seat.coding, key=key)  # (d,)
    mean = rules.mean_of_sum(total, seat.weights(entry.survivors))
    adapter, state = rules.advance(position.adapter, mean, rule=seat.rule, state=position.state)
    return Position(after=position.after + 1, adapter=adapter, state=state, digest=digest(adapter_bytes(adapter)))


def _replay(position: Position, entries: list[ClosedRound], seat: Seat, ports: Ports) -> Position:
    for index in range(position.after, len(entries)):
        entry = entries[index]
        position = step(position, entry, seat, ports)
        if position.digest != entry.adapter_digest:
            raise AdapterDiffers(ours=position.digest, theirs=entry.adapter_digest, number=entry.round)
        ports.state.append_history(seat.digest, index, entry)
        ports.tick()
    return position


def _check_history(history: History, seat: Seat, ports: Ports) -> None:
    known = ports.state.history(seat.digest)
    if history.rounds[: len(known)] != known:
        raise VerificationError(
            f"expected a history that continues the {len(known)} rounds seen before, got another one: "
            "the coordinator shows this organisation a different run, or forgot rounds"
        )
    named = {participant.id for participant in seat.charter.participants}
    before = 0
    for entry in history.rounds:
        if not before < entry.round <= seat.charter.privacy.rounds:
            raise VerificationError(f"expected rising rounds up to {seat.charter.privacy.rounds}, got {entry.round}")
        before = entry.round
        survivors = set(entry.survivors)
        if len(survivors) != len(entry.survivors) or not survivors <= named:
            raise VerificationError(f"expected survivors of round {entry.round} to be participants, each once")
        if len(survivors) < seat.charter.masks.min_survivors:
            raise VerificationError(
                f"expected at least {seat.charter.masks.min_survivors} survivors in round {entry.round}, "
                f"got {len(survivors)}"
            )
        _check_our_part(entry, seat, ports)


def _check_our_part(entry: ClosedRound, seat: Seat, ports: Ports) -> None:
    """A closed round says of our own vector what we know of it."""
    made, included = ports.state.round(seat.digest, entry.round), seat.org in entry.survivors
    if included and made is None:
        raise VerificationError(
            f"expected a vector of {seat.org} in round {entry.round} only if this daemon made one; it made none. "
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
    return work / f"position-{charter_digest[:16]}.safetensors"


def _save(position: Position, seat: Seat, ports: Ports) -> None:
    state = position.state
    facts = {"after": position.after, "step": state.step, "charter": seat.digest, "run": seat.run}
    arrays = {"adapter": position.adapter, "first": state.first, "second": state.second}
    blob = save(arrays, metadata={"position": json.dumps(facts)})
    write_durably(_place(seat.digest, ports.work), blob, mode=0o600)


def _resume(history: History, seat: Seat, ports: Ports) -> Position:
    """The kept position where it lies on this history, else the start."""
    path = _place(seat.digest, ports.work)
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads(file.metadata()["position"])
            arrays = {name: file.get_tensor(name) for name in ("adapter", "first", "second")}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return start(seat)
    after = facts.get("after")
    if (facts.get("charter"), facts.get("run")) != (seat.digest, seat.run) or not 0 < after <= len(history.rounds):
        return start(seat)
    found = digest(adapter_bytes(arrays["adapter"]))
    if found != history.rounds[after - 1].adapter_digest:
        return start(seat)
    state = rules.State(step=int(facts["step"]), first=arrays["first"], second=arrays["second"])
    expected = rules.initial_state(seat.rule, seat.charter.adapter.length)
    if (state.first.shape, state.second.shape) != (expected.first.shape, expected.second.shape):
        return start(seat)
    return Position(after=after, adapter=arrays["adapter"], state=state, digest=found)
