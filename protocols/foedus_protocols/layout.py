"""How an adapter lies in a flat vector, in a file, and in PEFT's folder.

An adapter is a set of named fp32 matrices. Those that train are concatenated, in layout order and row-major, into
**the vector**: what is clipped, noised, coded, summed and named by digest (SHA-256 of its little-endian fp32 bytes).
Those that do not train are a function of a public seed and are never sent.

The one layout of this version is LoRA on the attention projections with every A frozen (FFA-LoRA, Sun et al. 2024,
arXiv:2403.12313): A comes from the seed, B starts at zero and trains. Names and folder are PEFT's. numpy only: the
coordinator has no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from foedus_protocols.canonical import digest, digest_json
from foedus_protocols.errors import CheckpointError, ConfigError

Vector = NDArray[np.float32]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

_MOST_LAYERS = 4096
_WIRE = np.dtype("<f4")

# Switches of PEFT's LoRA that change what the matrices mean; an adapter that sets one is refused, not misread.
_PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # Others change the base, too.
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "use_dora": (False, None),
    "use_rslora": (False, None),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One matrix of an adapter.

    Attributes:
        name: PEFT's name, as in ``adapter_model.safetensors``.
        shape: ``(R, in)`` for a lora_A, ``(out, R)`` for a lora_B.
        offset: First element in the trained vector if trained, else in the concatenation of the fixed tensors.
        trained: Whether it is part of the vector.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    trained: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The matrices of an adapter, in the order that every party uses."""

    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ConfigError("expected distinct tensor names in a layout, got one twice")
        for group in (self.trained(), self.fixed()):
            end = 0
            for tensor in group:
                if tensor.offset != end:
                    raise ConfigError(f"expected {tensor.name} at offset {end}, got {tensor.offset}")
                end += tensor.size

    @property
    def length(self) -> int:
        """Number of trained coordinates (d)."""
        return sum(tensor.size for tensor in self.trained())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical description."""
        return digest_json(self.describe())

    def trained(self) -> tuple[Tensor, ...]:
        """The tensors of the vector."""
        return tuple(tensor for tensor in self.tensors if tensor.trained)

    def fixed(self) -> tuple[Tensor, ...]:
        """The tensors that follow from the seed."""
        return tuple(tensor for tensor in self.tensors if not tensor.trained)

    def describe(self) -> dict[str, Any]:
        """The layout as JSON."""
        return {
            "dtype": "float32",
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "offset": tensor.offset,
                    "kind": "trained" if tensor.trained else "fixed",
                }
                for tensor in self.tensors
            ],
        }


def attention_layout(config: Mapping[str, Any], *, rank: int) -> Layout:
    """LoRA on q, k, v and o of every layer; lora_A fixed, lora_B trained.

    Args:
        config: A gpt-oss ``config.json``.
        rank: R, the inner dimension.

    Returns:
        Tensors in layer order; within a layer q, k, v, o; A before B.

    Raises:
        ConfigError: A field is missing or not a positive integer, the rank is not positive, or there are more layers
            than any model has: the configuration may be somebody else's.
    """
    if rank < 1:
        raise ConfigError(f"expected a LoRA rank of at least 1, got {rank}")
    hidden = _positive(config, "hidden_size")
    heads = _positive(config, "num_attention_heads")
    head_dim = _positive(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    inner = heads * head_dim
    key_value = _positive(config, "num_key_value_heads") * head_dim
    widths = ((hidden, inner), (hidden, key_value), (hidden, key_value), (inner, hidden))  # (in, out) of q, k, v, o
    layers = _positive(config, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ConfigError(f"expected at most {_MOST_LAYERS} layers in the base's config.json, got {layers}")
    return _attention_layout(widths, layers, rank)


@lru_cache(maxsize=16)  # Asked for before each round, and so is the digest that the layout then keeps.
def _attention_layout(widths: tuple[tuple[int, int], ...], layers: int, rank: int) -> Layout:
    tensors: list[Tensor] = []
    offsets = {True: 0, False: 0}
    for layer in range(layers):
        for target, (fan_in, fan_out) in zip(TARGETS, widths, strict=True):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for factor, shape in (("lora_A", (rank, fan_in)), ("lora_B", (fan_out, rank))):
                trained = factor == "lora_B"
                name = f"{prefix}.{factor}.weight"
                tensors.append(Tensor(name=name, shape=shape, offset=offsets[trained], trained=trained))
                offsets[trained] += tensors[-1].size
    return Layout(tensors=tuple(tensors))


def fixed_tensors(layout: Layout, seed: str) -> dict[str, Vector]:
    """The matrices that do not train, the same bits on every machine.

    Entry ``(2u - 1) / sqrt(in)`` with u a 24-bit integer over 2^24, little-endian from SHAKE-256 of ``seed|name``:
    PEFT's distribution for lora_A. Every step is exact or correctly rounded in fp32.
    """
    return {tensor.name: _seeded_matrix(tensor, seed) for tensor in layout.fixed()}


def initial_vector(layout: Layout) -> Vector:
    """Where every run starts: all trained matrices zero, so that the adapter changes nothing.  # (d,)"""
    return np.zeros(layout.length, dtype=np.float32)


