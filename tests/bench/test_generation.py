"""The generation benchmark's exit code: other tokens by the other loop are a failure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_other_tokens_are_a_failure(monkeypatch: pytest.MonkeyPatch, same: bool, code: int) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    spec = importlib.util.spec_from_file_location("generation", here / "generation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = SimpleNamespace(generation_config=SimpleNamespace())
    monkeypatch.setattr(module, "load_generator", lambda *_: SimpleNamespace(model=model))
    monkeypatch.setattr(module, "dense_base", lambda: model)
    monkeypatch.setattr(module, "medians", lambda _, **jobs: dict.fromkeys(jobs, 1.0))
    monkeypatch.setattr(module, "ours", lambda *_, **__: [(1, 2)])
    monkeypatch.setattr(module, "theirs", lambda *_: [(1, 2 if same else 3)])
    monkeypatch.setattr(sys, "argv", ["generation.py", "--quick"])
    assert module.main() == code
