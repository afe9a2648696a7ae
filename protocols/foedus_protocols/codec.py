"""A float vector as integer words that add up in a ring, and back.

``docs/protocol.md`` section 4: public permutation and signs, Walsh-Hadamard in blocks, one common scale, stochastic
rounding, R bits. The rotation spreads every vector evenly, so that a range of six deviations holds any coordinate
(Suresh et al. 2017, arXiv:1611.00429; Kairouz et al. 2021, arXiv:2102.06387); the permutation comes first because a
large layer in a few blocks would overflow theirs (27.7 % error against 0.06 %).

Encoding draws secret uniforms. Decoding must give the same bits everywhere: its transform is on integers and therefore
exact, followed by one conversion to fp32 and one fp32 product.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.packing import RING_BITS, Words, pack, packed_size, signed, unpack
from foedus_protocols.rotation import CHUNK, LARGEST_BLOCK, Rotation, aes_ctr

__all__ = [
    "RING_BITS",
    "Coding",
    "Encoded",
    "Uniform",
    "add_packed_files",
    "coding_key",
    "decode_file",
    "encode",
    "pack",
    "secure_uniform",
    "seeded_uniform",
    "unpack",
    "update_bound",
]

Vector = NDArray[np.float32]
Sums = NDArray[np.int64]
Uniform = Callable[[int], NDArray[np.uint32]]
"""Gives that many independent, uniform 32-bit integers; each call continues the stream."""

_MOST_PADDING = 0.005
_DEVIATIONS = 6.0
_EXACT_BITS = 52  # One below float64's 53, for what rounding to the grid adds to a block's norm.


@dataclass(frozen=True, kw_only=True)
class Coding:
    """The public terms under which every party of a run codes.

    Attributes:
        length: d, the coordinates of a vector.
        ring_bits: R, the bits of a coded word.
        update_bound: L2 norm that a vector may have; longer ones are scaled down.
        members: n, the organisations that the charter names.
    """

    length: int
    ring_bits: int
    update_bound: float
    members: int

    def __post_init__(self) -> None:
        if not 1 <= self.length < 1 << 32:
            raise ConfigError(f"expected a vector of 1 to 2^32 - 1 coordinates, got {self.length}")
        if self.ring_bits not in RING_BITS:
            raise ConfigError(f"expected ring_bits of {', '.join(map(str, RING_BITS))}, got {self.ring_bits}")
        if not (math.isfinite(self.update_bound) and self.update_bound > 0):
            raise ConfigError(f"expected a positive, finite update_bound, got {self.update_bound}")
        if self.members < 1 or self.levels < 1:
            raise ConfigError(
                f"expected members x levels below 2^{self.ring_bits - 1}, got {self.members} members: raise ring_bits"
            )

    @cached_property
    def block(self) -> int:
        """Length of a Hadamard block: the largest power of two up to 2^14 that pads at most 0.5 %."""
        block = LARGEST_BLOCK
        while -self.length % block > _MOST_PADDING * self.length:
            block //= 2
        return block

    @property
    def padded(self) -> int:
        """Number of coded words: `length` in whole blocks."""
        return self.length + -self.length % self.block

    @property
    def coding_range(self) -> float:
        """Largest rotated coordinate that is coded unclamped: six deviations of a vector of norm `update_bound`."""
        return _DEVIATIONS * self.update_bound / math.sqrt(self.length)

    @property
    def levels(self) -> int:
        """Largest absolute word: n * levels < 2^(R-1), so that no sum of honest words can wrap."""
        return ((1 << (self.ring_bits - 1)) - 1) // self.members

    @property
    def scale(self) -> float:
        """Value of one level."""
        return self.coding_range / self.levels

    @property
    def packed_bytes(self) -> int:
        """Size of a packed vector, or of a packed sum."""
        return packed_size(self.padded, self.ring_bits)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A coded vector, and what was lost; the last two stay at the organisation.

    Attributes:
        words: int32, each within [-levels, levels] if clamped.  # (padded,)
        clamped: Coordinates that were beyond `coding_range`.
        scaled: What the vector was multiplied with to respect `update_bound`; 1 where it did.
    """

    words: Words
    clamped: int
    scaled: float


