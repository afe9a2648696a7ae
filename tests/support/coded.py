"""Sums of coded words as arrays, through the files that the packages read and write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from foedus_protocols import codec
from foedus_protocols.codec import Coding
from numpy.typing import NDArray


def decode_sum(words: NDArray[np.int64], *, coding: Coding, key: bytes) -> NDArray[np.float32]:
    """`codec.decode_file` of a sum that is in memory.  # (padded,) -> (d,)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sum"
        path.write_bytes(codec.pack(words, coding.ring_bits))
        return codec.decode_file(path, coding=coding, key=key)


def read_packed(path: Path, coding: Coding) -> NDArray[np.int64]:
    """A packed vector or sum as integers.  # (padded,)"""
    return codec.unpack(path.read_bytes(), coding.ring_bits, coding.padded).astype(np.int64)
