"""How an adapter lies in a flat vector: which matrices it has, which of them train, and where each begins.

An adapter is a set of named fp32 matrices. Those that train are concatenated, in layout order and row-major, into
**the vector**: what is clipped, noised, coded, summed and named by digest (SHA-256 of its little-endian fp32 bytes).
Those that do not train are a function of a public seed and are never sent.

Three sets of matrices can be adapted by LoRA (Hu et al. 2021), each alone:

    attention        q, k, v and o of a layer: one pair (A, B) for each
    experts-shared   the experts' gate_up and down: one pair for each, shared by all experts of a layer
    experts          the same with a pair for every expert, as a stack

in all layers or in named ones. A comes from the seed. Either it stays there (FFA-LoRA, Sun et al. 2024,
arXiv:2403.12313: half the parameters, and no product of two noises) or it trains, too. B starts at zero. Names are
PEFT's; its files are read and written by `peft_folder.py`. numpy only: the coordinator has no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus_protocols.canonical import digest, digest_json
from foedus_protocols.errors import CheckpointError, ConfigError, UsageError

Vector = NDArray[np.float32]
Targets = Literal["attention", "experts-shared", "experts"]
Train = Literal["b", "both"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# PEFT nests one wrapper of the experts module in another: gate_up's is the inner one.
EXPERTS = {"gate_up_proj": "experts.base_layer", "down_proj": "experts"}

_MOST_LAYERS = 4096
_WIRE = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One matrix of an adapter, or one stack of them.

    Attributes:
        name: PEFT's name, as in ``adapter_model.safetensors``.
        shape: ``(R, in)`` for a lora_A, ``(out, R)`` for a lora_B. For experts a stack, ``(P, R, in)`` and
            ``(P, out, R)``: P is the number of experts, or 1 where they share the pair.
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
    """The matrices of an adapter, in the order that every party uses.

    Attributes:
        tensors: In layer order.
        num_experts: Of a layer, where the adapter is one of experts; else 0.
        layers: The adapted layers, where they are named; None for all of the base.
    """

    tensors: tuple[Tensor, ...]
    num_experts: int = 0
    layers: tuple[int, ...] | None = None

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
            **({"num_experts": self.num_experts} if self.num_experts else {}),
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


class _Pair(NamedTuple):
    """One adapted matrix of every layer: where PEFT hangs its pair, and its widths."""

    place: str
    fan_in: int
    fan_out: int


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """The layers of ``--layers 0,2``; None for all.

    Raises:
        UsageError: Not whole numbers, ascending, between commas.
    """
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", number) for number in numbers):
        raise UsageError(f"expected --layers as numbers between commas, such as 0,2, got {text!r}")
    layers = tuple(int(number) for number in numbers)
    if list(layers) != sorted(set(layers)):
        raise UsageError(f"expected --layers ascending, each once, got {text!r}")
    return layers


def adapter_layout(
    config: Mapping[str, Any],
    *,
    targets: str,
    rank: int,
    layers: Sequence[int] | None = None,
    train: str = "b",
) -> Layout:
    """The matrices of an adapter for a base.

    Args:
        config: A gpt-oss ``config.json``.
        targets: ``attention``, ``experts-shared`` or ``experts``.
        rank: R, the inner dimension of each pair.
        layers: Which layers, ascending; None for all.
        train: ``b``: every A stays as the seed gives it. ``both``: A trains from there.

    Returns:
        Tensors in layer order; within a layer q, k, v, o or gate_up, down; A before B.

    Raises:
        ConfigError: A field is missing or not a positive integer, the rank is not positive, a layer is not one of the
            base, the targets or what trains of them have another name, or there are more layers than any model has:
            the configuration may be somebody else's.
    """
    if rank < 1:
        raise ConfigError(f"expected a LoRA rank of at least 1, got {rank}")
    if train not in ("b", "both"):
        raise ConfigError(f"expected b or both to train, got {train!r}")
    count = _positive(config, "num_hidden_layers")
    if count > _MOST_LAYERS:
        raise ConfigError(f"expected at most {_MOST_LAYERS} layers in the base's config.json, got {count}")
    named = None if layers is None else _named(layers, count)
    hidden = _positive(config, "hidden_size")
    num_experts, stack = 0, 0
    if targets == "attention":
        pairs = _attention_pairs(config, hidden)
    elif targets in ("experts-shared", "experts"):
        inner = _positive(config, "intermediate_size")
        num_experts = _positive(config, "num_local_experts")
        stack = num_experts if targets == "experts" else 1
        widths = ((hidden, 2 * inner), (inner, hidden))  # (in, out) of gate_up, down
        pairs = tuple(_Pair(f"mlp.{place}", *width) for place, width in zip(EXPERTS.values(), widths, strict=True))
    else:
        raise ConfigError(f"expected the targets attention, experts-shared or experts, got {targets!r}")
    return _layout(pairs, named or tuple(range(count)), rank, stack, train == "both", num_experts, named)


def fixed_tensors(layout: Layout, seed: str) -> dict[str, Vector]:
    """The matrices that do not train, the same bits on every machine.

    Entry ``(2u - 1) / sqrt(in)`` with u a 24-bit integer over 2^24, little-endian from SHAKE-256 of ``seed|name``:
    PEFT's distribution for lora_A. Every step is exact or correctly rounded in fp32.
    """
    return {tensor.name: _seeded_matrix(tensor, seed) for tensor in layout.fixed()}


def initial_vector(layout: Layout, seed: str) -> Vector:
    """Where every run starts: each trained B zero, so that the adapter changes nothing; a trained A from the seed.

    Returns:
        float32 (d,), made anew by each call.
    """
    vector = np.zeros(layout.length, dtype=np.float32)
    for tensor in layout.trained():
        if is_lora_a(tensor):
            vector[tensor.offset : tensor.offset + tensor.size] = _seeded_matrix(tensor, seed).reshape(-1)
    return vector


def is_lora_a(tensor: Tensor) -> bool:
    """Whether a tensor is the factor that meets the input."""
    return ".lora_A." in tensor.name


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
        check_matrix(tensor.name, tensor.shape, tensors.get(tensor.name))
        vector[tensor.offset : tensor.offset + tensor.size] = tensors[tensor.name].reshape(-1)
    return vector


@lru_cache(maxsize=16)  # Asked before each round, and a hash of 100 MB.
def initial_digest(layout: Layout, seed: str) -> str:
    """The digest of `initial_vector`."""
    return vector_digest(initial_vector(layout, seed))


def vector_bytes(vector: Vector) -> bytes:
    """The adapter file of a vector: raw little-endian fp32."""
    return np.ascontiguousarray(vector, dtype=_WIRE).tobytes()


def vector_digest(vector: Vector) -> str:
    """The adapter digest: SHA-256 of `vector_bytes`."""
    return digest(vector_bytes(vector))


def check_matrix(name: str, shape: tuple[int, ...], matrix: Vector | None) -> None:
    """Check that a matrix is there, of a shape and in fp32.

    Raises:
        CheckpointError: It is not.
    """
    if matrix is None:
        raise CheckpointError(f"expected the tensor {name}, found none of that name")
    if matrix.dtype != np.float32 or matrix.shape != shape:
        raise CheckpointError(
            f"expected {name} as float32 of shape {shape}, got {matrix.dtype} of shape {matrix.shape}"
        )


@lru_cache(maxsize=16)  # Asked for before each round, and so is the digest that the layout then keeps.
def _layout(
    pairs: tuple[_Pair, ...],
    layers: tuple[int, ...],
    rank: int,
    stack: int,
    both: bool,
    num_experts: int,
    named: tuple[int, ...] | None,
) -> Layout:
    return Layout(
        tensors=tuple(_tensors(pairs, layers, rank, (stack,) if stack else (), both)),
        num_experts=num_experts,
        layers=named,
    )


def _tensors(
    pairs: tuple[_Pair, ...], layers: tuple[int, ...], rank: int, stack: tuple[int, ...], both: bool
) -> Iterator[Tensor]:
    offsets = {True: 0, False: 0}
    for layer in layers:
        for pair in pairs:
            for factor, shape in (("lora_A", (rank, pair.fan_in)), ("lora_B", (pair.fan_out, rank))):
                trained = both or factor == "lora_B"
                name = f"base_model.model.model.layers.{layer}.{pair.place}.{factor}.weight"
                tensor = Tensor(name=name, shape=(*stack, *shape), offset=offsets[trained], trained=trained)
                offsets[trained] += tensor.size
                yield tensor


def _attention_pairs(config: Mapping[str, Any], hidden: int) -> tuple[_Pair, ...]:
    heads = _positive(config, "num_attention_heads")
    head_dim = _positive(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    inner = heads * head_dim
    key_value = _positive(config, "num_key_value_heads") * head_dim
    widths = ((hidden, inner), (hidden, key_value), (hidden, key_value), (inner, hidden))  # (in, out) of q, k, v, o
    return tuple(_Pair(f"self_attn.{target}", *width) for target, width in zip(ATTENTION, widths, strict=True))


def _named(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """The named layers of a base that has `count`."""
    named = tuple(layers)
    if not named or list(named) != sorted(set(named)) or not 0 <= named[0] <= named[-1] < count:
        shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
        raise ConfigError(
            f"expected the adapted layers ascending, each once, from 0 to {count - 1} for this base, got [{shown}]"
        )
    return named


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
