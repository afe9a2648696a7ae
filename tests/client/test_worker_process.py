"""The daemon's end of its worker, against children that misbehave on purpose. They load no model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from foedus_client import worker_process
from foedus_client.work import CheckTask, Setup, StepTermsTask, TrainTask
from foedus_client.worker_process import WorkerProcess
from foedus_protocols.errors import DataError, FoedusError, PolicyRefused, RoundFailed
from foedus_protocols.files import DiskTrouble

pytestmark = pytest.mark.unit

CHILD = """
import json, os, sys
from multiprocessing.connection import Connection
from pathlib import Path
line = Connection(int(sys.argv[1]))
calls = Path("calls")
while True:
    try:
        request = json.loads(line.recv_bytes())
    except EOFError:
        break
    with calls.open("a") as file:
        file.write(request["kind"] + "\\n")
    if request["kind"] == "setup":
        body = {"train_units": 3, "heldout_units": 1, "device": "cpu"}
    else:
        body = {"figures": {"keys": float(sum("TOKEN" in name for name in os.environ))}}
    BEHAVIOUR
    line.send_bytes(json.dumps({"body": json.dumps(body), "error": None, "text": "", "step": 0}).encode())
"""

SETUP = Setup(
    base="base",
    base_digest="1" * 64,
    rank=2,
    alpha=4.0,
    adapter_seed="public",
    layout_digest="2" * 64,
    files=[],
    units="record",
    columns={},
    split_key="00",
    max_tokens=64,
    max_records_per_unit=2,
)
TERMS = StepTermsTask(
    private=True, l2_clip_norm=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_units=8.0, seed=None
)
TRAIN = TrainTask(terms=TERMS, org="a", round=1, adapter="in", output="out")


def _worker(folder: Path, behaviour: str = "pass") -> WorkerProcess:
    program = folder / "child.py"
    program.write_text(CHILD.replace("BEHAVIOUR", behaviour))
    return WorkerProcess(folder, command=(sys.executable, str(program)))


def _calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split()


def _nothing() -> None:
    return None


def test_the_setup_is_loaded_once(tmp_path: Path) -> None:
    worker = _worker(tmp_path)
    try:
        worker.train(SETUP, TRAIN, _nothing)
        worker.train(SETUP, TRAIN, _nothing)
        worker.train(SETUP.model_copy(update={"rank": 4}), TRAIN, _nothing)
    finally:
        worker.stop()
    assert _calls(tmp_path) == ["setup", "train", "train", "setup", "train"]


def test_a_killed_worker_is_started_again(tmp_path: Path) -> None:
    # The first child dies in its first training; its successor sees the mark and lives.
    behaviour = (
        'if request["kind"] == "train" and not Path("mark").exists():\n'
        '        Path("mark").touch(); os.kill(os.getpid(), 9)'
    )
    worker = _worker(tmp_path, behaviour)
    try:
        worker.train(SETUP, TRAIN, _nothing)
    finally:
        worker.stop()
    assert _calls(tmp_path) == ["setup", "train", "setup", "train"]


def test_a_worker_that_always_dies_is_an_error(tmp_path: Path) -> None:
    worker = _worker(tmp_path, "os._exit(1)")
    with pytest.raises(RoundFailed, match="4 times"):
        worker.train(SETUP, TRAIN, _nothing)
    assert worker.pid is None


@pytest.mark.parametrize(
    ("name", "kind"), [("DataError", DataError), ("PolicyRefused", PolicyRefused), ("SystemExit", FoedusError)]
)
def test_errors_come_back_as_the_trees_classes(tmp_path: Path, name: str, kind: type[Exception]) -> None:
    reply = f'{{"error": "{name}", "text": "row 3 is not JSON", "step": 7}}'
    behaviour = f"if request['kind'] == 'train': line.send_bytes(b'{reply}'); continue"
    worker = _worker(tmp_path, behaviour)
    try:
        with pytest.raises(kind, match="row 3") as error:
            worker.train(SETUP, TRAIN, _nothing)
    finally:
        worker.stop()
    assert type(error.value) is kind


def test_giving_up_while_waiting_ends_the_child(tmp_path: Path) -> None:
    worker = _worker(tmp_path, "if request['kind'] == 'check': import time; time.sleep(600)")

    def give_up() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.check(SETUP, CheckTask(terms=TERMS, steps=1, delta=1e-5, epsilon=1.0), give_up)
    assert worker.pid is None


def test_the_environment_is_a_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    worker = _worker(tmp_path)
    try:
        assert worker.train(SETUP, TRAIN, _nothing).figures == {"keys": 0.0}
    finally:
        worker.stop()


def test_no_other_descriptor_reaches_the_child(tmp_path: Path) -> None:
    secret = os.open(tmp_path / "child.py", os.O_RDONLY | os.O_CREAT)
    os.set_inheritable(secret, True)
    look = f"os.path.exists('/proc/self/fd/{secret}')"
    behaviour = f"if request['kind'] == 'train': body = {{'figures': {{'open': float({look})}}}}"
    worker = _worker(tmp_path, behaviour)
    try:
        if Path("/proc/self/fd").exists():
            assert worker.train(SETUP, TRAIN, _nothing).figures == {"open": 0.0}
    finally:
        worker.stop()
        os.close(secret)


def test_a_frozen_worker_is_killed_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_STOP_SECONDS", 0.2)
    worker = _worker(tmp_path, "if request['kind'] == 'train': os.kill(os.getpid(), 19)")
    pids: list[int] = []

    def late() -> None:
        if worker.pid is not None and "train" in _calls(tmp_path):
            pids.append(worker.pid)
            raise RoundFailed("too late")

    with pytest.raises(RoundFailed, match="too late"):
        worker.train(SETUP, TRAIN, late)
    assert worker.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_trouble_of_the_workers_disk_is_told_from_other_trouble(tmp_path: Path) -> None:
    reply = '{"error": "DiskTrouble", "text": "the disk is full", "step": 0}'
    worker = _worker(tmp_path, f"if request['kind'] == 'train': line.send_bytes(b'{reply}'); continue")
    try:
        with pytest.raises(DiskTrouble, match="full"):
            worker.train(SETUP, TRAIN, _nothing)
    finally:
        worker.stop()


def test_a_base_that_loads_past_the_deadline_is_ready_for_the_next_order(tmp_path: Path) -> None:
    # The setup lasts until the second order is there.
    behaviour = (
        'if request["kind"] == "setup":\n'
        "        import time\n"
        '        while not Path("second").exists(): time.sleep(0.02)'
    )
    worker = _worker(tmp_path, behaviour)

    def late() -> None:
        raise RoundFailed("too late")

    try:
        for _ in range(2):
            with pytest.raises(RoundFailed, match="too late"):
                worker.train(SETUP, TRAIN, late)
        loading = worker.pid
        (tmp_path / "second").touch()
        worker.train(SETUP, TRAIN, _nothing)
        assert worker.pid == loading
        assert _calls(tmp_path) == ["setup", "train"]
    finally:
        worker.stop()


def test_another_base_is_not_waited_for(tmp_path: Path) -> None:
    behaviour = 'if request["kind"] == "setup" and "first" in request["body"]: import time; time.sleep(600)'
    worker = _worker(tmp_path, behaviour)

    def late() -> None:
        raise RoundFailed("too late")

    try:
        with pytest.raises(RoundFailed, match="too late"):
            worker.train(SETUP.model_copy(update={"base": "first"}), TRAIN, late)
        worker.train(SETUP, TRAIN, _nothing)
    finally:
        worker.stop()


def test_a_worker_that_is_frozen_while_it_loads_is_killed_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_STOP_SECONDS", 0.2)
    worker = _worker(tmp_path, "if request['kind'] == 'setup': os.kill(os.getpid(), 19)")

    def late() -> None:
        if "T (stopped)" in Path(f"/proc/{worker.pid}/status").read_text():
            raise RoundFailed("too late")

    with pytest.raises(RoundFailed, match="too late"):
        worker.train(SETUP, TRAIN, late)
    assert worker.pid is None
