"""A small random gpt-oss with an adapter of two bias-free linear maps, and units of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

VOCABULARY = 96


class LowRank(nn.Module):
    """x W + (x A) B with A frozen: what Opacus can wrap."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.a.weight.requires_grad_(False)
        nn.init.normal_(self.b.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


@dataclass
class StandIn:
    """What training needs of an attached adapter."""

    model: GptOssForCausalLM
    trained: list[nn.Parameter]


def build_stand_in(rank: int = 4) -> StandIn:
    torch.manual_seed(7)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).requires_grad_(False).eval()
    trained = []
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wrapped = LowRank(getattr(layer.self_attn, name), rank)
            setattr(layer.self_attn, name, wrapped)
            trained.append(wrapped.b.weight)
    return StandIn(model=model, trained=trained)


@pytest.fixture
def stand_in() -> StandIn:
    return build_stand_in()


def random_unit(rng: np.random.Generator, lengths: Sequence[int]) -> SyntheticUnit:
    """Records of these lengths; the second half of each are answers."""
    return SyntheticUnit(
        records=[
            SyntheticRecord(
                tokens=rng.integers(0, VOCABULARY, length).astype(np.int32), loss_mask=np.arange(length) >= length // 2
            )
            for length in lengths
        ]
    )


@pytest.fixture
def units() -> list[SyntheticUnit]:
    """The largest first; one has a single answer token, one several records of unlike length."""
    rng = np.random.default_rng(3)
    return [random_unit(rng, lengths) for lengths in ([40, 40, 24], [2], [30], [5, 17], [12, 12, 12, 12])]
