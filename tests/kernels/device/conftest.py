"""The same tests on a CPU, interpreted and in float32, and on a GPU in float32 and bfloat16 (`make gpu`).

The interpreter multiplies bit patterns in bfloat16, so that no such test means anything there. It runs 0.026 GFLOP/s:
a shape of more than about 10 MFLOP belongs behind the marker `gpu`.
"""

from __future__ import annotations

import pytest
import torch
from support.tolerances import Tolerance, tolerance


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32), id="interpreted"),
        pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[torch.device, torch.dtype]:
    """Where and in what type a kernel runs."""
    device, dtype = request.param
    return torch.device(device), dtype


@pytest.fixture
def close(place: tuple[torch.device, torch.dtype]) -> Tolerance:
    """The two bounds for the type that the kernel runs in, as arguments of `assert_close`."""
    return tolerance(place[1])
