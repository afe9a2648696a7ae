"""The two bounds within which a kernel equals its reference, by the type that it computes in."""

from __future__ import annotations

from typing import TypedDict

import torch


class Tolerance(TypedDict):
    """Arguments of `foedus_kernels.testing.assert_close`."""

    max_relative: float
    rms: float


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Float32: sums in another order. Bfloat16: inputs and outputs rounded to 8 bits, sums kept in float32."""
    return {"max_relative": 2e-5, "rms": 2e-6} if dtype == torch.float32 else {"max_relative": 6e-2, "rms": 1e-2}
