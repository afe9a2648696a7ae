"""A checkpoint -> a frozen transformers `GptOssForCausalLM` whose quantised weights stay as they are stored.

The model is built without memory (`meta`), the modules that hold quantised weights are swapped, and the memory-mapped
tensors are assigned: the codes are never copied on a CPU, let alone decoded. Everything else is converted to the
compute type. Missing, unexpected or misshapen tensors are errors; RoPE's buffers, which no checkpoint holds, are
computed again.

What a quantisation stores, its modules say (`experts.py`, `linear.py`): every buffer of theirs that is not a bias is
taken from the file as it is, in the type that the empty buffer has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_kernels.mxfp4 import LARGEST_SCALE, SMALLEST_SCALE
from foedus_protocols.errors import CheckpointError, ConfigError, FoedusError
from foedus_protocols.manifest import base_files, layout_of, quantisation_of, read_config, verify_config
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from foedus_model.attention import gpt_oss_config
from foedus_model.checkpoint import Checkpoint, Contents, open_checkpoint, read_contents
from foedus_model.experts import QuantisedExperts, gate_of
from foedus_model.linear import quantise_linears
from foedus_model.memory import needs_of, require_memory
from foedus_model.parts import bytes_by_part, in_units, type_name
from foedus_model.shards import TensorSpec

_LOG = logging.getLogger(__name__)

_SIZES = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "vocab_size": 1 << 28,
}
"""The most of each that a base may have: far above any model, and refused before memory runs out."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A base model, and what was loaded.

    Attributes:
        model: Frozen, in evaluation mode.
        checkpoint: Where it came from.
        bytes: What each part takes in memory or in mapped files, by the names of `parts.PARTS`.
    """

    model: GptOssForCausalLM
    checkpoint: Checkpoint
    bytes: Mapping[str, int]


def load_base(
    path: Path,
    *,
    expect_digest: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> GptOssForCausalLM:
    """Load a base model, frozen and in evaluation mode.

    Args:
        path: A checkpoint folder with its manifest, in the released layout or OpenAI's.
        expect_digest: The base that a charter or variant names; None accepts any.
        device: Where the model runs.
        dtype: The compute type, float32 or bfloat16. What is quantised stays so in either.
        stream: Leave the quantised experts in their files, wherever the model runs: `streaming.stream_experts` has to
            be called before the model is.

    Returns:
        The model. Logits equal those of transformers' dequantised model up to summation order (1e-6 in float32).

    Raises:
        CheckpointError: The folder is not the expected, complete base, or the machine has too little memory for it.
        ConfigError: The configuration needs a part that this version does not have.
    """
    return load(path, expect_digest=expect_digest, device=device, dtype=dtype, stream=stream).model


def load(
    path: Path,
    *,
    expect_digest: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> Loaded:
    """Load a base model and say what was loaded; `load_base` says more.

    Memory is asked for before the weights are digested: the answer is known from the configuration alone.
    """
    manifest = verify_config(path, expect_digest)
    config = _model_config(read_config(path))
    model = _on_meta(config, manifest.quantisation)
    expected, left = _expected(model, config), _experts(model) if stream else frozenset()
    resident = {name: tensor for name, tensor in expected.items() if name not in left}
    needs = needs_of(resident, _stored(model), device=device, dtype=_compute(dtype))
    require_memory(needs, path=path, device=device)
    return _filled(open_checkpoint(path, expect_digest), config, model, device=device, dtype=dtype, left=left)


def build(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> GptOssForCausalLM:
    """The model of an opened checkpoint; `load_base` says more."""
    config = _model_config(checkpoint.config)
    model = _on_meta(config, checkpoint.manifest.quantisation)
    left = _experts(model) if stream else frozenset()
    return _filled(checkpoint, config, model, device=device, dtype=_compute(dtype), left=left).model


def specs_of(described: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Type and shape of every tensor that a release of this configuration holds, in the model's order.

    Args:
        described: The ``config.json``; what its quantisation does not store is in bfloat16.

    Raises:
        ConfigError: It needs a part that this version does not have.
        CheckpointError: An unknown quantisation, or a width that it cannot store.
    """
    config = _model_config(described)
    model = _on_meta(config, quantisation_of(described))
    stored = _stored(model)
    return {
        name: TensorSpec(tensor.dtype if name in stored else torch.bfloat16, tuple(tensor.shape))
        for name, tensor in _expected(model, config).items()
    }