def coding_key(charter_digest: str, run: str, round_number: int, phase: str = "train") -> bytes:
    """The public key of a round's permutation and signs. The attempt has no part in it: words are drawn once.

    Raises:
        ConfigError: A part holds the separator, so that two rounds could share a key.
    """
    parts = ("foedus/coding/1", charter_digest, run, str(round_number), phase)
    if any("|" in part for part in parts):
        raise ConfigError("expected no '|' in the charter digest, run and phase of a coding key")
    return hashlib.sha256("|".join(parts).encode()).digest()


def secure_uniform() -> Uniform:
    """Uniforms nobody can know: AES-256-CTR under a key of the operating system, made here and kept nowhere."""
    return _aes_uniform(os.urandom(32))


def seeded_uniform(seed: bytes) -> Uniform:
    """Uniforms that are a function of a seed: for mode ``none`` and tests."""
    return _aes_uniform(hashlib.sha256(b"foedus/uniform/1|" + seed).digest())


def update_bound(parties: Sequence[tuple[float, float, float]], length: int) -> float:
    """Bound on ``(w_i / max w) * v_i`` over all organisations, v_i = sum / (l2_clip_norm * expected_units).

    ``max_i (w_i / max w) sqrt((E + 6 sqrt E)^2 + noise_multiplier^2 (sqrt d + 6)^2) / E``: six deviations of the
    Poisson sample's size and of the noise's norm. Without those margins the loudest organisation is scaled down in a
    third of the rounds; ten times too wide a bound costs ten times the error.

    Args:
        parties: ``(weight, expected_units, noise_multiplier)`` of each, constants of the charter.
        length: d.

    Raises:
        ConfigError: No parties, or a weight or expectation that is not positive.
    """
    if not parties or any(weight <= 0 or units <= 0 or noise < 0 for weight, units, noise in parties):
        raise ConfigError("expected parties with positive weight and expected units, and noise of at least 0")
    heaviest = max(weight for weight, _, _ in parties)
    bounds = []
    for weight, units, noise in parties:
        signal = units + 6 * math.sqrt(units)
        spread = noise * (math.sqrt(length) + 6)
        bounds.append(weight / heaviest * math.sqrt(signal * signal + spread * spread) / units)
    return max(bounds)


def encode(vector: Vector, *, coding: Coding, key: bytes, uniform: Uniform, clamp: bool = True) -> Encoded:
    """Code one organisation's vector, already multiplied by ``w_i / max w``.

    Args:
        vector: fp32.  # (d,)
        coding: The charter's terms.
        key: From `coding_key`.
        uniform: Randomness of the rounding: `secure_uniform` wherever privacy is promised.
        clamp: Scale down and clamp what is too large. Post-processing of the organisation's own noise, so it costs no
            privacy in modes ``local`` and ``none``. Where noise is only complete in the sum it must be False: words
            then wrap in the ring.

    Returns:
        Words, and how much was lost.

    Raises:
        VerificationError: The vector is of another length or type, or not finite.

    *Guarantees.* The expectation of the decoded words over `uniform` is the vector (scaled, clamped) to fp32 accuracy.
    With `clamp` no word exceeds `Coding.levels`, so a sum over at most `members` vectors cannot wrap.
    """
    if vector.dtype != np.float32 or vector.shape != (coding.length,):
        raise VerificationError(f"expected float32 of ({coding.length},), got {vector.dtype} of {vector.shape}")
    norm = math.sqrt(math.fsum(float(np.sum(np.square(part, dtype=np.float64))) for part in _chunks(vector)))
    if not math.isfinite(norm):
        raise VerificationError(
            f"expected a finite vector of {coding.length}, got one with an infinite or undefined norm"
        )
    scaled = coding.update_bound / norm if clamp and norm > coding.update_bound else 1.0

    rotation = Rotation(key, padded=coding.padded, block=coding.block)
    # Whole numbers on a grid so fine that their sums in a block are just exact: the same words on every machine.
    grid = 2.0 ** (_EXACT_BITS - math.frexp(norm * math.sqrt(coding.block))[1])
    factor = scaled / (coding.scale * math.sqrt(coding.block) * grid)
    words = np.empty(coding.padded, dtype=np.int32)  # (padded,)
    clamped = 0
    for piece in rotation.pieces():
        gathered = _gather(vector, rotation.sources(piece))
        rotated = rotation.forward(np.rint(np.multiply(gathered, grid, dtype=np.float64)), piece)
        rotated *= factor
        if clamp:
            clipped = np.clip(rotated, -coding.levels, coding.levels)
            clamped += int(np.count_nonzero(clipped != rotated))
            rotated = clipped
        words[piece] = _round(rotated, uniform, coding.ring_bits)
    return Encoded(words=words, clamped=clamped, scaled=scaled)


