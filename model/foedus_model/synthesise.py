"""Random weights at the true shape of a model: for measuring speed and memory where the trained ones are not at hand.

NOT a trained model. Every code of every block is equally likely and scale bytes are 117 to 123, the range of trained
gpt-oss experts; norms are ones, everything else is Gaussian. Speed depends on the shape, but routing by random weights
is more even than by trained ones, which flatters kernels by up to 1.7 times: give a bench a measured histogram.

Each tensor follows from the seed and its name alone, so that a model of fewer layers is the beginning of a larger one,
and is made when its turn to be written comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foedus_protocols.errors import CheckpointError, UsageError
from foedus_protocols.manifest import quantisation_of
from foedus_protocols.progress import byte_progress

from foedus_model.build import specs_of
from foedus_model.checkpoint import write_streamed
from foedus_model.presets import preset
from foedus_model.shards import SHARD_BYTES, TensorSpec

PROVENANCE = "synthetic: random weights at the true shape, NOT a trained model"

_SPREAD = 0.02
_SCALES = (117, 124)  # From, to before.
_ROWS_AT_ONCE = 1 << 22  # Values that are drawn at a time: 16 MiB of float32.


def shaped(
    name: str, *, layers: int | None = None, experts: int | None = None, vocabulary: int | None = None
) -> dict[str, Any]:
    """The configuration of a preset, cut down where asked: a layer keeps its true shape with fewer of them.

    Raises:
        ConfigError: No preset has this name.
        UsageError: More than the preset has, or less than one can run.
    """
    config = preset(name)
    asked = {"num_hidden_layers": layers, "num_local_experts": experts, "vocab_size": vocabulary}
    least = {"num_local_experts": config["num_experts_per_tok"]}
    for field, value in asked.items():
        if value is None:
            continue
        lowest = least.get(field, 1)
        if not lowest <= value <= config[field]:
            raise UsageError(
                f"expected {field} of the preset {name} to be cut to {lowest} to {config[field]}, got {value}"
            )
        config[field] = value
    config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(token) is not None and config[token] >= config["vocab_size"]:
            config[token] = None
    return config


def synthesise(
    path: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    layout: str = "released",
    shard_bytes: int = SHARD_BYTES,
    tokenizer_file: Path | None = None,
) -> str:
    """Write random weights for a configuration with MXFP4 experts, one tensor in memory at a time.

    Args:
        path: A folder that does not exist yet, or is empty.
        config: The ``config.json``.
        seed: Makes the weights repeatable.
        layout: ``released``, or ``original`` for OpenAI's names.
        shard_bytes: The most that a file holds.
        tokenizer_file: A ``tokenizer.json`` to copy, of no more tokens than the configuration has; or None.

    Returns:
        The base's digest.

    Raises:
        CheckpointError: The folder is not empty, the experts are not in MXFP4, or the layout cannot hold this model.
    """
    if quantisation_of(config) != "mxfp4":
        raise CheckpointError(f"expected experts in mxfp4 to make random ones, got {quantisation_of(config)!r}")
    specs = specs_of(config)
    total = sum(spec.nbytes for spec in specs.values())
    with byte_progress(f"writing {path.name}", total) as advance:

        def make(name: str) -> torch.Tensor:
            tensor = random_tensor(name, specs[name], seed)
            advance(tensor.nbytes)
            return tensor

        return write_streamed(
            path,
            config=config,
            specs=specs,
            make=make,
            tokenizer_file=tokenizer_file,
            provenance={"made": PROVENANCE, "seed": seed},
            shard_bytes=shard_bytes,
            layout=layout,
        )


def random_tensor(name: str, spec: TensorSpec, seed: int) -> torch.Tensor:
    """One tensor of `synthesise`, from the seed and its name."""
    state = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(np.frombuffer(state, dtype=np.uint32)))
    if name.endswith("norm.weight"):
        return torch.ones(spec.shape, dtype=spec.dtype)
    if spec.dtype == torch.uint8:
        low, high = _SCALES if name.endswith("_scales") else (0, 256)
        return torch.from_numpy(generator.integers(low, high, size=spec.shape, dtype=np.uint8))
    values = torch.empty(spec.shape, dtype=spec.dtype)
    flat = values.view(-1)
    for start in range(0, flat.numel(), _ROWS_AT_ONCE):
        piece = flat[start : start + _ROWS_AT_ONCE]
        piece.copy_(torch.from_numpy(generator.standard_normal(piece.numel(), dtype=np.float32)).mul_(_SPREAD))
    return values
