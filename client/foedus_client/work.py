"""What a daemon asks of its worker, and the port it asks through.

The two are one program in two processes: the daemon has the keys, the ledger and the network; the worker has the base
model and the data. Between them runs a socket pair with JSON (`worker_process.py` is the daemon's end, `worker.py` the
worker's), never pickle: the worker reads files that other people wrote and is the less trusted side.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal, Protocol, Self

from foedus_protocols.errors import StateError
from foedus_protocols.messages import Scores
from pydantic import BaseModel, ConfigDict

MAX_TASK_BYTES = 1 << 20

Tick = Callable[[], None]
"""Called about once a second while the daemon waits for its worker; it may raise to give up."""


class Task(BaseModel):
    """Base of everything that crosses the socket pair."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def encode(self) -> bytes:
        """JSON bytes."""
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse JSON bytes.

        Raises:
            StateError: Not of this shape: the two processes are not the same program.
        """
        try:
            return cls.model_validate(json.loads(data))
        except (ValueError, RecursionError):
            raise StateError(f"expected a {cls.__name__} between daemon and worker, got something else") from None


class Setup(Task):
    """What the worker holds while it lives: a base, an adapter's shape, one data set. No identity or link key.

    Attributes:
        base: Folder of the base model, checked against `base_digest` when it is loaded.
        targets: Of the adapter, with `layers` and `train` as `layout.adapter_layout` takes them.
        split_key: Hexadecimal key that decides which units are held out; it belongs to the namespace.
        units: The unit's field, one for all files or one for each file's name; ``record`` for single records.
        columns: By file name, which column is the question, the context, the answer.
    """

    base: str
    base_digest: str
    targets: str = "attention"
    layers: list[int] | None = None
    train: str = "b"
    rank: int
    alpha: float
    adapter_seed: str
    layout_digest: str
    files: list[str]
    units: dict[str, str] | str
    columns: dict[str, dict[str, str]]
    split_key: str
    max_tokens: int
    max_records_per_unit: int


class StepTermsTask(Task):
    """The constants of one organisation's step, as the charter states them."""

    private: bool
    l2_clip_norm: float
    noise_multiplier: float
    sampling_prob: float
    expected_units: float
    seed: int | None


class CheckTask(Task):
    """Run the sensitivity, noise and coverage checks, and compare the accountants.

    In mode `none` only coverage and gradients are checked, and the fields of the promise are absent.
    """

    terms: StepTermsTask
    steps: int = 0
    delta: float | None = None
    epsilon: float | None = None


class TrainTask(Task):
    """Make one vector: `adapter` and `output` are raw float32 files of the trained tensors, in layout order."""

    terms: StepTermsTask
    org: str
    round: int
    adapter: str
    output: str


class EvaluateTask(Task):
    """Score held-out units with an adapter."""

    adapter: str
    max_records: int


class SetupReply(Task):
    """How much data there is: for this organisation's own eyes."""

    train_units: int
    heldout_units: int
    device: str


class CheckReply(Task):
    """The checks passed; the figures are printed locally."""

    figures: dict[str, float]


class TrainReply(Task):
    """The vector lies in the output file; the figures stay here."""

    figures: dict[str, float]


class EvaluateReply(Task):
    """Held-out scores, None where nothing is held out."""

    scores: Scores | None


class Request(Task):
    """One message to the worker."""

    kind: Literal["setup", "check", "train", "evaluate"]
    body: str


class Reply(Task):
    """Its answer: a body, or the class and text of an error of the tree."""

    body: str | None = None
    error: str | None = None
    text: str = ""
    step: int = 0


class WorkerPort(Protocol):
    """What a round needs of a worker. The process behind it is started, loaded and restarted as needed."""

    def check(self, setup: Setup, task: CheckTask, tick: Tick) -> CheckReply:
        """Run the checks.

        Raises:
            PrivacyCheckFailed: One of them failed.
        """

    def train(self, setup: Setup, task: TrainTask, tick: Tick) -> TrainReply:
        """Write one vector."""

    def evaluate(self, setup: Setup, task: EvaluateTask, tick: Tick) -> EvaluateReply:
        """Score held-out units."""
