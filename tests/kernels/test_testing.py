"""`assert_close` refuses what is wrong in one place, and what is a little wrong everywhere."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels.testing import assert_close

WANT = torch.linspace(-2.0, 2.0, 600).view(20, 30)


def test_equal_is_close() -> None:
    assert_close(WANT.clone(), WANT, max_relative=0.0, rms=0.0)
    assert_close(WANT[:0], WANT[:0], max_relative=0.0, rms=0.0)


def test_one_wrong_element_is_named() -> None:
    got = WANT.clone()
    got[7, 11] += 0.1
    with pytest.raises(AssertionError, match=r"\(7, 11\): got"):
        assert_close(got, WANT, max_relative=1e-3, rms=1.0)


def test_a_small_error_everywhere_is_refused() -> None:
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close(WANT * 1.01, WANT, max_relative=1.0, rms=1e-3)


def test_a_tiny_reference_is_held_to_the_same_digits() -> None:
    with pytest.raises(AssertionError):
        assert_close(WANT * 1e-9 + 1e-10, WANT * 1e-9, max_relative=1e-3, rms=1e-3)


def test_another_shape_and_what_is_not_finite_are_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(WANT[:1], WANT, max_relative=1.0, rms=1.0)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(WANT / 0.0, WANT, max_relative=1.0, rms=1.0)
