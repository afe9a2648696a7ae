"""A kernel's module with one fault written into it, to show that the comparison with its reference fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of a module in which `new` stands for `old`, which must be there exactly once.

    Triton reads a kernel's source from its file, so that the copy is one too.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"expected once in {module.__name__}, got {source.count(old)} times: {old!r}")
    path = folder / f"mutant_{Path(str(module.__file__)).name}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {path}")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def faulty(launchers: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Launchers with one fault, either in their own module or in the device code that it calls `kernels`.

    The second stays in place until the test is over, also where the launchers are reached by another way.
    """
    if old in Path(str(launchers.__file__)).read_text(encoding="utf-8"):
        return mutant(launchers, old, new, folder)
    monkeypatch.setattr(launchers, "kernels", mutant(launchers.kernels, old, new, folder))
    return launchers
