"""Model shapes by name, as ``config.json`` dictionaries of transformers' gpt-oss.

``gpt-oss-120b`` and ``gpt-oss-20b`` repeat the released configurations, for building at the true shape; their weights
come from a checkpoint. ``moe-16e-32k`` is a configuration of our own, of which nobody has weights: 16 wide experts, and
log-sparse attention in place of the full layers. ``tiny`` is the shape of the base that the package ships: small enough
for a CPU, with everything that makes gpt-oss what it is (sliding and full layers, sinks, routed experts with biases,
MXFP4 storage).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from foedus_protocols.errors import ConfigError
from foedus_protocols.original import MXFP4, layer_types

TINY = Path(__file__).parent / "tiny"
"""The base that the package ships, of the shape `tiny`."""


def _gpt_oss(*, layers: int, experts: int) -> dict[str, Any]:
    """A released configuration; the two sizes differ in these two numbers."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": layer_types(layers),
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": copy.deepcopy(MXFP4),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    }


def tiny(
    *,
    vocab_size: int = 4096,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> dict[str, Any]:
    """The shipped base: 4 layers, 16 experts (2 a token) of width 128, a tied head, 3.9 M parameters.

    Every contracted dimension is a multiple of 32, so that the experts fit MXFP4. The token ids belong to the tokenizer
    and are therefore arguments.
    """
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": layer_types(4),
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": pad_token_id,
        "quantization_config": copy.deepcopy(MXFP4),
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "router_aux_loss_coef": 0.0,
        "sliding_window": 64,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _moe_16e_32k() -> dict[str, Any]:
    """16 experts (4 a token), log-sparse layers, 32,768 tokens with plain RoPE, 119,991,715,200 parameters.

    The experts' width is the multiple of 32 that brings the total nearest to 120 B.
    """
    return _gpt_oss(layers=36, experts=16) | {
        "intermediate_size": 23680,
        "layer_types": layer_types(36, odd="log_sparse_attention"),
        "log_sparse_pattern": {"block": 64, "window": 3, "first": 1},
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    }


def preset(name: str) -> dict[str, Any]:
    """The configuration of a preset.

    Raises:
        ConfigError: No preset has this name.
    """
    match name:
        case "tiny":
            return tiny()
        case "gpt-oss-20b":
            return _gpt_oss(layers=24, experts=32)
        case "gpt-oss-120b":
            return _gpt_oss(layers=36, experts=128)
        case "moe-16e-32k":
            return _moe_16e_32k()
    raise ConfigError(f"expected the preset tiny, gpt-oss-20b, gpt-oss-120b or moe-16e-32k, got {name!r}")
