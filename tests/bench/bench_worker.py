"""The bench's worker: it answers a daemon as `foedus_client.worker` does, and writes a random vector for each round.

``python bench_worker.py SECONDS FD PARENT``, on one end of the daemon's socket pair; "training" takes so many seconds.
The vector has the norm that a private step's noise has, so that nothing is clamped; it is drawn once. No torch.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from foedus_client.work import (
    MAX_TASK_BYTES,
    CheckReply,
    EvaluateReply,
    Reply,
    Request,
    SetupReply,
    Task,
    TrainReply,
    TrainTask,
)


class BenchWorker:
    """Answers requests one by one."""

    def __init__(self, train_seconds: float) -> None:
        self._train_seconds = train_seconds
        self._vector = np.empty(0, dtype=np.float32)

    def answer(self, data: bytes) -> bytes:
        """One request, one reply."""
        request = Request.decode(data)
        return Reply(body=self._body(request).encode().decode()).encode()

    def _body(self, request: Request) -> Task:
        if request.kind == "setup":
            return SetupReply(train_units=1, heldout_units=1, device="cpu")
        if request.kind == "check":
            return CheckReply(figures={})
        if request.kind == "evaluate":
            return EvaluateReply(scores=None)
        task = TrainTask.decode(request.body.encode())
        length = Path(task.adapter).stat().st_size // 4
        if self._vector.size != length:
            spread = (task.terms.noise_multiplier or 1.0 / np.sqrt(length)) / task.terms.expected_units
            self._vector = np.random.default_rng().standard_normal(length, dtype=np.float32)
            self._vector *= np.float32(spread)
        time.sleep(self._train_seconds)
        self._vector.astype("<f4", copy=False).tofile(task.output)
        return TrainReply(figures={})


def main(arguments: list[str]) -> None:
    """Serve until the daemon closes its end."""
    seconds, descriptor, _ = arguments
    connection, worker = Connection(int(descriptor)), BenchWorker(float(seconds))
    while True:
        try:
            connection.send_bytes(worker.answer(connection.recv_bytes(MAX_TASK_BYTES)))
        except (EOFError, OSError):
            return


if __name__ == "__main__":
    main(sys.argv[1:])
