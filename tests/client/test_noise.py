"""The cumulative table is exact, ties are refined, and the draws are the rounded Gaussian.

Statistical tests: six standard deviations, a false alarm once in about 10^8 runs each.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from foedus_client import noise as noise_module
from foedus_client.noise import RoundedGaussian, rounded_gaussian
from foedus_protocols import charter
from foedus_protocols.errors import ConfigError

STDDEV = 1357.25


@pytest.fixture(scope="module")
def noise() -> RoundedGaussian:
    return rounded_gaussian(STDDEV)


def exact(k: int) -> mpmath.mpf:
    with mpmath.workprec(400):
        return mpmath.erf((mpmath.mpf(k) + 0.5) / (mpmath.mpf(STDDEV) * mpmath.sqrt(2))) * mpmath.mpf(2) ** 128


def entry(noise: RoundedGaussian, k: int) -> int:
    return (int(noise.high[k]) << 64) | int(noise.low[k])


def test_every_entry_checked_is_the_true_probability_at_128_bits(noise: RoundedGaussian) -> None:
    for k in [*range(80), *range(80, len(noise.high), 41), len(noise.high) - 1]:
        assert abs(exact(k) - entry(noise, k)) <= 1, k


def test_entries_never_fall(noise: RoundedGaussian) -> None:
    rises = (noise.high[1:] > noise.high[:-1]) | (
        (noise.high[1:] == noise.high[:-1]) & (noise.low[1:] >= noise.low[:-1])
    )
    assert rises.all()


def test_table_spans_fourteen_deviations_and_states_its_distance(noise: RoundedGaussian) -> None:
    assert len(noise.high) >= 14 * STDDEV
    assert len(noise.high) * 2.0**-128 <= noise.distance <= 2.0**-100
    assert (1 + math.exp(8)) * 4.6e7 * noise.distance < 1e-18  # d = 4.6 million, ten rounds, epsilon 8


def test_the_largest_table_is_within_the_distance_that_charters_are_charged_for() -> None:
    words = np.broadcast_to(np.uint64(0), noise_module._MOST_ENTRIES)  # Only their number matters.
    largest = RoundedGaussian(stddev=float(1 << 20), high=words, low=words)
    assert largest.distance <= charter.NOISE_TABLE_DELTA_SLACK


def scripted(*pieces: bytes):
    queue = list(pieces)

    def source(count: int) -> bytes:
        piece = queue.pop(0)
        assert len(piece) == count
        return piece

    return source


def test_a_tie_in_the_upper_word_is_decided_by_the_lower_word(noise: RoundedGaussian) -> None:
    k = 700
    upper = int(noise.high[k]).to_bytes(8, "little")
    below = (int(noise.low[k]) - 1).to_bytes(8, "little")
    at = int(noise.low[k]).to_bytes(8, "little")
    # u < C[k] means |Z| <= k, and C[k] <= u means |Z| > k. The sign byte is 0 (plus), then 0x80 (minus).
    assert noise.draw(1, scripted(upper, below, b"\x00"))[0] == k
    assert noise.draw(1, scripted(upper, at, b"\x00"))[0] == k + 1
    assert noise.draw(1, scripted(upper, at, b"\x80"))[0] == -(k + 1)


def test_extreme_bytes_stay_inside_the_table(noise: RoundedGaussian) -> None:
    assert noise.draw(1, scripted(b"\x00" * 8, b"\x00"))[0] == 0
    last = noise.draw(1, scripted(b"\xff" * 8, b"\xff" * 8, b"\x00"))[0]
    assert 9 * STDDEV < last <= len(noise.high)


def test_draws_have_the_moments_and_the_tail_of_the_gaussian(noise: RoundedGaussian) -> None:
    n = 1 << 20
    z = noise.draw(n) / math.sqrt(STDDEV**2 + 1 / 12)  # Rounding adds the variance of a uniform.
    assert abs(z.mean()) * math.sqrt(n) < 6
    assert abs((z**2).mean() - 1) * math.sqrt(n / 2) < 6
    assert abs((z**4).mean() - 3) * math.sqrt(n / 96) < 6
    for bound in (0.5, 1.0, 2.0, 3.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(z) > bound).mean() - share) / math.sqrt(share * (1 - share) / n) < 6


def test_two_starts_of_one_program_draw_unlike_noise() -> None:
    code = (
        "import random, numpy, sys; random.seed(1); numpy.random.seed(1)\n"
        "from foedus_client.noise import rounded_gaussian\n"
        "sys.stdout.buffer.write(rounded_gaussian(1024.0).draw(20000).tobytes())"
    )
    first, second = (
        np.frombuffer(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout, np.int64)
        for _ in range(2)
    )
    assert first.size == 20_000
    assert abs(np.mean(first.astype(float) * second)) / 1024.0**2 * math.sqrt(first.size) < 6


def test_cache_is_read_back_and_a_changed_file_is_built_again(tmp_path: Path) -> None:
    built = rounded_gaussian(STDDEV, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.read_bytes()
    again = rounded_gaussian(STDDEV, cache=tmp_path)
    assert np.array_equal(built.high, again.high)
    assert np.array_equal(built.low, again.low)
    path.write_bytes(written[:5000] + bytes([written[5000] ^ 1]) + written[5001:])
    assert np.array_equal(rounded_gaussian(STDDEV, cache=tmp_path).high, built.high)
    assert path.read_bytes() == written
    path.write_bytes(written[:-8])
    assert np.array_equal(rounded_gaussian(STDDEV, cache=tmp_path).low, built.low)


@pytest.mark.parametrize("stddev", [0.0, 1023.9, float("nan"), float("inf"), 2.0**21])
def test_a_stddev_off_the_scale_is_refused(stddev: float) -> None:
    with pytest.raises(ConfigError):
        rounded_gaussian(stddev)


def test_the_default_source_is_the_operating_system() -> None:
    assert RoundedGaussian.draw.__defaults__ == (os.urandom,)
