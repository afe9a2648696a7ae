"""How good a base is: bits a byte on held-out text, and the figures that it has to beat.

Bits a byte compare models of unlike vocabularies, and models with compressors (karpathy/nanochat does the same).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn

from foedus_model.tokenizer import encode


def bits_per_byte(model: nn.Module, tokenizer: Tokenizer, texts: list[str], *, length: int = 256) -> float:
    """Bits that the model needs for each byte of some texts.

    Every token is scored once, with the text's start or at least ``length / 2`` tokens as its context.

    Args:
        model: Anything whose call returns ``.logits``.
        tokenizer: The model's tokenizer.
        texts: Each text starts afresh after an end-of-text token.
        length: Tokens a window; consecutive windows overlap by half.
    """
    end = tokenizer.token_to_id("<|endoftext|>")
    nats = 0.0
    for text in texts:
        tokens = np.concatenate([[end], encode(tokenizer, [text])])
        nats += sum(_window_nats(model, tokens, length))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def xz_bits_per_byte(data: bytes) -> float:
    """Bits a byte that ``xz -9e`` needs for the data."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def _window_nats(model: nn.Module, tokens: npt.NDArray[Any], length: int, *, rows: int = 8) -> Iterator[float]:
    """Summed negative log likelihoods of windows of one text, each scoring what the one before did not."""
    device = next(model.parameters()).device
    stride = length // 2
    starts = list(range(0, max(1, len(tokens) - 1 - stride), stride))
    for first in range(0, len(starts), rows):
        group = starts[first : first + rows]
        padded = np.zeros((len(group), length + 1), dtype=np.int64)
        scored = np.zeros((len(group), length), dtype=bool)
        for row, start in enumerate(group):
            window = tokens[start : start + length + 1]
            padded[row, : len(window)] = window
            scored[row, (0 if start == 0 else length - stride) : len(window) - 1] = True
        batch = torch.from_numpy(padded).to(device)
        with torch.no_grad():
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            nats = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        yield float(nats[torch.from_numpy(scored.ravel()).to(device)].double().sum())
