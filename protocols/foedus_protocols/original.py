"""The ``config.json`` of OpenAI's own layout (``original/`` of a release) in transformers' field names, and back.

The two layouts describe one model. OpenAI's names follow its reference program (openai/gpt-oss, ``torch/model.py``:
the fields of ``ModelConfig``), which also fixes what its file does not say: sliding layers at even positions, an
epsilon of 1e-5, biases in attention, YaRN without rounding, experts in MXFP4. Everything in Foedus reads the
transformers' names; `manifest.read_config` translates. The tensors' names are `foedus_model.original`'s job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foedus_protocols.errors import CheckpointError

_SAME = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
)
_COUNTS = (*_SAME, "num_experts", "experts_per_token", "initial_context_length")
_NUMBERS = ("rope_theta", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta", "swiglu_limit")
_SWIGLU_LIMIT = 7.0  # The reference program's default, for files older than the field.
_EPSILON = 1e-05
_MOST_LAYERS = 1000  # What a file says is made a list of this length, and numbers are multiplied, before it is checked.
_MOST = 1 << 40

_HARMONY_VOCABULARY = 201088
_HARMONY_IDS = {"bos_token_id": 199998, "eos_token_id": 200002, "pad_token_id": 199999}

MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What a released ``config.json`` says of its experts, under ``quantization_config``."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is in OpenAI's own field names."""
    return "num_experts" in config and not {"model_type", "num_local_experts"} & config.keys()


def to_released(config: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's configuration in transformers' field names.

    The ids of the control tokens, which OpenAI's file leaves to the tokenizer, are harmony's where the vocabulary is.

    Raises:
        CheckpointError: A field is missing, not a positive number, or not one of OpenAI's.
    """
    described = {"swiglu_limit": _SWIGLU_LIMIT} | dict(config)
    strange = sorted(described.keys() - {*_COUNTS, *_NUMBERS})
    if strange:
        raise CheckpointError(f"expected the fields of OpenAI's config.json, got also {', '.join(strange)}")
    for name in (*_COUNTS, *_NUMBERS):
        kind, types = ("number", (int, float)) if name in _NUMBERS else ("integer", (int,))
        value = described.get(name)
        most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value <= most:
            raise CheckpointError(
                f"expected {name} in OpenAI's config.json to be a positive {kind} up to {most}, got {value!r}"
            )
    context, factor = described["initial_context_length"], float(described["rope_scaling_factor"])
    ids = _HARMONY_IDS if described["vocab_size"] == _HARMONY_VOCABULARY else dict.fromkeys(_HARMONY_IDS)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **{name: described[name] for name in _SAME},
        **ids,
        "num_local_experts": described["num_experts"],
        "num_experts_per_tok": described["experts_per_token"],
        "layer_types": layer_types(described["num_hidden_layers"]),
        "swiglu_limit": float(described["swiglu_limit"]),
        "max_position_embeddings": int(context * factor),
        "rope_parameters": _rope(described, factor),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "output_router_logits": False,
        "rms_norm_eps": _EPSILON,
        "tie_word_embeddings": False,
        "use_cache": True,
        "quantization_config": {**MXFP4, "modules_to_not_convert": list(MXFP4["modules_to_not_convert"])},
    }


def to_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """A released configuration in OpenAI's field names.

    Raises:
        CheckpointError: The model has a property that OpenAI's layout cannot say.
    """
    rope = rope_of(config)
    yarn = rope.get("rope_type") == "yarn"
    factor = float(rope["factor"]) if yarn else 1.0
    try:
        original = {
            **{name: config[name] for name in _SAME},
            "num_experts": config["num_local_experts"],
            "experts_per_token": config["num_experts_per_tok"],
            "swiglu_limit": float(config.get("swiglu_limit", _SWIGLU_LIMIT)),
            "initial_context_length": (
                rope["original_max_position_embeddings"] if yarn else config["max_position_embeddings"]
            ),
            "rope_theta": float(rope["rope_theta"]),
            "rope_scaling_factor": factor,
            "rope_ntk_alpha": float(rope["beta_slow"]) if yarn else 1.0,
            "rope_ntk_beta": float(rope["beta_fast"]) if yarn else 32.0,
        }
    except KeyError as error:
        raise CheckpointError(f"expected {error} in the configuration, to write it in OpenAI's layout") from error
    said, again = {**config, "rope_parameters": rope}, to_released(original)
    for name in _SAID_BY_THE_PROGRAM:
        if name in said and said[name] != again[name]:
            raise CheckpointError(
                f"OpenAI's layout cannot say {name} = {said[name]!r} (its program has {again[name]!r}); "
                "write the released layout"
            )
    return original


def layer_types(layers: int, *, odd: str = "full_attention") -> list[str]:
    """What gpt-oss's layers attend with: sliding layers at even positions, and `odd` between them."""
    return [odd if layer % 2 else "sliding_attention" for layer in range(layers)]


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, in the newer spelling or the released files' (``rope_scaling`` beside ``rope_theta``)."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return scaling | ({"rope_theta": config["rope_theta"]} if "rope_theta" in config else {})


_SAID_BY_THE_PROGRAM = (
    "layer_types", "max_position_embeddings", "rope_parameters", "attention_bias", "rms_norm_eps",
    "tie_word_embeddings",
)  # fmt: skip


def _rope(described: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Rotary positions: YaRN where they are stretched, plain ones otherwise."""
    if factor <= 1:
        return {"rope_type": "default", "rope_theta": float(described["rope_theta"])}
    return {
        "rope_type": "yarn",
        "rope_theta": float(described["rope_theta"]),
        "factor": factor,
        "beta_fast": float(described["rope_ntk_beta"]),
        "beta_slow": float(described["rope_ntk_alpha"]),
        "truncate": False,
        "original_max_position_embeddings": described["initial_context_length"],
    }
