"""Our attention inside transformers' gpt-oss: sinks in linear memory, and the layer type `log_sparse_attention`.

transformers offers two seams, `AttentionInterface` (the function) and `AttentionMaskInterface` (what it gets as a mask;
without the second, padding would be ignored). Both are registered under one name, which contains none of "sdpa",
"flash" and "flex_attention": transformers finds those inside a name and takes it for its own.

It validates `layer_types`, and picks masks and cache classes by them, so a new type cannot be named there at run time.
`LogSparseConfig` therefore tells transformers ``full_attention`` for our layers (a growing cache, every key kept),
remembers which they are, runs on our attention only, and writes ``log_sparse_attention`` back into ``config.json``.

The mask that reaches the function is None, or bool [B, T] where a batch is padded. Padding then cuts each row into
records, which no kernel reads across: nothing is hidden by a queries x keys mask. Packed records arrive in
``cu_seq_lens_q``, transformers' name. Left out: attention dropout, static caches, attention weights as an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from foedus_kernels.log_sparse import Pattern, log_sparse_decode_torch, log_sparse_torch
from foedus_kernels.records import offsets_of_padding
from foedus_kernels.sink import sink_attention_torch
from foedus_protocols.errors import ConfigError
from torch import nn
from transformers import AttentionInterface, GptOssConfig
from transformers.masking_utils import AttentionMaskInterface

NAME = "foedus"
"""The attention implementation's name in transformers."""

LOG_SPARSE = "log_sparse_attention"
LAYER_TYPES = ("full_attention", "sliding_attention", LOG_SPARSE)


