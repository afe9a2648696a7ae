"""Vectors as words that add up."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from foedus_protocols import codec, rotation
from foedus_protocols.canonical import digest
from foedus_protocols.codec import Coding, Vector
from foedus_protocols.errors import ConfigError, VerificationError
from numpy.typing import NDArray
from scipy.linalg import hadamard
from support.coded import decode_sum, read_packed

KEY = codec.coding_key("0" * 64, "run", 1)

LARGE = 4_600_000
"""The trained coordinates of gpt-oss-120b at rank 16, which is where small tests hide errors."""


def coding(length: int, *, ring_bits: int = 16, bound: float = 1.0, members: int = 8) -> Coding:
    return Coding(length=length, ring_bits=ring_bits, update_bound=bound, members=members)


def of_norm(vector: NDArray[np.float32], norm: float) -> Vector:
    return vector * np.float32(norm / math.sqrt(float(np.sum(np.square(vector, dtype=np.float64)))))


def relative(found: Vector, expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def coded_sum(vectors: list[Vector], terms: Coding, key: bytes = KEY) -> tuple[NDArray[np.int64], int]:
    """Sum of the words, and how many coordinates were clamped."""
    total, clamped = np.zeros(terms.padded, dtype=np.int64), 0
    for index, vector in enumerate(vectors):
        encoded = codec.encode(vector, coding=terms, key=key, uniform=codec.seeded_uniform(b"%d" % index))
        total += encoded.words
        clamped += encoded.clamped
    return total, clamped


@pytest.mark.parametrize(
    ("norm", "share_of_one_layer", "tolerance"),
    # A tenth of a percent less than the bound: the fp32 norm of the vector is then surely not above it.
    [(0.999, 0.0, 1e-3), (0.999, 0.9, 1e-3), (0.3, 0.0, 3e-3), (0.3, 0.9, 3e-3)],
)
def test_the_sum_of_eight_long_vectors(norm: float, share_of_one_layer: float, tolerance: float) -> None:
    """16 bits, d = 4.6 M, n = 8 independent vectors, spread evenly or with 90 % of the energy in 0.7 % of them."""
    terms = coding(LARGE)
    layer = slice(1_000_000, 1_032_768)
    total, expected, clamped = np.zeros(terms.padded, dtype=np.int64), np.zeros(LARGE), 0
    for member in range(8):
        vector = np.random.default_rng(member).standard_normal(LARGE, dtype=np.float32)
        if share_of_one_layer:
            vector = of_norm(vector, math.sqrt(1 - share_of_one_layer))
            vector[layer] = of_norm(vector[layer], math.sqrt(share_of_one_layer))
        vector = of_norm(vector, norm)
        encoded = codec.encode(vector, coding=terms, key=KEY, uniform=codec.seeded_uniform(bytes([member])))
        assert encoded.scaled == 1.0
        total += encoded.words
        expected += vector
        clamped += encoded.clamped
    assert relative(decode_sum(total, coding=terms, key=KEY), expected) < tolerance
    assert clamped <= 1e-6 * 8 * LARGE


@pytest.mark.parametrize(("ring_bits", "tolerance"), [(12, 4e-2), (16, 2e-3), (20, 2e-4), (24, 1e-5), (32, 1e-6)])
@pytest.mark.parametrize("length", [24_576, 24_577, 999, 1])
def test_every_ring_and_length_decodes(length: int, ring_bits: int, tolerance: float) -> None:
    # Few coordinates spread badly, so the bound is generous for the short ones.
    terms = coding(length, ring_bits=ring_bits, bound=1.0 if length > 1000 else 2.0)
    vectors = [of_norm(np.random.default_rng(i).standard_normal(length, dtype=np.float32), 0.99) for i in range(8)]
    total, clamped = coded_sum(vectors, terms)
    assert clamped == 0
    error = decode_sum(total, coding=terms, key=KEY) - np.sum(vectors, axis=0, dtype=np.float64)
    assert float(np.linalg.norm(error)) < tolerance * math.sqrt(8)


def test_without_the_permutation_one_layer_would_be_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is there: the same vector with signs and Hadamard alone loses more than a tenth of itself."""
    terms = coding(1 << 20)
    vector = np.zeros(1 << 20, dtype=np.float32)
    vector[: 1 << 13] = np.random.default_rng(0).standard_normal(1 << 13)
    vector = of_norm(vector, 0.99)
    total, clamped = coded_sum([vector], terms)
    assert clamped == 0
    assert relative(decode_sum(total, coding=terms, key=KEY), vector.astype(np.float64)) < 5e-3
    monkeypatch.setattr(rotation, "_permutation", lambda key, padded: np.arange(padded))
    total, clamped = coded_sum([vector], terms)
    assert clamped > 1000
    assert relative(decode_sum(total, coding=terms, key=KEY), vector.astype(np.float64)) > 0.1


