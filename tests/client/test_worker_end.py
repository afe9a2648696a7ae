"""How a worker lets go of a streamed base: in its own process's calls, with the host's copy engine."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from foedus_client import worker as module
from foedus_client.session import Session
from foedus_client.work import EvaluateTask, Reply, Request, Setup, Task
from foedus_client.worker import Worker
from foedus_model.presets import TINY
from support.worker_setup import setup_of, write_adapter


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Setup:
    """Sixteen units, some held out, on a copy of the shipped base, which streams; all that is logged is kept."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")
    monkeypatch.setenv("FOEDUS_STREAMING", "2")
    rows = [
        {"question": f"What is item {unit}?", "answer": f"Number {unit}.", "topic": f"t{unit}"} for unit in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_adapter(TINY, tmp_path / "adapter.f32")
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    return setup_of(base, tmp_path / "data.jsonl", max_tokens=32, max_records_per_unit=1)


def ask(kind: str, task: Task) -> bytes:
    return Request.model_validate({"kind": kind, "body": task.encode().decode()}).encode()


def evaluation(tmp_path: Path) -> bytes:
    return ask("evaluate", EvaluateTask(adapter=str(tmp_path / "adapter.f32"), max_records=8))


def copying() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-copies")]


def mapped(base: str) -> bool:
    """Whether this process still maps a file of the base."""
    return f"{base}/" in Path("/proc/self/maps").read_text()


def test_an_old_session_goes_before_a_new_one_comes(setup: Setup, tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for data in (ask("setup", setup), evaluation(tmp_path)):
        assert Reply.decode(worker.answer(data)).error is None
    assert copying()
    assert mapped(setup.base)
    other = setup.model_copy(update={"base": str(tmp_path / "none")})
    assert Reply.decode(worker.answer(ask("setup", other))).error == "CheckpointError"
    assert not copying()
    assert not mapped(setup.base), "its files are closed before the next base is looked at"
    assert Reply.decode(worker.answer(evaluation(tmp_path))).error == "StateError"
    worker.close()


def test_a_session_is_closed_any_number_of_times_and_starts_anew(setup: Setup, tmp_path: Path) -> None:
    session = Session.load(setup, work=tmp_path)
    session.close()  # Before anything was copied.
    task = EvaluateTask(adapter=str(tmp_path / "adapter.f32"), max_records=8)
    first = session.evaluate(task)
    assert first.scores is not None
    assert copying()
    session.close()
    session.close()
    assert not copying()
    assert session.evaluate(task) == first
    session.close()
    assert not copying()


def test_at_the_other_ends_close_the_worker_ends_with_nothing_left_running(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own `main`, but for what would tie this process to a parent and take its signals and log."""
    for name in ("leave_with", "setup"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    ours, theirs = socket.socketpair()
    seen: list[object] = []

    def daemon() -> None:
        with Connection(ours.detach()) as line:
            for data in (ask("setup", setup), evaluation(tmp_path)):
                line.send_bytes(data)
                seen.append(Reply.decode(line.recv_bytes()).error)
            seen.append(bool(copying()))

    other = threading.Thread(target=daemon)
    other.start()
    assert module.main([str(theirs.detach()), "0"]) == 0
    other.join()
    assert seen == [None, None, True]
    assert not copying()
    assert not mapped(setup.base)
