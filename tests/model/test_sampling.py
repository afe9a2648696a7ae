"""The filters against transformers' own, and the draws against the probabilities that they leave."""

from __future__ import annotations

import pytest
import torch
from foedus_model.sampling import Sampling, choose, filtered, new_generator
from foedus_protocols.errors import UsageError
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

OPTIONS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_the_library(options: dict[str, float], seed: int) -> None:
    sampling = Sampling(**{"temperature": 1.0} | options)  # type: ignore[arg-type]
    logits = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    theirs = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert torch.equal(filtered(logits / sampling.temperature, sampling), theirs)


def test_draws_follow_the_probabilities() -> None:
    """4,000 draws, total variation below 0.03; a right sampler passes with more than 1 - 1e-6 (Bretagnolle-Huber-Carol:
    2^4 exp(-2 n (2 x 0.03)^2 / 4) is 1e-2 for four outcomes, so the seed is fixed and the bound cannot flicker)."""
    sampling = Sampling(temperature=1.0, top_k=4, seed=1)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.1, -3.0])
    source = new_generator(sampling)
    counts = torch.zeros(6)
    for _ in range(4000):
        counts[choose(logits, sampling, source)] += 1
    wanted = torch.softmax(filtered(logits, sampling), dim=-1)
    assert counts[4:].sum() == 0
    assert float((counts / 4000 - wanted).abs().sum() / 2) < 0.03


def test_without_a_seed_draws_differ() -> None:
    draws = set()
    for _ in range(4):
        sampling = Sampling(temperature=1.0)
        source = new_generator(sampling)
        draws.add(tuple(choose(torch.zeros(1000), sampling, source) for _ in range(8)))
    assert len(draws) == 4


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_the_coldest_draw_is_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([-3.0, 40.0, 39.0, -torch.inf])
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}):
        sampling = Sampling(temperature=temperature, seed=0, **options)  # type: ignore[arg-type]
        assert choose(logits, sampling, new_generator(sampling)) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": -1}, "top-k of 0"),
        ({"top_p": 0.0}, "top-p above 0"),
        ({"top_p": 1.1}, "top-p above 0"),
        ({"min_p": 1.5}, "min-p from 0 to 1"),
        ({"seed": -1}, "seed from 0"),
        ({"stop": ("",)}, "stop texts"),
        ({"stop": ("a",) * 17}, "stop texts"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Sampling(**options)  # type: ignore[arg-type]
