"""The rotation against its plain definition: additions of integers, and positions in the order of random numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from foedus_protocols import codec, packing, rotation
from foedus_protocols.errors import VerificationError

Integers = npt.NDArray[np.int64]
KEY = codec.coding_key("0" * 64, "run", 1)


def butterflies(values: Integers, block: int) -> Integers:
    """The transform as additions and subtractions of integers."""
    out = values.copy()
    half = 1
    while half < block:
        pairs = out.reshape(-1, 2, half)
        pairs[:, 0], pairs[:, 1] = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        half *= 2
    return out


def plain_decode(words: Integers, terms: codec.Coding) -> npt.NDArray[np.float32]:
    """`decode_file` as ``docs/protocol.md`` section 4 tells it, one array after the other."""

    def stream(purpose: bytes, size: int) -> bytes:
        return rotation.aes_ctr(hashlib.sha256(KEY + b"|" + purpose).digest())(size)

    values = butterflies(words, terms.block).astype(np.float32)
    values *= np.float32(terms.scale / np.sqrt(terms.block))
    octets = np.frombuffer(stream(b"signs", (terms.padded + 7) // 8), dtype=np.uint8)
    negative = np.unpackbits(octets, count=terms.padded, bitorder="little").astype(bool)
    values[negative] = -values[negative]
    low = (1 << terms.padded.bit_length()) - 1
    numbers = np.frombuffer(stream(b"permutation", 8 * terms.padded), dtype="<u8")
    order = np.argsort(numbers & np.uint64(~low & (1 << 64) - 1), kind="stable")
    vector = np.empty(terms.padded, dtype=np.float32)
    vector[order] = values
    return vector[: terms.length]


@pytest.mark.parametrize("block", [1, 2, 8, 128, 1 << 13, 1 << 14])
def test_matrix_products_are_exact_on_the_largest_integers(block: int) -> None:
    rng = np.random.default_rng(block)
    largest = (1 << 53) // block
    for values in (
        rng.integers(-largest, largest, 3 * block),
        np.full(3 * block, largest - 1),
        np.where(rng.random(3 * block) < 0.5, largest - 1, 1 - largest),
    ):
        found = rotation.hadamard(values.astype(np.float64), block)
        assert np.array_equal(found.astype(np.int64), butterflies(values, block))


@pytest.mark.parametrize("ring_bits", codec.RING_BITS)
@pytest.mark.parametrize("length", [1, 2, 37, 1000, 65_536, 70_001, 300_000])
def test_decoding_gives_the_bits_of_the_plain_definition(ring_bits: int, length: int, tmp_path: Path) -> None:
    terms = codec.Coding(length=length, ring_bits=ring_bits, update_bound=3.0, members=3)
    half = 1 << (ring_bits - 1)
    rng = np.random.default_rng(length)
    for words in (
        rng.integers(-half, half, terms.padded),
        np.zeros(terms.padded, dtype=np.int64),
        np.full(terms.padded, half - 1),
        np.full(terms.padded, -half),
    ):
        expected = plain_decode(words, terms).tobytes()
        path = tmp_path / "sum"
        path.write_bytes(packing.pack(words, ring_bits))
        assert codec.decode_file(path, coding=terms, key=KEY).tobytes() == expected


def test_a_sum_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    terms = codec.Coding(length=1000, ring_bits=16, update_bound=3.0, members=3)
    path = tmp_path / "sum"
    path.write_bytes(bytes(terms.packed_bytes - 1))
    with pytest.raises(VerificationError, match="bytes in sum"):
        codec.decode_file(path, coding=terms, key=KEY)


def test_a_permutation_moves_every_position_once() -> None:
    for padded in (1, 5, rotation.CHUNK, rotation.CHUNK + 3):
        order = rotation._permutation(KEY, padded)
        assert np.array_equal(np.sort(order), np.arange(padded))
        assert padded < 6 or not np.array_equal(order, np.arange(padded))