def test_rounding_is_unbiased() -> None:
    """The mean of 4,000 codings, within 4 deviations of such a mean. Seeded, so it cannot fail by chance."""
    terms = coding(64, ring_bits=12, bound=4.0)
    vector = np.random.default_rng(1).standard_normal(64).astype(np.float32) / np.float32(8)
    uniform = codec.seeded_uniform(b"mean")
    mean = np.zeros(terms.padded)
    for _ in range(4000):
        mean += codec.encode(vector, coding=terms, key=KEY, uniform=uniform).words / 4000
    decoded = decode_real(mean, terms)
    # A word is one of two neighbours, so its deviation is at most half a level, and the rotation is orthogonal.
    assert np.abs(decoded - vector).max() < 4 * terms.scale * 0.5 / math.sqrt(4000)
    down = codec.encode(vector, coding=terms, key=KEY, uniform=lambda count: np.zeros(count, dtype=np.uint32)).words
    assert np.abs(decode_real(down.astype(np.float64), terms) - vector).max() > terms.scale


def decode_real(mean: NDArray[np.float64], terms: Coding) -> NDArray[np.float64]:
    """Decoding is linear, so a real-valued mean decodes through a sum that is 2^10 times finer."""
    fine = np.round(mean * 1024).astype(np.int64)
    wide = Coding(length=terms.length, ring_bits=32, update_bound=terms.update_bound, members=terms.members)
    return decode_sum(fine, coding=wide, key=KEY) * (terms.scale / wide.scale / 1024)


def test_a_vector_beyond_the_bound_is_scaled_down_and_says_so() -> None:
    terms = coding(4096, bound=0.5)
    vector = of_norm(np.random.default_rng(2).standard_normal(4096, dtype=np.float32), 2.0)
    encoded = codec.encode(vector, coding=terms, key=KEY, uniform=codec.seeded_uniform(b""))
    assert encoded.scaled == pytest.approx(0.25, rel=1e-6)
    decoded = decode_sum(encoded.words.astype(np.int64), coding=terms, key=KEY)
    assert relative(decoded, 0.25 * vector.astype(np.float64)) < 5e-3


def test_words_never_pass_the_levels_and_the_clamped_are_counted() -> None:
    """A constant vector whose rotation is one spike a block, by undoing permutation and signs."""
    terms = coding(16_384, members=3)
    words = np.zeros(terms.padded, dtype=np.int64)
    words[7] = (1 << 15) - 1
    spike = of_norm(decode_sum(words, coding=terms, key=KEY), 1.0)
    encoded = codec.encode(spike, coding=terms, key=KEY, uniform=codec.seeded_uniform(b""))
    assert encoded.clamped == 1
    assert int(np.abs(encoded.words).max()) == terms.levels == encoded.words[7]
    assert terms.members * terms.levels < 1 << (terms.ring_bits - 1)


def test_without_clamping_words_wrap_and_sums_still_agree() -> None:
    terms = coding(4096, bound=0.01, members=2)
    vector = of_norm(np.random.default_rng(2).standard_normal(4096, dtype=np.float32), 1.0)
    pair = [
        codec.encode(sign * vector, coding=terms, key=KEY, uniform=codec.seeded_uniform(b"%d" % sign), clamp=False)
        for sign in (1, -1)
    ]
    assert [encoded.scaled for encoded in pair] == [1.0, 1.0]
    assert [encoded.clamped for encoded in pair] == [0, 0]
    assert int(np.abs(pair[0].words).max()) > terms.levels
    wrapped = codec.unpack(codec.pack(pair[0].words + pair[1].words, 16), 16, terms.padded)
    assert int(np.abs(wrapped).max()) <= 1