def decode_file(path: Path, *, coding: Coding, key: bytes) -> Vector:
    """The sum of the coded vectors, from a packed sum that is read piece by piece.

    Args:
        path: The packed sum of the words; nothing of its length but the result is in memory.
        coding: The charter's terms.
        key: Of the round in which the words were coded.

    Returns:
        Sum over the survivors of ``(w_i / max w) v_i``.  # (d,)

    Raises:
        VerificationError: The file is of another size.

    *Guarantees.* Equal inputs give equal bits on every machine: sums of integers of at most 2^45 are exact in any
    order, then one correctly rounded conversion and one correctly rounded product remain.
    """
    _check_packed_size(path, coding)
    bits = coding.ring_bits
    rotation = Rotation(key, padded=coding.padded, block=coding.block)
    scale = np.float32(coding.scale / math.sqrt(coding.block))
    vector = np.empty(coding.padded, dtype=np.float32)
    with path.open("rb") as file:
        for piece in rotation.pieces():
            file.seek(packed_size(piece.start, bits))
            count = piece.stop - piece.start
            words = unpack(file.read(packed_size(count, bits)), bits, count)
            vector[rotation.sources(piece)] = rotation.backward(words, piece, scale)
    return vector[: coding.length]


def add_packed_files(paths: Sequence[Path], *, coding: Coding, out: Path) -> str:
    """Add packed vectors, a chunk at a time, and write the packed sum.

    Args:
        paths: One file a survivor: at least one, at most `Coding.members`.
        coding: The charter's terms.
        out: Appears whole or not at all.

    Returns:
        The sum's digest.

    Raises:
        VerificationError: Too many files, or (with its name) a file of another size or with a word beyond `levels`.
    """
    if not 1 <= len(paths) <= coding.members:
        raise VerificationError(f"expected 1 to {coding.members} vectors, got {len(paths)}")
    for path in paths:
        _check_packed_size(path, coding)
    part = out.with_name(out.name + ".part")
    state = hashlib.sha256()
    with part.open("wb") as file:
        for start in range(0, coding.padded, CHUNK):
            count = min(CHUNK, coding.padded - start)
            piece = pack(_sum_of_chunks(paths, start, count, coding), coding.ring_bits)
            state.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    part.replace(out)
    return state.hexdigest()


def _sum_of_chunks(paths: Iterable[Path], start: int, count: int, coding: Coding) -> Sums:
    total = np.zeros(count, dtype=np.int64)
    for path in paths:
        with path.open("rb") as file:
            file.seek(packed_size(start, coding.ring_bits))
            words = unpack(file.read(packed_size(count, coding.ring_bits)), coding.ring_bits, count)
        if int(np.abs(words.astype(np.int64)).max()) > coding.levels:
            raise VerificationError(f"expected words of at most {coding.levels}, got a larger one in {path.name}")
        total += words
    return total


def _check_packed_size(path: Path, coding: Coding) -> None:
    if path.stat().st_size != coding.packed_bytes:
        raise VerificationError(f"expected {coding.packed_bytes} bytes in {path.name}, got {path.stat().st_size}")


def _round(values: NDArray[np.float64], uniform: Uniform, ring_bits: int) -> Words:
    """Each value to a neighbouring integer with the right expectation, wrapped in the ring."""
    offsets = uniform(values.size) * np.float64(2.0**-32)  # in [0, 1)
    integers = np.floor(values + offsets).astype(np.int64)
    return signed((integers & 0xFFFFFFFF).astype(np.uint32), ring_bits)


def _chunks(vector: Vector) -> Iterator[Vector]:
    """Consecutive pieces that stay in a core's cache."""
    return (vector[start : start + CHUNK] for start in range(0, vector.size, CHUNK))


def _gather(vector: Vector, sources: NDArray[np.int64]) -> Vector:
    """The coordinates at `sources`, 0 where those lie in the padding."""
    found: Vector = np.take(vector, sources, mode="clip")
    found[sources >= vector.size] = 0.0
    return found


def _aes_uniform(key: bytes) -> Uniform:
    stream = aes_ctr(key)
    return lambda count: np.frombuffer(stream(4 * count), dtype="<u4").astype(np.uint32)
