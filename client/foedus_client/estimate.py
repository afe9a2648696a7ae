"""What a charter would cost here, before anybody signs: seconds, bytes and budget of the whole run.

One dry step on the organisation's own data, in a worker and a folder of its own: load, privacy checks, one vector,
its coding, one replayed sum, held-out scores. Nothing of it is sent, written into the ledger or kept: no budget is
spent, because nothing is released. The figures are statistics of the data, like any timing, and stay here.

A step's time varies with its random sample, and a round waits for the slowest organisation: this is a floor.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from foedus_protocols import codec, rules
from foedus_protocols.errors import RoundFailed
from foedus_protocols.manifest import read_config
from foedus_protocols.packing import pack

from foedus_client.scratch import scratch
from foedus_client.seat import Seat
from foedus_client.work import EvaluateTask, TrainTask
from foedus_client.worker_process import WorkerProcess

# Orders, answers and the history of one round, rounded up: an envelope has some 3 KiB, a history grows by 0.5 KiB each.
CONTROL_BYTES = 16 * 1024

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What was measured, in seconds.

    Attributes:
        load: Base, adapter and data into the worker, once.
        checks: Gradient checks, once, and in private modes those of sensitivity and noise.
        train: One vector.
        code: Its coding into words.
        advance: One sum decoded and the rule applied.
        evaluate: Held-out scores of one adapter; 0 where the charter lets none leave.
    """

    load: float
    checks: float
    train: float
    code: float
    advance: float
    evaluate: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run's cost at this organisation.

    Attributes:
        seconds: The parts, measured.
        round_seconds: One round without its transfers.
        run_seconds: All rounds, and what comes once; with transfers where the line's speed is known.
        bytes_up: Vectors and control messages of the whole run.
        bytes_down: Sums, charter and control messages of the whole run.
    """

    rounds: int
    seconds: Seconds
    round_seconds: float
    run_seconds: float
    bytes_up: int
    bytes_down: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values: the parts rounded to microseconds, the round and the run to milliseconds."""
        values = asdict(self)
        values["seconds"] = {name: round(value, 6) for name, value in values["seconds"].items()}
        for name in ("round_seconds", "run_seconds"):
            values[name] = round(values[name], 3)
        return values


def estimate(seat: Seat, folder: Path, *, mbit: float | None, say: Callable[[str], None]) -> Estimate:
    """Do one dry step and multiply.

    Args:
        seat: Our seat under the charter, signed or not.
        folder: A folder on the organisation's own disk; a sub-folder is made in it and removed.
        mbit: The line's speed in Mbit/s, the same both ways; None leaves transfers out of the seconds.
        say: Takes a line of progress.

    Raises:
        FoedusError: What the worker could not do, it could not do in a round either.
    """
    with scratch(folder) as place:
        worker = WorkerProcess(place, stderr=place / "worker.log")
        try:
            seconds = _measure(seat, place, worker, say)
        finally:
            worker.stop()
    charter = seat.charter
    rounds, every = charter.privacy.rounds, charter.evaluation.every
    scored = 0 if charter.evaluation.term == "none" else -(-rounds // every) + 1
    up = rounds * (seat.coding.packed_bytes + CONTROL_BYTES)
    down = rounds * (seat.coding.packed_bytes + CONTROL_BYTES) + len(charter.canonical())
    one = seconds.train + seconds.code + seconds.advance
    transfer = 0.0 if mbit is None else (up + down) * 8 / (mbit * 1e6)
    return Estimate(
        rounds=rounds,
        seconds=seconds,
        round_seconds=one,
        run_seconds=seconds.load + seconds.checks + rounds * one + scored * seconds.evaluate + transfer,
        bytes_up=up,
        bytes_down=down,
    )


def _measure(seat: Seat, place: Path, worker: WorkerProcess, say: Callable[[str], None]) -> Seconds:
    charter, adapter = seat.charter, place / "adapter.f32"
    charter.adapter.start(lambda: read_config(Path(seat.setup.base))).astype("<f4", copy=False).tofile(adapter)
    score = EvaluateTask(adapter=str(adapter), max_records=charter.evaluation.max_records)
    say("loading the base and the data into a worker of its own")
    # A score of nothing loads all that a task needs.
    load, _ = _timed(lambda: worker.evaluate(seat.setup, score.model_copy(update={"max_records": 0}), _idle))
    say("checks of the mechanism on synthetic records")
    checks, _ = _timed(lambda: worker.check(seat.setup, seat.check_task(), _idle))
    say("one dry step: nothing of it is sent or kept")
    output = place / "vector.f32"
    step = TrainTask(terms=seat.terms, org=seat.org, round=1, adapter=str(adapter), output=str(output))
    train, _ = _timed(lambda: worker.train(seat.setup, step, _idle))
    vector = np.fromfile(output, "<f4").astype(np.float32)  # (d,)
    if vector.size != charter.adapter.length:
        raise RoundFailed(f"expected a vector of {charter.adapter.length} numbers of the worker, got {vector.size}")
    code, words = _timed(lambda: _encode(seat, vector, place / "words"))
    advance, _ = _timed(lambda: _advance(seat, words))
    evaluate = 0.0
    if charter.evaluation.term != "none":
        evaluate, _ = _timed(lambda: worker.evaluate(seat.setup, score, _idle))
    return Seconds(load=load, checks=checks, train=train, code=code, advance=advance, evaluate=evaluate)


def _encode(seat: Seat, vector: np.ndarray[Any, np.dtype[np.float32]], path: Path) -> Path:
    """Code a vector under a key that no round has."""
    key, uniform = secrets.token_bytes(32), codec.secure_uniform()
    encoded = codec.encode(vector, coding=seat.coding, key=key, uniform=uniform, clamp=True)
    path.write_bytes(pack(encoded.words, seat.charter.masks.ring_bits))
    return path


def _advance(seat: Seat, words: Path) -> None:
    """Decode a sum and apply the rule, as every party does after a round."""
    total = codec.decode_file(words, coding=seat.coding, key=secrets.token_bytes(32))  # (d,)
    mean = rules.mean_of_sum(total, [1.0])
    state = rules.initial_state(seat.rule, mean.size)
    rules.advance(np.zeros_like(mean), mean, rule=seat.rule, state=state, in_place=True)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def _idle() -> None:
    """Nobody has to be told that the worker still works."""