def unflatten(layout: Layout, vector: Vector) -> dict[str, Vector]:
    """The trained matrices as views of the vector.

    Raises:
        CheckpointError: The vector is not fp32 of the layout's length.
    """
    _check_vector(layout.length, vector)
    return {
        tensor.name: vector[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        for tensor in layout.trained()
    }


def flatten(layout: Layout, tensors: Mapping[str, Vector]) -> Vector:
    """The vector of a set of matrices; what the layout does not train is ignored.

    Raises:
        CheckpointError: A trained matrix is missing, of another shape, or not fp32.
    """
    vector = np.empty(layout.length, dtype=np.float32)  # (d,)
    for tensor in layout.trained():
        _check_matrix(tensor, tensors.get(tensor.name))
        vector[tensor.offset : tensor.offset + tensor.size] = tensors[tensor.name].reshape(-1)
    return vector


@lru_cache(maxsize=16)  # Asked before each round, and a hash of 100 MB of zeros.
def initial_digest(layout: Layout) -> str:
    """The digest of `initial_vector`."""
    return vector_digest(initial_vector(layout))


def vector_bytes(vector: Vector) -> bytes:
    """The adapter file of a vector: raw little-endian fp32."""
    return np.ascontiguousarray(vector, dtype=_WIRE).tobytes()


def vector_digest(vector: Vector) -> str:
    """The adapter digest: SHA-256 of `vector_bytes`."""
    return digest(vector_bytes(vector))


def vector_from_bytes(data: bytes, *, length: int) -> Vector:
    """Read an adapter file.

    Raises:
        CheckpointError: The file has another length.
    """
    if len(data) != 4 * length:
        raise CheckpointError(f"expected an adapter file of {4 * length} bytes ({length} fp32), got {len(data)}")
    return np.frombuffer(data, dtype=_WIRE).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A PEFT LoRA folder that fits a layout.

    Attributes:
        rank: R.
        alpha: Numerator of the scale alpha / R.
        base_name: What the adapter's config calls its base; informative only.
        vector: The trained matrices.  # (d,)
        fixed: The matrices that did not train, as stored.
    """

    rank: int
    alpha: float
    base_name: str
    vector: Vector
    fixed: dict[str, Vector]


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What a folder's ``adapter_config.json`` says; with it and the base's config the layout follows."""

    rank: int
    alpha: float
    base_name: str


def write_peft(
    folder: Path, *, layout: Layout, vector: Vector, seed: str, rank: int, alpha: float, base_name: str
) -> None:
    """Write an adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: Made if absent; files of these names are replaced.
        layout: Where the matrices are in the vector.
        vector: The trained matrices.  # (d,)
        seed: Of the fixed matrices, which are written out so that PEFT needs nothing else.
        rank: R; must be the layout's.
        alpha: Numerator of the scale alpha / R.
        base_name: Shown as ``base_model_name_or_path``.

    Raises:
        CheckpointError: The vector or the rank does not fit the layout.
    """
    _check_rank(layout, rank)
    tensors = {**fixed_tensors(layout, seed), **unflatten(layout, vector)}
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(TARGETS),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(
        {name: np.ascontiguousarray(matrix) for name, matrix in tensors.items()},
        folder / ADAPTER_FILE,
        metadata={"format": "pt"},
    )


def read_peft_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: Missing, not JSON, not plain LoRA on q, k, v, o, or with a switch that changes its meaning.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"expected {path}, found no such file: is this a variant folder?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON in {path}, got text that is not") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"expected peft_type LORA in {path}, got another kind of adapter")
    for switch, plain in _PLAIN_LORA.items():
        if switch in config and config[switch] not in plain:
            raise CheckpointError(f"expected plain LoRA in {path}, got {switch} = {config[switch]!r}")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or sorted(map(str, targets)) != sorted(TARGETS):
        raise CheckpointError(f"expected target_modules {', '.join(TARGETS)} in {path}, got {targets!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not math.isfinite(alpha):
        raise CheckpointError(f"expected a rank and an alpha in {path}, got r = {rank!r}, lora_alpha = {alpha!r}")
    return PeftConfig(rank=rank, alpha=float(alpha), base_name=str(config.get("base_model_name_or_path") or ""))


def read_peft(folder: Path, layout: Layout) -> PeftAdapter:
    """Read a PEFT folder whose matrices are exactly those of a layout. Pickled weights are never opened.

    Raises:
        CheckpointError: A file is missing or malformed, or matrices are missing, left over, misshapen or not fp32.
    """
    config = read_peft_config(folder)
    _check_rank(layout, config.rank)
    path = folder / ADAPTER_FILE
    if not path.is_file():
        pickled = next((item.name for item in sorted(folder.iterdir()) if item.suffix in {".bin", ".pt", ".pth"}), None)
        found = f"found the pickle {pickled}, which is never opened" if pickled else "found no such file"
        raise CheckpointError(f"expected {path}, {found}: export the adapter as safetensors")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise CheckpointError(f"expected safetensors of fp32 in {path}, got a truncated or foreign file") from error
    surplus = sorted(tensors.keys() - {tensor.name for tensor in layout.tensors})
    if surplus:
        raise CheckpointError(f"expected only the layout's tensors in {path}, got {surplus[0]} too")
    for tensor in layout.fixed():
        _check_matrix(tensor, tensors.get(tensor.name))
    return PeftAdapter(
        rank=config.rank,
        alpha=config.alpha,
        base_name=config.base_name,
        vector=flatten(layout, tensors),
        fixed={tensor.name: tensors[tensor.name] for tensor in layout.fixed()},
    )


def _positive(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"expected {field} in the base's config.json to be a positive integer, got {value!r}")
    return value


def _seeded_matrix(tensor: Tensor, seed: str) -> Vector:
    stream = hashlib.shake_256(f"{seed}|{tensor.name}".encode()).digest(3 * tensor.size)
    digits = np.frombuffer(stream, dtype=np.uint8).reshape(-1, 3).astype(np.int32)
    u = digits[:, 0] | digits[:, 1] << 8 | digits[:, 2] << 16  # (R * in,)
    # 2u / 2^24 - 1 = (u - 2^23) / 2^23 is exact in fp32; the division below is the only rounding beside the root's.
    centred = (u - (1 << 23)).astype(np.float32) / np.float32(1 << 23)
    return (centred / np.sqrt(np.float32(tensor.shape[-1]))).reshape(tensor.shape)


def _check_vector(length: int, vector: Vector) -> None:
    if vector.dtype != np.float32 or vector.shape != (length,):
        raise CheckpointError(f"expected a float32 vector of {length}, got {vector.dtype} of shape {vector.shape}")


def _check_matrix(tensor: Tensor, matrix: Vector | None) -> None:
    if matrix is None:
        raise CheckpointError(f"expected the tensor {tensor.name}, found none of that name")
    if matrix.dtype != np.float32 or matrix.shape != tensor.shape:
        raise CheckpointError(
            f"expected {tensor.name} as float32 of shape {tensor.shape}, got {matrix.dtype} of shape {matrix.shape}"
        )


def _check_rank(layout: Layout, rank: int) -> None:
    inner = {tensor.shape[0 if ".lora_A." in tensor.name else -1] for tensor in layout.tensors}
    if inner != {rank}:
        raise CheckpointError(f"expected rank {rank} throughout the layout, got {sorted(inner)}")
