"""The 8-bit codec: every code at every kind of scale, exactness, error bounds, refusals."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import int8


def test_every_code_at_every_exponent_decodes_exactly() -> None:
    codes = torch.arange(-127, 129, dtype=torch.int16).clamp(max=127).to(torch.int8).view(4, 64)
    for exponent in range(-126, 120):
        for mantissa in (1.0, 1.0 + 2**-7, 2 - 2**-7):
            scales = torch.full((4, 1), mantissa * 2.0**exponent, dtype=torch.bfloat16)
            want = codes.double() * float(scales[0, 0])
            assert torch.equal(int8.decode(codes, scales).double(), want)
            assert torch.equal(int8.decode(codes, scales, torch.float64), want)
            assert torch.equal(int8.decode(codes, scales, torch.bfloat16), want.float().bfloat16())


def test_groups_run_along_the_inputs() -> None:
    codes = torch.zeros(1, 2, 128, dtype=torch.int8)  # one expert, 2 outputs, 128 inputs
    codes[0, 1, 64] = -3
    scales = torch.tensor([[[1, 1], [1, 0.5]]], dtype=torch.bfloat16)
    got = int8.decode(codes, scales)
    assert got.nonzero().tolist() == [[0, 1, 64]]
    assert got[0, 1, 64] == -1.5


def test_the_error_is_within_the_stated_bounds() -> None:
    dense = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2))
    dense *= torch.logspace(-30, 30, 512).unsqueeze(-1)
    dense[3] = 0
    codes, scales = int8.encode(dense)
    error = (int8.decode(codes, scales) - dense).unflatten(-1, (-1, 64)).abs()
    largest = dense.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True)
    assert bool((error <= scales.float().unsqueeze(-1) / 2).all())
    assert bool((error <= largest / 252 + 1e-38).all())
    ordinary = slice(200, 300)
    relative = error.flatten(-2)[ordinary].norm(dim=-1) / dense[ordinary].norm(dim=-1)
    assert 0.0055 < float(relative.mean()) < 0.0064
    assert codes.nbytes + scales.nbytes == dense.numel() * 33 // 32  # 8.25 bits a value


def test_no_code_is_clipped_and_the_largest_value_has_the_largest_code() -> None:
    dense = torch.randn(2000, 64, generator=torch.Generator().manual_seed(4))
    codes, scales = int8.encode(dense)
    assert bool((scales.float() * 127 >= dense.abs().amax(-1, keepdim=True)).all()), "the scale is rounded up"
    assert {int(code) for code in codes.abs().amax(-1).unique()} <= {126, 127}
    assert int(codes.min()) >= -127


def test_what_is_on_the_grid_survives_a_round_trip() -> None:
    codes = torch.randint(-127, 128, (64, 192), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    codes[:, ::64] = -127  # Each group has its largest code.
    scales = torch.logspace(-30, 30, 64).unsqueeze(-1).repeat(1, 3).bfloat16()
    again, scales_again = int8.encode(int8.decode(codes, scales))
    assert torch.equal(scales_again, scales)
    assert torch.equal(again, codes)


def test_tiny_and_zero_groups_stay_finite() -> None:
    dense = torch.zeros(3, 64)
    dense[1, 5] = 1e-42
    dense[2, 5] = -(2.0**126)
    codes, scales = int8.encode(dense)
    got = int8.decode(codes, scales)
    assert bool(torch.isfinite(got).all())
    assert not bool(got[:2].any())
    assert abs(float(got[2, 5]) / 2.0**126 + 1) < 1 / 252


def test_a_stack_decodes_the_experts_it_is_asked_for() -> None:
    codes, scales = int8.encode(torch.randn(5, 6, 128, generator=torch.Generator().manual_seed(6)))
    stack = int8.Int8Weights(codes, scales)
    whole = int8.decode(codes, scales)
    assert stack.shape == (5, 6, 128)
    assert stack.nbytes == codes.nbytes + scales.nbytes
    assert torch.equal(int8.Int8Weights(*stack.tensors()).decode(range(5), torch.float32), whole)
    for experts in ([2], [1, 2, 3], [0, 3, 4]):
        got = stack.decode(experts, torch.float32)
        assert got.is_contiguous()
        assert torch.equal(got, whole[experts])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: int8.encode(torch.zeros(2, 96)), "groups of 64 inputs, got 96"),
        (lambda: int8.encode(torch.zeros(2, 0)), "groups of 64 inputs, got 0"),
        (lambda: int8.encode(torch.full((2, 64), float("nan"))), "finite"),
        (lambda: int8.encode(torch.full((2, 64), 2.0**127)), r"below 2\^126"),
        (
            lambda: int8.decode(torch.zeros(2, 63, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.bfloat16)),
            r"\(2, 64\).*got \(2, 63\)",
        ),
        (
            lambda: int8.decode(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1)),
            "got torch.int8 and torch.float32",
        ),
        (
            lambda: int8.decode(
                torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.bfloat16), torch.float16
            ),
            "not to torch.float16",
        ),
        (
            lambda: int8.Int8Weights(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.bfloat16)),
            "a stack of codes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]
