"""Triton's interpreter, made to sum a row as a GPU does: on its own."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def sum_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum each row of an interpreted product on its own.

    The interpreter's product is numpy's, in which a row's bits depend on its place among the 16 rows of a tile. What a
    test on a CPU then shows is all the rest: which rows, which blocks, in which order. That a GPU's product gives a row
    the same bits at every place of a tile is shown on a GPU.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def product(self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None] * b.data[None, k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
