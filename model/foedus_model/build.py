"""A checkpoint -> a frozen transformers `GptOssForCausalLM` whose experts stay in 4 bits.

The model is built without memory (`meta`), its expert modules are swapped, and the memory-mapped tensors are assigned:
the packed bytes are never copied on a CPU, let alone decoded. Everything that is not packed is converted to the
compute type. Missing, unexpected or misshapen tensors are errors; RoPE's buffers, which no checkpoint holds, are
computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from foedus_kernels.mxfp4 import LARGEST_SCALE, SMALLEST_SCALE
from foedus_protocols.errors import CheckpointError, ConfigError
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from foedus_model.attention import gpt_oss_config
from foedus_model.checkpoint import Checkpoint, open_checkpoint
from foedus_model.experts import Mxfp4Experts

_LOG = logging.getLogger(__name__)
_PACKED = ("_blocks", "_scales")


def load_base(
    path: Path,
    *,
    expect_digest: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GptOssForCausalLM:
    """Load a base model, frozen and in evaluation mode.

    Args:
        path: A checkpoint folder with its manifest.
        expect_digest: The base that a charter or variant names; None accepts any.
        device: Where the model runs.
        dtype: The compute type, float32 or bfloat16. The experts stay packed in either.

    Returns:
        The model. Logits equal those of transformers' dequantised model up to summation order (1e-6 in float32).

    Raises:
        CheckpointError: The folder is not the expected, complete base.
        ConfigError: The configuration needs a part that this version does not have.
    """
    return build(open_checkpoint(path, expect_digest), device=device, dtype=dtype)


def build(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> GptOssForCausalLM:
    """The model of an opened checkpoint; `load_base` says more."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"expected the compute type float32 or bfloat16, got {dtype}")
    config = _model_config(checkpoint.config)
    model = _on_meta(config, packed=checkpoint.manifest.quantisation == "mxfp4")
    state = checkpoint.tensors()
    _check_tensors(_expected(model, config), state)
    packed_bytes = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(_PACKED))
    state = {name: _placed(name, tensor, device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config).to(device)
    _refuse_meta(model)
    _LOG.info("loaded %s: %d bytes of packed experts, %d bytes in all", checkpoint.path, packed_bytes, _bytes_of(model))
    return model.requires_grad_(False).eval()


def _model_config(described: Mapping[str, Any]) -> GptOssConfig:
    """The transformers configuration, without its quantisation (ours is not a transformers quantiser)."""
    if described.get("model_type") != "gpt_oss":
        raise ConfigError(f"expected a model of type gpt_oss, got {described.get('model_type')!r}")
    config = gpt_oss_config(described)
    # The load-balancing loss couples the records of a batch: private training must never see it.
    config.output_router_logits = False
    config._experts_implementation = "grouped_mm"
    return config


def _on_meta(config: GptOssConfig, *, packed: bool) -> GptOssForCausalLM:
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
        if packed:
            for layer in model.model.layers:
                layer.mlp.experts = Mxfp4Experts(config)
    return model


def _expected(model: nn.Module, config: GptOssConfig) -> dict[str, torch.Tensor]:
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    return expected


def _check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Names, shapes and types of a checkpoint against the model it is for."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"the weights do not fit {len(expected)} expected tensors: missing {_some(missing)}, not expected "
            f"{_some(surplus)}; config and weights must come from one checkpoint"
        )
    for name, tensor in found.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise CheckpointError(f"{name}: expected the shape {tuple(want.shape)}, got {tuple(tensor.shape)}")
        if name.endswith(_PACKED) and tensor.dtype != torch.uint8:
            raise CheckpointError(f"{name}: expected uint8, got {tensor.dtype}")
        if not name.endswith(_PACKED) and tensor.dtype not in (torch.bfloat16, torch.float32):
            raise CheckpointError(f"{name}: expected bfloat16 or float32, got {tensor.dtype}")
        if name.endswith("_scales") and not bool(((tensor >= SMALLEST_SCALE) & (tensor <= LARGEST_SCALE)).all()):
            raise CheckpointError(
                f"{name}: expected scale bytes from {SMALLEST_SCALE} to {LARGEST_SCALE}, got others: "
                "no trained weight has them, the file is damaged"
            )


def _placed(name: str, tensor: torch.Tensor, device: str | torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device) if name.endswith(_PACKED) else tensor.to(device=device, dtype=dtype)


def _refuse_meta(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if left:
        raise CheckpointError(f"no values were loaded for {_some(left)}")


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
