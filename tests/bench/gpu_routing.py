"""A realistic routing histogram, from a seed: which experts a text's tokens go to.

Trained routers are uneven: on prose 98 % of 128 experts are hit, and the rows an expert have a coefficient of variation
of 0.69 (random token ids: 87 % and 1.46; published measurements), and random ids misstate a kernel's speed by 1.6 to
1.7. Here the counts are made to have both figures, exactly as far as whole rows allow, and then dealt to tokens.
"""

from __future__ import annotations

import statistics

import numpy as np
from numpy.typing import NDArray

HIT, VARIATION = 0.98, 0.69
_HALVINGS = 60


def expert_counts(
    tokens: int, experts: int, top_k: int, *, hit: float = HIT, variation: float = VARIATION
) -> NDArray[np.int64]:
    """Rows of each expert, descending: int64 (E,), tokens x top_k in all, at most one a token.

    Args:
        tokens: T.
        experts: E.
        top_k: Experts a token.
        hit: Share of experts that have a row.
        variation: Standard deviation of the counts over their mean.

    Raises:
        ValueError: Fewer than `top_k` experts, fewer rows than experts to hit, or shares that cannot be.
    """
    used = max(top_k, round(hit * experts))
    if not (0 < hit <= 1 and variation >= 0 and 1 <= top_k <= experts and tokens * top_k >= used):
        raise ValueError(
            f"expected 1 to {experts} experts a token, a share of hit experts in (0, 1] and a row for each, got "
            f"{top_k} experts a token, {hit} and {tokens} tokens"
        )
    places = [statistics.NormalDist().inv_cdf((place + 0.5) / used) for place in range(used)]
    low, high = 0.0, 4.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _dealt(np.exp(middle * np.array(places[::-1])), tokens, experts, top_k)
        low, high = (middle, high) if coefficient(found) < variation else (low, middle)
    return _dealt(np.exp(high * np.array(places[::-1])), tokens, experts, top_k)


def coefficient(counts: NDArray[np.int64]) -> float:
    """Standard deviation over mean."""
    return float(counts.std() / counts.mean())


def _dealt(shares: NDArray[np.float64], tokens: int, experts: int, top_k: int) -> NDArray[np.int64]:
    """Whole rows near the shares: one each at least, `tokens` at most, tokens x top_k in all."""
    total = tokens * top_k
    counts = np.clip(np.floor(shares / shares.sum() * total).astype(np.int64), 1, tokens)
    while (missing := total - int(counts.sum())) != 0:
        open_ = np.flatnonzero(counts < tokens) if missing > 0 else np.flatnonzero(counts > 1)
        chosen = open_[: abs(missing)] if missing > 0 else open_[::-1][: abs(missing)]
        counts[chosen] += np.sign(missing)
    return np.concatenate([np.sort(counts)[::-1], np.zeros(experts - len(counts), np.int64)])


def routed(tokens: int, experts: int, top_k: int, seed: int) -> NDArray[np.int64]:
    """Expert ids of each token, all different: int64 (T, top_k), with the counts of `expert_counts`.

    Rows in the order of experts go to tokens in turn, so that no token gets an expert twice; then tokens, the experts'
    names and each token's choices are shuffled.
    """
    counts = expert_counts(tokens, experts, top_k)
    generator = np.random.default_rng(seed)
    by_row = np.repeat(generator.permutation(experts), counts)  # (T * top_k,)
    ids = by_row.reshape(top_k, tokens).T[generator.permutation(tokens)]  # (T, top_k)
    ids = generator.permuted(ids, axis=1)
    return np.ascontiguousarray(ids)
