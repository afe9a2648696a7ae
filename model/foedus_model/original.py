"""The tensors of OpenAI's own layout (the folder ``original/`` of a release) under transformers' names, and back.

Names after the reference program (openai/gpt-oss, ``torch/model.py`` and ``torch/weights.py``) and the conversion that
made the released files (transformers, ``convert_gpt_oss_weights_to_hf.py``). The bytes are the same in both: packed
experts are laid out alike (the conversion only renames them), and q, k, v lie one below the other in a fused matrix,
so that taking them apart is three views of its rows. The configuration is `foedus_protocols.original`'s job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError

from foedus_model.shards import Make, TensorSpec

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
_LAYER = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
_FUSED = re.compile(r"attn\.qkv\.(weight|bias)")
_BLOCK = re.compile(r"block\.(0|[1-9][0-9]*)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """What a released tensor is in an original one.

    Attributes:
        source: The original name.
        rows: Its rows there, or None for all of it.
    """

    source: str
    rows: tuple[int, int] | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of the tensor `source`, a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


def pieces(found: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, Piece]:
    """Where in an original checkpoint each released tensor lies.

    OpenAI's names and the released ones correspond one to one, so no two tensors claim the same place.

    Args:
        found: What the files hold.
        config: The configuration, in transformers' names.

    Raises:
        CheckpointError: A name is not OpenAI's, or a fused matrix has another number of rows than the heads ask for.
    """
    taken: dict[str, Piece] = {}
    for source, spec in found.items():
        matched = _BLOCK.fullmatch(source)
        fused = _FUSED.fullmatch(matched[2]) if matched else None
        if matched and fused:
            bounds = _head_rows(config)
            if not spec.shape or spec.shape[0] != bounds["v"][1]:
                raise CheckpointError(
                    f"{source}: expected {bounds['v'][1]} rows of q, k and v, got the shape {spec.shape}"
                )
            for letter, rows in bounds.items():
                taken[f"model.layers.{matched[1]}.self_attn.{letter}_proj.{fused[1]}"] = Piece(source, rows)
        elif matched and matched[2] in _LAYER:
            taken[f"model.layers.{matched[1]}.{_LAYER[matched[2]]}"] = Piece(source)
        elif source in _OUTER:
            taken[_OUTER[source]] = Piece(source)
        else:
            raise CheckpointError(
                f"expected only names of OpenAI's layout, as config.json is in it, got the tensor {source}: "
                "the files are not of one release; fetch them again"
            )
    return taken


def piece_spec(piece: Piece, found: Mapping[str, TensorSpec]) -> TensorSpec:
    """Type and shape of a released tensor that lies in an original one."""
    spec = found[piece.source]
    return spec if piece.rows is None else TensorSpec(spec.dtype, (piece.rows[1] - piece.rows[0], *spec.shape[1:]))


def to_original(specs: Mapping[str, TensorSpec], make: Make) -> tuple[dict[str, TensorSpec], Make]:
    """A released checkpoint's tensors as an original one holds them, made one by one.

    Args:
        specs: What the released checkpoint holds.
        make: Its tensors by name.

    Raises:
        CheckpointError: A tensor that OpenAI's layout has no name for (its experts are in MXFP4, its head is untied).
    """
    sources: dict[str, list[str]] = {}
    for name in specs:
        sources.setdefault(_original_name(name), []).append(name)
    described = {}
    for name, parts in sources.items():
        parts.sort(key=_fused_order)
        first = specs[parts[0]]
        rows = sum(specs[part].shape[0] for part in parts)
        described[name] = TensorSpec(first.dtype, (rows, *first.shape[1:])) if len(parts) > 1 else first

    def joined(name: str) -> torch.Tensor:
        parts = [make(part) for part in sources[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return described, joined


def _head_rows(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """First and last row of q, k and v in a fused matrix."""
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}


_OUTER_BACK = {name: source for source, name in _OUTER.items()}
_LAYER_BACK = {name: source for source, name in _LAYER.items()}
_SEPARATE = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def _original_name(name: str) -> str:
    matched = _LAYER_NAME.fullmatch(name)
    inner = matched[2] if matched else ""
    separate = _SEPARATE.fullmatch(inner)
    if matched and separate:
        return f"block.{matched[1]}.attn.qkv.{separate[2]}"
    if matched and inner in _LAYER_BACK:
        return f"block.{matched[1]}.{_LAYER_BACK[inner]}"
    if name in _OUTER_BACK:
        return _OUTER_BACK[name]
    raise CheckpointError(f"OpenAI's layout has no name for {name}; write the released layout")


def _fused_order(name: str) -> int:
    separate = _SEPARATE.search(name)
    return "qkv".index(separate[1]) if separate else 0
