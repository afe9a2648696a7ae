"""Triton launches on the current CUDA device, wherever its tensors lie: make the tensors' device the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """A launcher that runs on the device of its first tensor; on a CPU, interpreted, nothing changes."""

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(one for one in args if isinstance(one, torch.Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return launch