def test_the_decoded_sum_depends_on_words_and_key_alone() -> None:
    terms = coding(5000)
    total, _ = coded_sum([of_norm(np.ones(5000, dtype=np.float32), 0.9)], terms)
    first = decode_sum(total, coding=terms, key=KEY)
    assert np.array_equal(first, decode_sum(total.copy(), coding=terms, key=KEY))
    assert not np.allclose(first, decode_sum(total, coding=terms, key=codec.coding_key("0" * 64, "run", 2)))


def test_decoding_as_the_specification_says_it() -> None:
    """A second decoder, written from the text: sorted numbers, a dense Hadamard matrix, fp32 at the end."""
    terms = coding(40, ring_bits=20, bound=0.7, members=3)
    total = np.random.default_rng(6).integers(-1000, 1000, terms.padded)

    def stream(purpose: bytes, size: int) -> bytes:
        key = hashlib.sha256(KEY + b"|" + purpose).digest()
        return Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(size))

    octets = stream(b"permutation", 8 * 40)
    numbers = [int.from_bytes(octets[8 * i : 8 * i + 8], "little") for i in range(40)]
    order = sorted(range(40), key=lambda i: (numbers[i] >> 6, i))  # 40 positions take 6 bits
    signs = int.from_bytes(stream(b"signs", 5), "little")
    levels = (2**19 - 1) // 3
    factor = np.float32(6 * 0.7 / math.sqrt(40) / levels / math.sqrt(8))
    expected = np.empty(40, dtype=np.float32)
    for start in range(0, 40, 8):
        for place, value in enumerate(hadamard(8) @ total[start : start + 8], start=start):
            scaled = np.float32(value) * factor
            expected[order[place]] = -scaled if signs >> place & 1 else scaled
    assert decode_sum(total, coding=terms, key=KEY).tobytes() == expected.tobytes()


def test_coding_keys_are_distinct_and_ignore_the_attempt() -> None:
    keys = {codec.coding_key("0" * 64, run, number, phase) for run in "ab" for number in (1, 2) for phase in ("x", "y")}
    assert len(keys) == 8
    with pytest.raises(ConfigError, match=r"'\|'"):
        codec.coding_key("0" * 64, "a|1", 1)


def test_secure_uniforms_differ_and_seeded_ones_repeat() -> None:
    assert not np.array_equal(codec.secure_uniform()(8), codec.secure_uniform()(8))
    first, again = codec.seeded_uniform(b"s"), codec.seeded_uniform(b"s")
    assert np.array_equal(first(8), again(8))
    assert not np.array_equal(first(8), again(9)[:8] ^ np.uint32(1))
    assert not np.array_equal(codec.seeded_uniform(b"s")(8), codec.seeded_uniform(b"t")(8))


@pytest.mark.parametrize(
    ("length", "block", "padded"),
    [(24_576, 8192, 24_576), (LARGE, 16_384, 4_603_904), (1_000_001, 4096, 1_003_520), (1, 1, 1), (7, 1, 7)],
)
def test_blocks_pad_at_most_half_a_percent(length: int, block: int, padded: int) -> None:
    terms = coding(length)
    assert (terms.block, terms.padded) == (block, padded)
    assert padded - length <= 0.005 * length
    assert block == 16_384 or -length % (2 * block) > 0.005 * length


@pytest.mark.parametrize("ring_bits", codec.RING_BITS)
@pytest.mark.parametrize("members", [1, 3, 100])
def test_a_full_sum_cannot_wrap(ring_bits: int, members: int) -> None:
    terms = coding(100, ring_bits=ring_bits, members=members)
    assert members * terms.levels < 1 << (ring_bits - 1) <= members * (terms.levels + 1)


def test_terms_that_cannot_code_are_refused() -> None:
    for wrong in (
        {"length": 0},
        {"ring_bits": 13},
        {"update_bound": 0.0},
        {"update_bound": math.inf},
        {"members": 0},
        {"ring_bits": 12, "members": 2048},
    ):
        with pytest.raises(ConfigError, match="expected"):
            Coding(**{"length": 10, "ring_bits": 16, "update_bound": 1.0, "members": 3, **wrong})  # type: ignore[arg-type]


