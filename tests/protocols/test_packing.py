"""R-bit words, packed."""

from __future__ import annotations

import numpy as np
import pytest
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.packing import RING_BITS, pack, packed_size, unpack
from hypothesis import given
from hypothesis import strategies as st


@given(st.sampled_from(RING_BITS), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
def test_pack_and_unpack_agree_modulo_the_ring(ring_bits: int, numbers: list[int]) -> None:
    data = pack(np.array(numbers, dtype=np.int64), ring_bits)
    half = 1 << (ring_bits - 1)
    expected = [(number + half) % (2 * half) - half for number in numbers]
    assert len(data) == packed_size(len(numbers), ring_bits)
    assert unpack(data, ring_bits, len(numbers)).tolist() == expected


@pytest.mark.parametrize("ring_bits", RING_BITS)
def test_the_bytes_are_one_little_endian_number(ring_bits: int) -> None:
    numbers = [1, -1, 1 - (1 << (ring_bits - 1)), 1234, -7]
    whole = sum((number % (1 << ring_bits)) << (ring_bits * place) for place, number in enumerate(numbers))
    expected = whole.to_bytes(packed_size(5, ring_bits), "little")
    assert pack(np.array(numbers, dtype=np.int32), ring_bits) == expected


@pytest.mark.parametrize("ring_bits", RING_BITS)
def test_adding_commutes_with_truncation(ring_bits: int) -> None:
    a, b = np.random.default_rng(5).integers(-(2**31), 2**31, size=(2, 33))
    reduced = unpack(pack(a, ring_bits), ring_bits, 33).astype(np.int64) + unpack(pack(b, ring_bits), ring_bits, 33)
    assert pack(reduced, ring_bits) == pack(a + b, ring_bits)


@pytest.mark.parametrize("ring_bits", RING_BITS)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(ring_bits: int, change: int) -> None:
    size = packed_size(5, ring_bits) + change
    with pytest.raises(VerificationError, match=f"got {size}"):
        unpack(bytes(size), ring_bits, 5)


@pytest.mark.parametrize("ring_bits", [12, 20])
def test_bits_after_the_last_word_are_refused(ring_bits: int) -> None:
    data = bytearray(pack(np.array([3, 4, 5]), ring_bits))
    data[-1] |= 0x80
    with pytest.raises(VerificationError, match="zero bits"):
        unpack(bytes(data), ring_bits, 3)


def test_an_unknown_ring_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 13"):
        pack(np.array([1]), 13)
    with pytest.raises(ConfigError, match="got 8"):
        unpack(b"\0", 8, 1)
