"""The real worker: a process with the shipped base, a small data set, and Flower's `ClientApp` in between."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client import worker_process
from foedus_client.switches import units_streamed
from foedus_client.work import CheckTask, EvaluateTask, Setup, StepTermsTask, TrainTask
from foedus_client.worker_process import WorkerProcess
from foedus_protocols import accounting
from foedus_protocols.errors import CheckpointError, ConfigError, DataError, PrivacyCheckFailed
from foedus_protocols.layout import adapter_layout, initial_vector
from foedus_protocols.manifest import read_config
from support.worker_setup import RANK, setup_of, write_adapter

pytestmark = pytest.mark.unit

BASE = Path(__file__).parents[2] / "model" / "foedus_model" / "tiny"
PRIVATE = StepTermsTask(
    private=True, l2_clip_norm=0.2, noise_multiplier=1.5, sampling_prob=0.5, expected_units=8.0, seed=None
)
OPEN = StepTermsTask(
    private=False, l2_clip_norm=0.2, noise_multiplier=0.0, sampling_prob=0.5, expected_units=8.0, seed=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen units of two records, and a starting adapter."""
    place = tmp_path_factory.mktemp("work")
    rows = [
        {
            "question": f"What is item {unit} of list {row}?",
            "answer": f"It is number {unit * row}.",
            "topic": f"t{unit}",
        }
        for unit in range(16)
        for row in range(2)
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_adapter(BASE, place / "adapter.f32")
    return place


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    """The shipped base, and a split key that holds some of the sixteen units out."""
    return setup_of(BASE, folder / "data.jsonl", max_tokens=64, max_records_per_unit=2)


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[WorkerProcess]:
    """One process for all tests here."""
    process = WorkerProcess(folder)
    yield process
    process.stop()


def _nothing() -> None:
    return None


def _train(folder: Path, terms: StepTermsTask, *, org: str = "ahorn", number: int = 1) -> TrainTask:
    return TrainTask(
        terms=terms, org=org, round=number, adapter=str(folder / "adapter.f32"), output=str(folder / "vector.f32")
    )


def _checking() -> CheckTask:
    """The checks of four private steps."""
    event = accounting.Event(noise_multiplier=PRIVATE.noise_multiplier, sampling_prob=PRIVATE.sampling_prob, steps=4)
    return CheckTask(terms=PRIVATE, steps=4, delta=1e-5, epsilon=accounting.epsilon([event], 1e-5))


def _vector(folder: Path) -> np.ndarray:
    return np.fromfile(folder / "vector.f32", dtype="<f4")


def test_a_private_step_writes_a_noised_vector(worker: WorkerProcess, setup: Setup, folder: Path) -> None:
    vectors = []
    for _ in range(2):
        figures = worker.train(setup, _train(folder, PRIVATE), _nothing).figures
        vectors.append(_vector(folder))
    assert 0 <= figures["sampled_units"] <= 16
    stated = PRIVATE.noise_multiplier / PRIVATE.expected_units
    # Six standard errors of 3,072 coordinates are 8 % of the deviation and 0.11 of a correlation. What sixteen units
    # that all point one way would add is 2 % and 0.04. Noise of two thirds, or the same noise again, is far outside.
    assert vectors[0].size == 3072
    assert vectors[0].std() == pytest.approx(stated, rel=0.1)
    assert abs(np.corrcoef(vectors[0], vectors[1])[0, 1]) < 0.15


def test_without_privacy_a_step_is_a_function_of_seed_org_and_round(
    worker: WorkerProcess, setup: Setup, folder: Path
) -> None:
    def step(**which: object) -> bytes:
        worker.train(setup, _train(folder, OPEN, **which), _nothing)  # type: ignore[arg-type]
        return _vector(folder).tobytes()

    first = step()
    assert np.frombuffer(first, "<f4").any()
    assert step() == first
    assert step(number=2) != first
    assert step(org="birke") != first


@pytest.mark.parametrize(
    "terms",
    [
        {"targets": "experts-shared", "layers": [1, 3], "train": "b"},
        {"targets": "experts", "layers": [3], "train": "both"},
    ],
    ids=["experts-shared", "experts, both"],
)
def test_adapters_of_experts_are_checked_and_trained(
    worker: WorkerProcess, setup: Setup, folder: Path, terms: dict[str, Any], tmp_path: Path
) -> None:
    layout = adapter_layout(read_config(BASE), rank=RANK, **terms)
    initial_vector(layout, "public").tofile(tmp_path / "adapter.f32")
    of_experts = setup.model_copy(update=terms | {"layout_digest": layout.digest})
    assert worker.check(of_experts, CheckTask(terms=OPEN), _nothing).figures == {}
    task = _train(folder, OPEN).model_copy(update={"adapter": str(tmp_path / "adapter.f32")})
    worker.train(of_experts, task, _nothing)
    vector = _vector(folder)
    assert vector.shape == (layout.length,)
    for tensor in layout.trained():
        part = vector[tensor.offset : tensor.offset + tensor.size]
        assert part.any() == (".lora_B." in tensor.name), tensor.name  # At the start no A has a gradient yet.


def test_checkpointing_is_the_organisations_and_changes_no_bit(
    worker: WorkerProcess, setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.train(setup, _train(folder, OPEN), _nothing)
    expected = _vector(folder).tobytes()
    refused = pytest.raises(ConfigError, match="FOEDUS_CHECKPOINTING")
    with closing_worker(tmp_path, monkeypatch, "maybe") as other, refused:
        other.train(setup, _train(folder, OPEN), _nothing)
    for way in ("on", "offload"):
        (folder / "vector.f32").unlink()
        with closing_worker(tmp_path, monkeypatch, way) as other:
            other.train(setup, _train(folder, OPEN), _nothing)
        assert _vector(folder).tobytes() == expected


def test_experts_stream_where_the_organisation_says_so_and_no_bit_changes(
    worker: WorkerProcess, setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode none to the bit; a private step and its checks over the same code; scores."""
    worker.train(setup, _train(folder, OPEN), _nothing)
    expected = _vector(folder).tobytes()
    scoring = EvaluateTask(adapter=str(folder / "adapter.f32"), max_records=20)
    scored = worker.evaluate(setup, scoring, _nothing)
    log = tmp_path / "worker.log"
    # On a busy machine an orderly end takes longer than a daemon gives it: it is the end that is looked at here.
    monkeypatch.setattr(worker_process, "_STOP_SECONDS", 120.0)
    with closing_worker(tmp_path, monkeypatch, "3", name="FOEDUS_STREAMING", log=log) as other:
        (folder / "vector.f32").unlink()
        other.train(setup, _train(folder, OPEN), _nothing)
        assert _vector(folder).tobytes() == expected
        assert other.check(setup, _checking(), _nothing).figures["move_over_clip"] <= 1.001
        assert other.train(setup, _train(folder, PRIVATE), _nothing).figures["dropped_units"] == 0
        assert other.evaluate(setup, scoring, _nothing) == scored
        child = other._process
    assert child is not None
    assert child.returncode == 0, "it ended in order on SIGTERM, after its copies"
    assert (
        "experts stream to cpu: 4 layers, 417.8 kB each, through a ring of 835.6 kB; up to 3 units" in log.read_text()
    )


@pytest.mark.parametrize("value", ["0", "4097", "on", "-1", "１"])
def test_a_number_of_streamed_units_that_cannot_be(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEDUS_STREAMING", value)
    with pytest.raises(ConfigError, match=f"expected FOEDUS_STREAMING from 1 to 4096, or off, got '{value}'"):
        units_streamed()


def test_streamed_units_share_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEDUS_STREAMING", "8")
    assert units_streamed() == 8
    monkeypatch.setenv("FOEDUS_UNITS_A_FORWARD", "2")
    with pytest.raises(ConfigError, match="expected FOEDUS_STREAMING or FOEDUS_UNITS_A_FORWARD, got both"):
        units_streamed()
    monkeypatch.setenv("FOEDUS_STREAMING", "off")
    assert units_streamed() is None


def test_fused_attention_is_the_organisations_and_changes_rounding_alone(
    worker: WorkerProcess, setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.train(setup, _train(folder, OPEN), _nothing)
    expected = _vector(folder).copy()
    monkeypatch.setenv("FOEDUS_CHECKPOINTING", "off")
    refused = pytest.raises(ConfigError, match="FOEDUS_ATTENTION=fused or eager, got 'flash'")
    with closing_worker(tmp_path, monkeypatch, "flash", name="FOEDUS_ATTENTION") as other, refused:
        other.train(setup, _train(folder, OPEN), _nothing)
    (folder / "vector.f32").unlink()
    with closing_worker(tmp_path, monkeypatch, "fused", name="FOEDUS_ATTENTION") as other:
        other.train(setup, _train(folder, OPEN), _nothing)
    np.testing.assert_allclose(_vector(folder), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert _vector(folder).tobytes() != expected.tobytes(), "another function ran"


def test_a_step_in_bfloat16_passes_every_check_and_differs_by_rounding(
    worker: WorkerProcess, setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.train(setup, _train(folder, OPEN), _nothing)
    expected = _vector(folder).copy()
    (folder / "vector.f32").unlink()
    with closing_worker(tmp_path, monkeypatch, "bfloat16", name="FOEDUS_DTYPE") as other:
        figures = other.check(setup, _checking(), _nothing).figures
        other.train(setup, _train(folder, OPEN), _nothing)
    assert figures["move_over_clip"] <= 1.0
    found = _vector(folder)
    apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0.0 < apart < 0.1, "as far as eight bits of a number and a few other experts take it"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FOEDUS_THREADS", "many", "expected FOEDUS_THREADS from 1 to 1024, got 'many'"),
        ("FOEDUS_DTYPE", "float16", "expected FOEDUS_DTYPE=float32 or bfloat16, got 'float16'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_the_task(
    setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("FOEDUS_CHECKPOINTING", "off")
    with closing_worker(tmp_path, monkeypatch, value, name=name) as other, pytest.raises(ConfigError, match=said):
        other.train(setup, _train(folder, OPEN), _nothing)


@pytest.mark.parametrize(
    ("value", "said"),
    [("quick", "FOEDUS_EXPERTS=fused or dequantised, got 'quick'"), ("fused", "experts: expected what the fused path")],
)
def test_the_experts_path_is_refused_where_it_cannot_run(
    setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")
    refused = pytest.raises(ConfigError, match=said)
    with closing_worker(tmp_path, monkeypatch, value, name="FOEDUS_EXPERTS") as other, refused:
        other.train(setup, _train(folder, OPEN), _nothing)


def test_units_share_a_forward_in_private_runs_only_and_the_log_says_so(
    setup: Setup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOEDUS_CHECKPOINTING", "off")
    refused = pytest.raises(ConfigError, match="FOEDUS_UNITS_A_FORWARD")
    with closing_worker(tmp_path, monkeypatch, "0", name="FOEDUS_UNITS_A_FORWARD") as other, refused:
        other.train(setup, _train(folder, OPEN), _nothing)
    log = tmp_path / "worker.log"
    with closing_worker(tmp_path, monkeypatch, "2", name="FOEDUS_UNITS_A_FORWARD", log=log) as other:
        other.train(setup, _train(folder, OPEN), _nothing)
        assert "a forward" not in log.read_text()
        other.train(setup, _train(folder, PRIVATE), _nothing)
        other.train(setup, _train(folder, PRIVATE), _nothing)
    tried = [line for line in log.read_text().splitlines() if "units of 64 tokens, 2 a forward: " in line]
    assert len(tried) == 1, "tried once in a process, before the first private step"


@contextmanager
def closing_worker(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    *,
    name: str = "FOEDUS_CHECKPOINTING",
    log: Path | None = None,
) -> Iterator[WorkerProcess]:
    """A worker of its own under a setting of its environment."""
    monkeypatch.setenv(name, value)
    process = WorkerProcess(work, stderr=log)
    try:
        yield process
    finally:
        process.stop()


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.0}, {"seed": 3}, {"private": False}], ids=["no noise", "a seed", "noise unsaid"]
)
def test_terms_that_contradict_themselves_train_nothing(
    worker: WorkerProcess, setup: Setup, folder: Path, change: dict[str, Any]
) -> None:
    (folder / "vector.f32").unlink(missing_ok=True)
    with pytest.raises(PrivacyCheckFailed, match="exactly where a step is private"):
        worker.train(setup, _train(folder, PRIVATE.model_copy(update=change)), _nothing)
    assert not (folder / "vector.f32").exists()


def test_scores_are_of_held_out_units(worker: WorkerProcess, setup: Setup, folder: Path) -> None:
    task = EvaluateTask(adapter=str(folder / "adapter.f32"), max_records=100)
    scores = worker.evaluate(setup, task, _nothing).scores
    assert scores is not None
    assert 0 < scores.units < 16
    assert 0.5 < scores.loss_sum / scores.tokens < 12.0


def test_the_checks_pass_on_the_real_model(worker: WorkerProcess, setup: Setup) -> None:
    task = _checking()
    figures = worker.check(setup, task, _nothing).figures
    assert figures["epsilon_of_second_accountant"] == pytest.approx(task.epsilon, abs=0.05)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"base_digest": "0" * 64}, CheckpointError, id="another base"),
        pytest.param({"layout_digest": "0" * 64}, CheckpointError, id="another layout"),
        pytest.param({"files": ["/nowhere/data.jsonl"]}, DataError, id="no data"),
    ],
)
def test_what_is_not_as_agreed_is_refused(
    worker: WorkerProcess, setup: Setup, folder: Path, change: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        worker.train(setup.model_copy(update=change), _train(folder, OPEN), _nothing)


def test_the_worker_leaves_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair()\n"
        "command = [sys.executable, '-m', 'foedus_client.worker', str(theirs.fileno()), str(os.getpid())]\n"
        "child = subprocess.Popen(command, pass_fds=[theirs.fileno(), ours.fileno()])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # The child also holds the other end of its socket pair: only its watch can tell it that the parent is gone.
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60.0
    while _command(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _command(pid)


def _command(pid: int) -> bytes:
    """The command line of a running process, empty for none."""
    done = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, check=False)
    return b"" if b"<defunct>" in done.stdout else done.stdout.strip()