def test_malformed_vectors_and_sums_are_refused() -> None:
    terms = coding(10)
    uniform = codec.seeded_uniform(b"")
    for vector in (np.zeros(11, dtype=np.float32), np.zeros(10), np.full(10, np.nan, dtype=np.float32)):
        with pytest.raises(VerificationError, match="expected"):
            codec.encode(vector, coding=terms, key=KEY, uniform=uniform)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="expected 20 bytes"):
        decode_sum(np.zeros(11, dtype=np.int64), coding=terms, key=KEY)


def test_update_bound_is_the_loudest_organisation() -> None:
    """64 units each; by hand: E + 6 sqrt E = 112, sqrt d + 6 = 106 at d = 10,000."""
    quiet, loud = (1.0, 64.0, 0.5), (0.75, 64.0, 2.0)
    assert codec.update_bound([quiet], 10_000) == pytest.approx(math.hypot(112, 53) / 64)
    assert codec.update_bound([quiet, loud], 10_000) == pytest.approx(0.75 * math.hypot(112, 212) / 64)
    assert codec.update_bound([(2 * w, e, s) for w, e, s in (quiet, loud)], 10_000) == codec.update_bound(
        [quiet, loud], 10_000
    )
    with pytest.raises(ConfigError, match="positive weight"):
        codec.update_bound([(0.0, 64.0, 1.0)], 10)


def test_the_bound_holds_noised_vectors() -> None:
    """A full-norm signal from a sample 6 deviations above its mean, plus noise. Seeded: cannot fail by chance."""
    units, noise, length = 64.0, 1.2, 24_576
    bound = codec.update_bound([(1.0, units, noise)], length)
    signal = of_norm(np.ones(length, dtype=np.float32), (units + 6 * math.sqrt(units)) / units)
    for seed in range(20):
        drawn = np.random.default_rng(seed).normal(0, noise / units, length)
        norm = float(np.linalg.norm(signal + drawn))
        assert 0.5 * bound < norm < bound


def packed_files(folder: Path, terms: Coding, count: int) -> tuple[list[Path], NDArray[np.int64]]:
    rows = np.random.default_rng(4).integers(-terms.levels, terms.levels + 1, size=(count, terms.padded))
    paths = [folder / f"vector-{index}" for index in range(count)]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(codec.pack(row, terms.ring_bits))
    return paths, rows.sum(axis=0)


@pytest.mark.parametrize("ring_bits", codec.RING_BITS)
@pytest.mark.parametrize("length", [999, 200_001])
def test_packed_files_add_up_chunk_by_chunk(tmp_path: Path, ring_bits: int, length: int) -> None:
    terms = coding(length, ring_bits=ring_bits, members=3)
    paths, expected = packed_files(tmp_path, terms, 3)
    out = tmp_path / "sum"
    found = codec.add_packed_files(paths, coding=terms, out=out)
    assert found == digest(out.read_bytes())
    assert out.stat().st_size == terms.packed_bytes
    assert np.array_equal(read_packed(out, terms), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"sum", "vector-0", "vector-1", "vector-2"}


def test_files_that_cannot_be_honest_are_refused_by_name(tmp_path: Path) -> None:
    terms = coding(999, members=3)
    paths, _ = packed_files(tmp_path, terms, 3)
    out = tmp_path / "sum"
    for count in (0, 4):
        with pytest.raises(VerificationError, match=f"got {count}"):
            codec.add_packed_files((paths * 2)[:count], coding=terms, out=out)
    words = read_packed(paths[1], terms)
    words[500] = -(1 << 15)
    paths[1].write_bytes(codec.pack(words, 16))
    with pytest.raises(VerificationError, match="vector-1"):
        codec.add_packed_files(paths, coding=terms, out=out)
    paths[2].write_bytes(b"short")
    with pytest.raises(VerificationError, match="vector-2"):
        codec.add_packed_files(paths, coding=terms, out=out)
    assert not out.exists()
