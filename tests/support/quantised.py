"""A small random gpt-oss in each codec, in memory, with an expert that nobody is routed to."""

from __future__ import annotations

from typing import Any

import torch
from foedus_model.codecs import codec
from foedus_model.experts import QuantisedExperts
from foedus_model.linear import ATTENTION, quantise_linears
from transformers import GptOssConfig, GptOssForCausalLM

VOCABULARY = 96
LONELY = 3
"""The expert that nobody is routed to."""


def small_model(quantisation: str) -> GptOssForCausalLM:
    """Two layers of eight experts, frozen, in evaluation mode.

    Args:
        quantisation: ``mxfp4``, ``nf4``, ``int8`` or ``dense``; the first keeps the attention dense.
    """
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
    config._experts_implementation = "grouped_mm"
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.1)
    for layer in model.model.layers:
        layer.mlp.router.bias.data[LONELY] = -1e4
    model.requires_grad_(False).eval()
    if quantisation != "dense":
        _quantise(model, quantisation)
    return model


def _quantise(model: Any, quantisation: str) -> None:
    kind = codec(quantisation)
    dense = [{name: getattr(layer.self_attn, name) for name in ATTENTION} for layer in model.model.layers]
    quantise_linears(model, quantisation)
    for layer, linears in zip(model.model.layers, dense, strict=True):
        stacks, layer.mlp.experts = layer.mlp.experts, QuantisedExperts(model.config, quantisation)
        for name in ("gate_up_proj", "down_proj"):
            _store(layer.mlp.experts, name, getattr(stacks, name).detach().mT, quantisation)
            layer.mlp.experts.register_buffer(f"{name}_bias", getattr(stacks, f"{name}_bias").detach())
        for name in ATTENTION if kind.linears else ():
            linear = getattr(layer.self_attn, name)
            _store(linear, "weight", linears[name].weight.detach(), quantisation)
            linear.bias = linears[name].bias
    model.requires_grad_(False).eval()


def _store(module: torch.nn.Module, name: str, matrix: torch.Tensor, quantisation: str) -> None:
    kind = codec(quantisation)
    for (suffix, _, _), tensor in zip(kind.parts, kind.encode(matrix), strict=True):
        module.register_buffer(f"{name}_{suffix}", tensor)
