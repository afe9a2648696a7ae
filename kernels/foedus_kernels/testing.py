"""How a kernel is compared with its reference: two tolerances, and the coordinates that fail.

One bound on the largest error misses a kernel that is slightly wrong everywhere, one on the mean misses a single wrong
tile; a result has to meet both. Errors are relative to the reference's root mean square, so that a gradient of 1e-6 is
held to the same digits as an activation of 10 (after `triton_kernels/testing.py`, which takes both bounds).
"""

from __future__ import annotations

import torch

_SHOWN = 8


def assert_close(
    got: torch.Tensor,
    want: torch.Tensor,
    *,
    max_relative: float,
    rms: float,
    what: str = "result",
) -> None:
    """Raise AssertionError unless `got` is close to `want` in its worst and in its mean element.

    Args:
        got: What the kernel made.
        want: What the reference made, of the same shape; its type does not matter.
        max_relative: Bound on the largest absolute error over the reference's root mean square.
        rms: Bound on the root mean square of the errors over the reference's.
        what: Name for the message.

    Raises:
        AssertionError: Another shape, a value that is not finite, or an error above a bound; names the worst places.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{what}: expected the shape {tuple(want.shape)}, got {tuple(got.shape)}")
    if not want.numel():
        return
    mine, other = got.detach().double().cpu(), want.detach().double().cpu()
    if not bool(torch.isfinite(mine).all()):
        raise AssertionError(f"{what}: {int((~torch.isfinite(mine)).sum())} of {mine.numel()} values are not finite")
    unit = other.square().mean().sqrt().clamp(min=1e-30)
    errors = (mine - other).abs() / unit
    worst, mean = float(errors.max()), float(errors.square().mean().sqrt())
    if worst <= max_relative and mean <= rms:
        return
    places = errors.flatten().topk(min(_SHOWN, errors.numel())).indices
    lines = [
        f"  {tuple(int(axis) for axis in torch.unravel_index(place, errors.shape))}: "
        f"got {float(mine.flatten()[place]):.6g}, expected {float(other.flatten()[place]):.6g}"
        for place in places
    ]
    raise AssertionError(
        f"{what}: largest error {worst:.3g} (at most {max_relative:.3g}), root mean square {mean:.3g} "
        f"(at most {rms:.3g}), both over the reference's {float(unit):.3g}; worst places:\n" + "\n".join(lines)
    )