class LogSparseConfig(GptOssConfig):
    """A gpt-oss configuration with log-sparse layers.

    Attributes:
        log_sparse_layers: The layers of type `log_sparse_attention`, which `layer_types` calls ``full_attention``.
        log_sparse_pattern: ``block``, ``window`` and ``first`` of these layers (`Pattern`); None for the defaults.
    """

    log_sparse_layers: list[int] | None = None
    log_sparse_pattern: dict[str, int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        types: list[str] = list(getattr(self, "layer_types") or ())  # noqa: B009 (GptOssConfig is untyped here)
        self.log_sparse_layers = [layer for layer, kind in enumerate(types) if kind == LOG_SPARSE]
        self.layer_types: list[str] = ["full_attention" if kind == LOG_SPARSE else kind for kind in types]
        super().__post_init__(**kwargs)

    @property
    def pattern(self) -> Pattern:
        """The blocks that a log-sparse layer reads."""
        return Pattern(**(self.log_sparse_pattern or {}))

    @property
    def _attn_implementation(self) -> str:
        asked = self._attn_implementation_internal
        if asked not in (None, NAME):
            raise ConfigError(
                f"expected the attention {NAME!r} for a model with {LOG_SPARSE} layers, got {asked!r}, which would run "
                "them as full attention; leave attn_implementation out"
            )
        return NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self._attn_implementation_internal = value

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says: our layers by their own name."""
        described = super().to_dict()
        ours = described.pop("log_sparse_layers")
        described["layer_types"] = [
            LOG_SPARSE if layer in ours else kind for layer, kind in enumerate(described["layer_types"])
        ]
        return described


def gpt_oss_config(described: Mapping[str, Any]) -> GptOssConfig:
    """transformers' configuration of a gpt-oss ``config.json`` with any of our layer types.

    Args:
        described: The file's fields; its quantisation is left out, since ours is not a transformers quantiser.

    Returns:
        A configuration on which a model runs eager attention, or ours where a layer is log-sparse.

    Raises:
        ConfigError: A layer type or a pattern that this version does not have.
    """
    register()
    types = described.get("layer_types") or ()
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown:
        raise ConfigError(
            f"expected layers of type {', '.join(LAYER_TYPES)}, got {', '.join(unknown)}: not supported by this version"
        )
    fields = {key: value for key, value in described.items() if key != "quantization_config"}
    if LOG_SPARSE not in types:
        config = GptOssConfig(**fields)
        config._attn_implementation = "eager"
        return config
    config = LogSparseConfig(**fields)
    try:
        config.pattern  # noqa: B018
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"expected log_sparse_pattern with block, window and first, got {config.log_sparse_pattern}: {error}"
        ) from error
    return config


def register() -> None:
    """Make `NAME` known to transformers; any number of times."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def fuse_attention(model: Any) -> None:
    """Have every layer's attention run in memory linear in the tokens, from now on; log-sparse layers always do.

    Full and sliding layers otherwise run transformers' own (``eager``), which keeps queries x keys for each head. The
    fused function is some 2.5 times as fast at 4,096 tokens on a CPU; its exponential is approximate, and logits move
    by some 3e-5 (docs/log.md), for which reason it is not the default.

    Args:
        model: A `GptOssForCausalLM`; changed in place.
    """
    register()
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, in transformers' calling convention.

    Args:
        module: The layer's `GptOssAttention`.
        query: [B, H, Tq, D], the last Tq of the keys' positions.
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        attention_mask: What `padding_mask` returned.
        scaling: Of the products of queries and keys.
        dropout: Must be 0.
        sliding_window: Keys that a query sees, on sliding layers.
        s_aux: The layer's sinks [H].
        cu_seq_lens_q: Integers [records + 1], the offsets of packed records in the flattened batch, without a cache.

    Returns:
        The output [B, Tq, H, D], and no weights.

    Raises:
        ValueError: Dropout, a mask that is not of padding, or records together with padding or a cache.
    """
    if dropout:
        raise ValueError(f"expected no attention dropout, got {dropout}; set attention_dropout to 0")
    offsets = _record_offsets(attention_mask, cu_seq_lens_q, key, query)
    sinks = s_aux.to(query.dtype)
    config = module.config
    if not isinstance(config, LogSparseConfig) or module.layer_idx not in (config.log_sparse_layers or ()):
        out = sink_attention_torch(query, key, value, sinks, scale=scaling, window=sliding_window, offsets=offsets)
        return out.transpose(1, 2), None
    pattern = {"block": config.pattern.block, "window": config.pattern.window, "first": config.pattern.first}
    if query.shape[2] == 1 and key.shape[2] > 1:
        starts = None if offsets is None else _last_starts(offsets, key)
        out = log_sparse_decode_torch(query, key, value, sinks, scale=scaling, starts=starts, **pattern)
    else:
        out = log_sparse_torch(query, key, value, sinks, scale=scaling, offsets=offsets, **pattern)
    return out.transpose(1, 2), None


def padding_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """What a layer's attention needs to know of a mask: where its keys are padding.

    Args:
        q_length: Tq.
        kv_length: T, of the layer's keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key: above 0 where a sliding layer has forgotten some.
        attention_mask: [B, all positions], 0 where a token is padding; None where none is.

    Returns:
        bool [B, T], or None where no key is padding.

    Raises:
        ValueError: Keys after the last query: a static cache.
    """
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"expected the {q_length} queries to be the last of {kv_length} keys, got the positions {q_offset} and "
            f"{kv_offset}; use a dynamic cache, not a static one"
        )
    if attention_mask is None:
        return None
    present = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if bool(present.all()) else present


def _record_offsets(
    mask: torch.Tensor | None, packed: torch.Tensor | None, key: torch.Tensor, query: torch.Tensor
) -> torch.Tensor | None:
    """Where records begin in the flattened keys; None where every row is one."""
    if packed is not None:
        if mask is not None or query.shape[2] != key.shape[2]:
            raise ValueError(
                "expected packed records without padding and without a cache, got "
                f"{'padding' if mask is not None else 'a cache'}; take one of the two"
            )
        return packed
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"expected a mask of padding, bool {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)} {mask.dtype}; "
            "pass the model a mask [B, T] of ones and zeros"
        )
    return offsets_of_padding(mask)


def _last_starts(offsets: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """In which position of its row the record of each row's last key begins: [B]."""
    rows, keys = key.shape[0], key.shape[2]
    ends = torch.arange(1, rows + 1, device=offsets.device) * keys
    return offsets[torch.searchsorted(offsets, ends) - 1] - (ends - keys)
