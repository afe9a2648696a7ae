"""How the next token is chosen: greedy, or drawn after temperature, top-k, top-p and min-p, from a seed of its own.

The filters and their order are those of transformers' logits warpers (temperature, top-k, top-p, min-p; Holtzman et
al. 2019 for top-p, Nguyen et al. 2024 for min-p), written for one request at a time: each draws from its own
generator, so that what a request says depends on its seed and never on who shares its batch.

Left out: penalties for repetition, beams, constrained grammars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from foedus_protocols.errors import UsageError

_MAX_STOPS = 16
_COLDEST = 1e-30  # Below, fp32 would have 0 over 0; here all but the likeliest have no share left.


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: At most this many tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_k: Draw among this many likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have this probability; 1 for all.
        min_p: Draw among the tokens that have at least this share of the likeliest one's probability; 0 for all.
        seed: Makes drawn tokens repeatable; None draws anew.
        stop: Texts that end the answer; what is returned ends before them.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"expected at least 1 new token, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < math.inf:
            raise UsageError(f"expected a temperature of 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"expected a top-k of 0 (all tokens) or more, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"expected a top-p above 0 and at most 1, got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"expected a min-p from 0 to 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"expected a seed from 0 to 2^63 - 1, got {self.seed}")
        if len(self.stop) > _MAX_STOPS or not all(self.stop):
            raise UsageError(f"expected at most {_MAX_STOPS} stop texts and none of them empty, got {len(self.stop)}")


def new_generator(sampling: Sampling) -> torch.Generator:
    """The source of a request's draws."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one request.

    Args:
        logits: Of the last position, float32.  # (vocabulary,)
        sampling: How to choose.
        generator: From `new_generator`; advanced by one draw unless the temperature is 0.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = logits.float().cpu()
    scores = (scores - scores.max()) / max(sampling.temperature, _COLDEST)  # (vocabulary,), none above 0
    kept = filtered(scores, sampling)
    return int(torch.multinomial(torch.softmax(kept, dim=-1), 1, generator=generator))


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The scores with minus infinity wherever top-k, top-p or min-p exclude a token. The likeliest always stays.

    Args:
        scores: Logits over the temperature.  # (vocabulary,)
        sampling: The limits.
    """
    nothing = -math.inf
    if 0 < sampling.top_k < scores.numel():
        smallest = torch.topk(scores, sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < smallest, nothing)
    if sampling.top_p < 1.0:
        ascending, order = torch.sort(scores)
        below = torch.softmax(ascending, dim=-1).cumsum(-1) <= 1.0 - sampling.top_p  # (vocabulary,)
        below[-1] = False
        scores = scores.masked_fill(torch.zeros_like(below).scatter(0, order, below), nothing)
    if sampling.min_p > 0.0:
        shares = torch.softmax(scores, dim=-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.max(), nothing)
    return scores