def empty_model(described: Mapping[str, Any], dtype: torch.dtype) -> GptOssForCausalLM:
    """The model of a configuration on the meta device, frozen: shapes without values.

    Raises:
        ConfigError: It needs a part that this version does not have.
        CheckpointError: An unknown quantisation, or a width that it cannot store.
    """
    model = _on_meta(_model_config(described), quantisation_of(described))
    return model.to(_compute(dtype)).requires_grad_(False).eval()


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the names, shapes and types in a checkpoint's files with what its configuration asks for.

    Raises:
        ConfigError: It needs a part that this version does not have.
        CheckpointError: A tensor too few or too many, or of another shape or type.
    """
    _check_fit(checkpoint.config, checkpoint.contents)


def check_folder(path: Path) -> None:
    """`check_tensors` of a folder that has no manifest yet; only headers are read.

    Raises:
        ConfigError: As `check_tensors`.
        CheckpointError: As `check_tensors`; or the folder is not complete, or a file is not valid safetensors.
    """
    weight_files = [name for name in base_files(path) if name.endswith(".safetensors")]
    described = read_config(path)
    _check_fit(described, read_contents(path, weight_files, described, layout_of(path)))


def _check_fit(described: Mapping[str, Any], contents: Contents) -> None:
    config = _model_config(described)
    model = _on_meta(config, quantisation_of(described))
    _check_specs(_expected(model, config), contents.specs, _stored(model))


def _filled(
    checkpoint: Checkpoint,
    config: GptOssConfig,
    model: GptOssForCausalLM,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    left: frozenset[str] = frozenset(),
) -> Loaded:
    """Give an empty model the tensors of its checkpoint; those that are `left` stay in the files."""
    stored = _stored(model)
    _check_specs(_expected(model, config), checkpoint.contents.specs, stored)
    found = checkpoint.tensors()
    _check_scales(found, stored)
    state = {
        name: tensor.to("cpu" if name in left else device) if name in stored else tensor.to(device=device, dtype=dtype)
        for name, tensor in found.items()
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config).to(device)
    _refuse_meta(model)
    loaded = bytes_by_part(state.items())
    _LOG.info(
        "loaded %s (%s, %s) on %s in %s: %s; %d tensors, none missing, none left over",
        checkpoint.path,
        checkpoint.layout,
        checkpoint.manifest.quantisation,
        device,
        type_name(dtype),
        ", ".join(f"{part} {in_units(count)}" for part, count in loaded.items()),
        len(state),
    )
    return Loaded(model=model.requires_grad_(False).eval(), checkpoint=checkpoint, bytes=loaded)


def _compute(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"expected the compute type float32 or bfloat16, got {dtype}")
    return dtype


def _model_config(described: Mapping[str, Any]) -> GptOssConfig:
    """The transformers configuration, without its quantisation (ours is not a transformers quantiser)."""
    if described.get("model_type") != "gpt_oss":
        raise ConfigError(f"expected a model of type gpt_oss, got {described.get('model_type')!r}")
    _require_shape(described)
    try:
        config = gpt_oss_config(described)
        gate_of(config)
    except FoedusError:
        raise
    except Exception as error:  # transformers checks a configuration in many ways of its own.
        raise ConfigError(f"expected a gpt-oss configuration, got one that cannot be: {_first_line(error)}") from error
    # The load-balancing loss couples the records of a batch: private training must never see it.
    config.output_router_logits = False
    config._experts_implementation = "grouped_mm"
    return config


def _require_shape(described: Mapping[str, Any]) -> None:
    """Check the sizes of a configuration, which may be somebody else's, before a model is built from them."""
    for name, most in _SIZES.items():
        value = described.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigError(f"expected {name} from 1 to {most} in the base's config.json, got {_shown(value)}")
    if described["num_experts_per_tok"] > described["num_local_experts"]:
        raise ConfigError(
            f"expected at most {described['num_local_experts']} experts a token in the base's config.json, got "
            f"{described['num_experts_per_tok']}"
        )
    if described["num_attention_heads"] % described["num_key_value_heads"]:
        raise ConfigError(
            f"expected query heads in groups of {described['num_key_value_heads']}, got "
            f"{described['num_attention_heads']}: num_attention_heads and num_key_value_heads do not fit"
        )
    types, layers = described.get("layer_types"), described["num_hidden_layers"]
    if types is not None and (not isinstance(types, list) or not all(isinstance(one, str) for one in types)):
        raise ConfigError("expected layer_types in the base's config.json to be a list of names, got something else")
    if types is not None and len(types) != layers:
        raise ConfigError(f"expected {layers} layer_types in the base's config.json, got {len(types)}")


