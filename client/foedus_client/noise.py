"""Gaussian noise rounded to integers, drawn from the operating system's cryptographic source.

The mechanism adds `round(eta)`, eta ~ N(0, stddev^2), to a sum of integers. Since the sum is an integer, S + round(eta)
equals round(S + eta): post-processing of the Gaussian mechanism, whose accounting therefore holds. A draw inverts the
cumulative table of |round(eta)|, held at 128 bits, with one uniform number, and takes a fair sign.

Each entry of the table is the true probability rounded to 128 bits. Every 32nd point is computed by mpmath; those
between follow from the Taylor series around it, evaluated in Python integers of 256 fractional bits (the derivatives of
erf obey a two-term recurrence). 14,336 entries take 0.3 s and 240,000 take 4 s, once, and are kept on disk. What is
left out: constant time. A draw's memory access depends on the noise, as in any table lookup.

Heavier alternatives: the discrete Gaussian by rejection (Canonne, Kamath, Steinke 2020), which closes under no sum and
takes a random time; floating-point Box-Muller, whose 53 bits have a union bound above delta in high dimension.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from foedus_protocols.canonical import digest, digest_json
from foedus_protocols.errors import ConfigError
from mpmath.ctx_mp import MPContext
from numpy.typing import NDArray

RandomBytes = Callable[[int], bytes]

MIN_STDDEV = 1024.0
"""Grid points a standard deviation, at least: below, the rounded Gaussian is a coarse picture of the real one."""

_TAIL_STDDEVS = 14
_TABLE_BITS = 128
_TAIL_MASS = 2.0**-140  # P(|eta| > 14 stddev) is 1.6e-44, about 2^-145.7.
_MOST_ENTRIES = 1 << 24

_GROUP = 32  # Table entries a series serves: 16 on either side of its centre.
_ORDER = 20  # At 1,024 points a standard deviation the first omitted term is below 2^-160.
_FRACTION_BITS = 256
_WORKING_BITS = 320

_DRAW_CHUNK = 1 << 18
_WORD = np.dtype("<u8")
_CACHE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RoundedGaussian:
    """A Gaussian rounded to the nearest integer, as a cumulative table.

    Attributes:
        stddev: Standard deviation before rounding, in grid units.
        high: The upper 64 bits of P(|Z| <= k) x 2^128, k = 0, 1, ...  # uint64 (entries,)
        low: The lower 64 bits.  # uint64 (entries,)
    """

    stddev: float
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    @property
    def distance(self) -> float:
        """Total variation distance of one draw from the ideal rounded Gaussian, at most.

        Each entry is off by at most 2^-128 and enters two probabilities; the distance is half of their sum. The tail
        beyond the table is added.
        """
        return len(self.high) * 2.0**-_TABLE_BITS + _TAIL_MASS

    def draw(self, count: int, random_bytes: RandomBytes = os.urandom) -> NDArray[np.int64]:
        """Draw independent values.

        Args:
            count: How many.
            random_bytes: Where uniform bytes come from. Anything but the default voids every guarantee: only tests of
                the table pass it.

        Returns:
            int64 (count,).

        Guarantees:
            Each value's distribution is within `distance` (total variation) of the rounded Gaussian of `stddev`, given
            that the bytes are uniform and independent; so a mechanism that draws `length` values in each of `steps`
            steps and is (epsilon, delta)-differentially private with ideal noise is (epsilon, delta + (1 + e^epsilon) x
            length x steps x distance)-differentially private (`charter.noise_slack`). No value is infinite; the
            largest magnitude is the number of entries.
        """
        values = np.empty(count, np.int64)
        for start in range(0, count, _DRAW_CHUNK):
            stop = min(start + _DRAW_CHUNK, count)
            values[start:stop] = self._draw_chunk(stop - start, random_bytes)
        return values

    def _draw_chunk(self, count: int, random_bytes: RandomBytes) -> NDArray[np.int64]:
        words = np.frombuffer(random_bytes(8 * count), _WORD)
        magnitudes = np.searchsorted(self.high, words, side="left").astype(np.int64)
        inside = np.minimum(magnitudes, len(self.high) - 1)
        for tie in np.flatnonzero(self.high[inside] == words):
            magnitudes[tie] = self._refine(words[tie], random_bytes)
        signs = np.unpackbits(np.frombuffer(random_bytes((count + 7) // 8), np.uint8), count=count)
        return np.where(signs == 1, -magnitudes, magnitudes)

    def _refine(self, word: np.uint64, random_bytes: RandomBytes) -> int:
        """The magnitude where the upper 64 bits equal an entry's: the next 64 bits decide."""
        first = int(np.searchsorted(self.high, word, side="left"))
        last = int(np.searchsorted(self.high, word, side="right"))
        low_word = np.frombuffer(random_bytes(8), _WORD)[0]
        return first + int(np.searchsorted(self.low[first:last], low_word, side="right"))


