"""The public rotation of a round: a permutation, signs, and Walsh-Hadamard in blocks, a cache-sized piece at a time.

``docs/protocol.md`` section 4. It spreads any vector evenly over its coordinates, so that one range holds them all;
everybody derives it from the round's coding key. `codec.py` rounds what comes out and reads what comes back.

Coordinates are integers in float64 here, and small enough that every sum of them is exact: so the transform may be
matrix products, which BLAS adds in any order it likes, and still gives the same bits everywhere. Against butterflies as
array additions that is three times as fast. The other cost is the permutation: a
sort of random numbers, 0.45 s for 25 million (AVX2, one core, 2026-11), of which all passes around it run in cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Real = NDArray[np.float64]

LARGEST_BLOCK = 1 << 14
# What is worked on at once stays in a core's cache. Whole blocks, and words of 12 and 20 bits end on a whole byte.
CHUNK = 1 << 16
_FACTOR_BITS = 5
_PRODUCT_WIDTH = 128


class Rotation:
    """One round's rotation of vectors of `padded` coordinates in blocks.

    Attributes:
        padded: Length, in whole blocks.
        block: Length of a Hadamard block, a power of two.
    """

    def __init__(self, key: bytes, *, padded: int, block: int) -> None:
        self.padded = padded
        self.block = block
        self._order = _permutation(key, padded)
        self._signs = np.frombuffer(_stream(key, b"signs")((padded + 7) // 8), dtype=np.uint8)

    def pieces(self) -> Iterator[slice]:
        """Consecutive pieces of at most `CHUNK` coordinates, in whole blocks."""
        for start in range(0, self.padded, CHUNK):
            yield slice(start, min(start + CHUNK, self.padded))

    def sources(self, piece: slice) -> NDArray[np.int64]:
        """Where the coded positions of a piece come from."""
        return self._order[piece].astype(np.int64)

    def forward(self, values: Real, piece: slice) -> Real:
        """Sign and transform what was gathered from `sources`.

        Args:
            values: Integers; a block's L2 norm times ``sqrt(block)`` is below 2^53. Overwritten.  # (piece,)
            piece: Their place.
        """
        self._flip(values.view(np.uint64), piece, 63)
        return hadamard(values, self.block)

    def backward(self, words: NDArray[np.signedinteger], piece: slice, scale: np.float32) -> NDArray[np.float32]:
        """What belongs at `sources`: transformed, converted once to fp32, multiplied once, signed.

        Args:
            words: Integers with ``block x max|word| < 2^53``.  # (piece,)
            piece: Their place.
            scale: Value of one level.
        """
        whole = hadamard(words.astype(np.float64), self.block)
        whole += 0.0  # A product of zeros may have come out as -0.0.
        values = whole.astype(np.float32)
        values *= scale
        self._flip(values.view(np.uint32), piece, 31)
        return values

    def _flip(self, bits: NDArray[np.unsignedinteger], piece: slice, shift: int) -> None:
        """Turn the sign bit of every float whose public bit is set."""
        octets = self._signs[piece.start // 8 : (piece.stop + 7) // 8]
        chosen = np.unpackbits(octets, count=bits.size, bitorder="little").astype(bits.dtype)
        chosen <<= bits.dtype.type(shift)
        bits ^= chosen


def hadamard(values: Real, block: int) -> Real:
    """The unnormalised Walsh-Hadamard transform of each block, as a new array.

    ``H`` is the Kronecker product of matrices of at most 32 rows, applied one after the other. Each product is so small
    that BLAS keeps it on the calling thread: larger ones are shared out, and on a busy machine the threads wait for
    each other ten times as long as they compute.

    Args:
        values: Whole blocks.  # (k * block,)
        block: A power of two.
    """
    out = values.copy()
    bits, inner = block.bit_length() - 1, 1
    while bits:
        matrix = _sylvester(min(bits, _FACTOR_BITS))
        size = len(matrix)
        before, out = out, np.empty_like(out)
        if inner == 1:
            rows = math.gcd(values.size // size, size)
            np.matmul(before.reshape(-1, rows, size), matrix, out=out.reshape(-1, rows, size))
        else:
            width = min(inner, _PRODUCT_WIDTH)
            shape = (-1, size, inner // width, width)
            left, right = (array.reshape(shape).transpose(0, 2, 1, 3) for array in (before, out))
            np.matmul(matrix, left, out=right)
        bits -= min(bits, _FACTOR_BITS)
        inner *= size
    return out


@cache
def _sylvester(bits: int) -> Real:
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _permutation(key: bytes, padded: int) -> NDArray[np.uint32]:
    """A public permutation: where each coded position comes from.  # (padded,)

    The order of random 64-bit numbers whose low bits are replaced by the position: all distinct, so every sorting
    algorithm gives the same.
    """
    low = np.uint64((1 << padded.bit_length()) - 1)
    stream = _stream(key, b"permutation")
    numbers = np.empty(padded, dtype=np.uint64)
    pieces = [slice(start, min(start + CHUNK, padded)) for start in range(0, padded, CHUNK)]
    for piece in pieces:
        drawn = np.frombuffer(stream(8 * (piece.stop - piece.start)), dtype="<u8")
        np.bitwise_and(drawn, ~low, out=numbers[piece])
        numbers[piece] |= np.arange(piece.start, piece.stop, dtype=np.uint64)
    numbers.sort()
    # A position fits 32 bits (`Coding.length` does): they move to the front of the same memory, the rest is given back.
    order = numbers.view(np.uint32)
    for piece in pieces:
        order[piece] = numbers[piece] & low
    del order
    numbers.resize((padded + 1) // 2, refcheck=False)  # Nothing else refers to it.
    return numbers.view(np.uint32)[:padded]


def _stream(key: bytes, purpose: bytes) -> Callable[[int], bytes]:
    """Public pseudo-random bytes of a round; each call continues the stream."""
    return aes_ctr(hashlib.sha256(key + b"|" + purpose).digest())


def aes_ctr(key: bytes) -> Callable[[int], bytes]:
    """The AES-256-CTR key stream from a zero counter; a key is used for one stream only."""
    encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()
    return lambda size: encryptor.update(bytes(size))
