"""Words of a ring modulo 2^R, packed without gaps.

Word i occupies the bits from ``R i`` to ``R (i + 1)`` of the file, read as one little-endian number, in two's
complement. Truncating to R bits commutes with adding, so sums are packed like vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus_protocols.errors import ConfigError, VerificationError

Words = NDArray[np.int32]

RING_BITS = (12, 16, 20, 24, 32)
"""The supported R. Two words of 12 or 20 bits end on a whole byte."""


def packed_size(count: int, ring_bits: int) -> int:
    """Bytes that `count` words take."""
    return (count * ring_bits + 7) // 8


def pack(words: NDArray[np.signedinteger[Any]], ring_bits: int) -> bytes:
    """Words modulo 2^R, R bits each.

    Args:
        words: Integers of which the low R bits count.  # (count,)
        ring_bits: 12, 16, 20, 24 or 32.
    """
    if ring_bits in (16, 32):
        return words.astype(f"<i{ring_bits // 8}").tobytes()
    low = words.astype("<u4") & np.uint32((1 << ring_bits) - 1)
    if ring_bits == 24:
        return low.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    _check_ring(ring_bits)
    even = np.zeros(low.size + low.size % 2, dtype="<u8")
    even[: low.size] = low
    pairs = even[0::2] | even[1::2] << np.uint64(ring_bits)  # 24 or 40 bits
    return pairs.view(np.uint8).reshape(-1, 8)[:, : ring_bits // 4].tobytes()[: packed_size(low.size, ring_bits)]


def unpack(data: bytes, ring_bits: int, count: int) -> Words:
    """The inverse of `pack`.

    Raises:
        VerificationError: Another length than `count` words take, or a set bit after the last word.
    """
    _check_ring(ring_bits)
    if len(data) != packed_size(count, ring_bits):
        raise VerificationError(
            f"expected {packed_size(count, ring_bits)} bytes ({count} words of {ring_bits} bits), got {len(data)}"
        )
    if ring_bits in (16, 32):
        return np.frombuffer(data, dtype=f"<i{ring_bits // 8}").astype(np.int32)
    if ring_bits == 24:
        low = np.zeros((count, 4), dtype=np.uint8)
        low[:, :3] = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
        return signed(low.view("<u4").reshape(-1), ring_bits)
    octets = np.zeros(((count + 1) // 2, 8), dtype=np.uint8)
    whole = np.zeros(len(octets) * (ring_bits // 4), dtype=np.uint8)
    whole[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    octets[:, : ring_bits // 4] = whole.reshape(-1, ring_bits // 4)
    pairs = octets.view("<u8").reshape(-1)
    both = np.stack((pairs & np.uint64((1 << ring_bits) - 1), pairs >> np.uint64(ring_bits)), axis=1).reshape(-1)
    if count % 2 and both[-1]:
        raise VerificationError("expected zero bits after the last packed word, got others")
    return signed(both[:count].astype(np.uint32), ring_bits)


def signed(low: NDArray[np.uint32], ring_bits: int) -> Words:
    """The number in [-2^(R-1), 2^(R-1)) that the low R bits stand for in two's complement."""
    shift = np.int32(32 - ring_bits)
    return low.astype(np.uint32).view(np.int32) << shift >> shift


def _check_ring(ring_bits: int) -> None:
    if ring_bits not in RING_BITS:
        raise ConfigError(f"expected ring_bits of {', '.join(map(str, RING_BITS))}, got {ring_bits}")
