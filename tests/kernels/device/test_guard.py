"""Every launcher makes the device of its tensors the current one: Triton launches wherever the current one is."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from foedus_kernels.device import clip, experts, log_sparse, mxfp4

LAUNCHERS = [
    (clip, "unit_gradients"),
    (clip, "unit_square_norms"),
    (clip, "clipped_gradient"),
    (experts, "forward"),
    (experts, "backward"),
    (log_sparse, "log_sparse_forward"),
    (log_sparse, "log_sparse_backward"),
    (log_sparse, "log_sparse_decode"),
    (mxfp4, "decode"),
]


@pytest.mark.parametrize(
    ("module", "name"), LAUNCHERS, ids=[f"{m.__name__.rpartition('.')[2]}.{n}" for m, n in LAUNCHERS]
)
def test_a_launcher_is_guarded(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def device_of(tensor: torch.Tensor) -> nullcontext[None]:
        asked.append(tensor)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = torch.zeros(3)
    with pytest.raises((TypeError, ValueError)):  # One argument is not enough for any of them.
        getattr(module, name)(first)
    assert len(asked) == 1
    assert asked[0] is first