def _shown(value: object) -> str:
    return repr(value)[:40]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _on_meta(config: GptOssConfig, quantisation: str) -> GptOssForCausalLM:
    """The model without memory, with the modules of a quantisation in place."""
    with torch.device("meta"):
        try:
            model = GptOssForCausalLM(config)
        except (RuntimeError, AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"expected a gpt-oss configuration, got one of which no model can be built: {_first_line(error)}"
            ) from error
        if quantisation != "dense":
            for layer in model.model.layers:
                layer.mlp.experts = QuantisedExperts(config, quantisation)
        quantise_linears(model, quantisation)
    return model


def _expected(model: nn.Module, config: GptOssConfig) -> dict[str, torch.Tensor]:
    """What the checkpoint has to hold; a tied head is the embedding again."""
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    return expected


def _stored(model: nn.Module) -> frozenset[str]:
    """The tensors that stay as the file has them: buffers, but for biases."""
    return frozenset(name for name, _ in model.named_buffers() if not name.endswith("bias"))


def _experts(model: nn.Module) -> frozenset[str]:
    """The tensors of the quantised experts that stay as the file has them: what can stream."""
    return frozenset(name for name in _stored(model) if ".mlp.experts." in name)


def _check_specs(expected: Mapping[str, torch.Tensor], found: Mapping[str, TensorSpec], stored: frozenset[str]) -> None:
    """Names, shapes and types of a checkpoint against the model it is for."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"the weights do not fit {len(expected)} expected tensors: missing {_some(missing)}, not expected "
            f"{_some(surplus)}; config and weights must come from one checkpoint"
        )
    for name, spec in found.items():
        want = expected[name]
        if spec.shape != want.shape:
            raise CheckpointError(f"{name}: expected the shape {tuple(want.shape)}, got {spec.shape}")
        if name in stored and spec.dtype != want.dtype:
            raise CheckpointError(f"{name}: expected {type_name(want.dtype)}, got {spec.dtype}")
        if name not in stored and spec.dtype not in (torch.bfloat16, torch.float32):
            raise CheckpointError(f"{name}: expected bfloat16 or float32, got {spec.dtype}")


def _check_scales(found: Mapping[str, torch.Tensor], stored: frozenset[str]) -> None:
    """Refuse scales that no rounding of finite weights gives: one of them would poison every later value."""
    for name in sorted(name for name in stored if name.endswith("_scales")):
        scales = found[name]
        if scales.is_floating_point():
            if not bool(torch.isfinite(scales).all()):
                raise CheckpointError(f"{name}: expected finite scales, got others: the file is damaged")
        elif not SMALLEST_SCALE <= int(scales.min()) <= int(scales.max()) <= LARGEST_SCALE:
            raise CheckpointError(
                f"{name}: expected scale bytes from {SMALLEST_SCALE} to {LARGEST_SCALE}, got others: "
                "no trained weight has them, the file is damaged"
            )


def _refuse_meta(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if left:
        raise CheckpointError(f"no values were loaded for {_some(left)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