def rounded_gaussian(stddev: float, *, cache: Path | None = None) -> RoundedGaussian:
    """The table for a standard deviation in grid units, from the cache folder where it has been built before.

    A cached file that is not what was written is built again. The table is public: it holds no secret.

    Raises:
        ConfigError: The standard deviation is not finite, below 1,024, or asks for more than 2^24 entries.
    """
    entries = _entries(stddev)
    if cache is None:
        return _table(stddev, _build(stddev, entries))
    name = digest_json({"version": _CACHE_VERSION, "stddev": stddev.hex(), "entries": entries, "bits": _TABLE_BITS})
    path = cache / f"{name}.table"
    words = _read_cached(path, entries)
    if words is None:
        words = _build(stddev, entries)
        _write_cached(path, words)
    return _table(stddev, words)


def _entries(stddev: float) -> int:
    if not MIN_STDDEV <= stddev < math.inf:
        raise ConfigError(
            f"expected a noise stddev of at least {MIN_STDDEV:.0f} grid units, got {stddev}: refine the grid"
        )
    entries = math.ceil(_TAIL_STDDEVS * stddev / _GROUP) * _GROUP
    if entries > _MOST_ENTRIES:
        raise ConfigError(
            f"expected a noise table of at most {_MOST_ENTRIES} entries, got {entries} for a stddev of {stddev:.0f} "
            "grid units: lower the noise multiplier, or train fewer parameters"
        )
    return entries


def _table(stddev: float, words: NDArray[np.uint64]) -> RoundedGaussian:
    words.setflags(write=False)
    return RoundedGaussian(stddev=stddev, high=words[0], low=words[1])


def _build(stddev: float, entries: int) -> NDArray[np.uint64]:
    """P(|Z| <= k) = erf((k + 1/2) / (stddev sqrt 2)) at 128 bits, for k below `entries`.  # (2, entries)"""
    words = np.empty((2, entries), np.uint64)
    top = (1 << _TABLE_BITS) - 1
    shift = _FRACTION_BITS - _TABLE_BITS
    reached = 0
    for index, value in enumerate(_erf_at_half_points(stddev, entries)):
        # The bound `top` and the running maximum each move an entry by at most one unit.
        reached = max(reached, min((value + (1 << (shift - 1))) >> shift, top))
        words[0, index] = reached >> 64
        words[1, index] = reached & 0xFFFFFFFFFFFFFFFF
    return words


def _erf_at_half_points(stddev: float, entries: int) -> Iterator[int]:
    """erf((k + 1/2) / (stddev sqrt 2)) x 2^256 for k = 0, 1, ..., in integers."""
    context = MPContext()
    context.prec = _WORKING_BITS
    step = 1 / (context.mpf(stddev) * context.sqrt(2))
    slope = 2 / context.sqrt(context.pi) * step
    for start in range(0, entries, _GROUP):
        centre = start + _GROUP // 2
        x = (context.mpf(centre) + 0.5) * step
        terms = [context.erf(x), slope * context.exp(-x * x)]
        for n in range(_ORDER - 1):
            terms.append(-2 * step * (x * terms[n + 1] + n * step / (n + 1) * terms[n]) / (n + 2))
        coefficients = [int(context.nint(context.ldexp(term, _FRACTION_BITS))) for term in reversed(terms)]
        for offset in range(start - centre, start - centre + _GROUP):
            value = 0
            for coefficient in coefficients:
                value = value * offset + coefficient
            yield value


def _read_cached(path: Path, entries: int) -> NDArray[np.uint64] | None:
    """The words of a cached table, or None where the file is absent or not what was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    body = data[64:]
    if len(body) != 2 * 8 * entries or data[:64] != digest(body).encode():
        return None
    return np.frombuffer(body, _WORD).astype(np.uint64).reshape(2, entries)


def _write_cached(path: Path, words: NDArray[np.uint64]) -> None:
    """Write beside the target and rename, so that a reader never sees half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = words.astype(_WORD).tobytes()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(digest(body).encode())
        file.write(body)
    os.replace(file.name, path)
