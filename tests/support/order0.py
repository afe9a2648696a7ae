"""What a model that knows no order would need for a text: the figure that any model of language has to beat."""

from __future__ import annotations

import math
from collections import Counter


def order0_bits_per_byte(text: str) -> float:
    """Bits a byte of a model that knows the frequency of each byte of this very text, and nothing else."""
    data = text.encode()
    return -sum(count * math.log2(count / len(data)) for count in Counter(data).values()) / len(data)
