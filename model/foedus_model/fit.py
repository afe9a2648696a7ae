"""Whether a training step of one unit fits a memory: its bytes by part, plain and with each remedy.

The step itself is traced: the model is built without memory (`meta`) at its true shape, the real forward, loss and
backward run over it, and every tensor is counted from its making to its end. So the figures follow the code (attention
function, checkpointing, what autograd keeps) and no formula has to. Three things that live inside operators are
added by arithmetic (`_inner`): the rows that the experts' sort, decoded matrices, and some rows' logits of the loss.

Left out: what an allocator loses between blocks, and optimisers (a round's is the coordinator's). `DRIVER` is assumed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from foedus_kernels.cross_entropy import CHUNK_ELEMENTS
from foedus_kernels.grouped import DECODE_BYTES, DECODE_BYTES_CUDA
from foedus_protocols.errors import UsageError
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import quantisation_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foedus_model.adapter import attach
from foedus_model.attention import fuse_attention
from foedus_model.build import empty_model, specs_of
from foedus_model.loss import losses_at
from foedus_model.parts import by_part
from foedus_model.quantize import quantised_config
from foedus_model.recompute import recompute_layers
from foedus_model.stream_plan import Load
from foedus_model.streaming import planned

DRIVER = 512 << 20
"""Bytes of a GPU that its driver and libraries take before a tensor is made: assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A way to run the step.

    Attributes:
        name: What is done.
        bytes: The step's peak.
        fits: Whether that is within the limit; None without one.
    """

    name: str
    bytes: int
    fits: bool | None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The bytes of a training step.

    Attributes:
        weights: Of the base by part, as they stay in memory.
        adapter: The adapter's matrices and their gradients.
        activations: The peak of everything that the step makes but the gradients, decoded matrices among it.
        fused: The same with fused attention.
        checkpointed: The same with fused attention and layers that are computed again.
        kept: The layers' inputs that checkpointing keeps; offload holds all but one on the host.
        driver: `DRIVER` with a GPU, else 0.
        remedies: Plain first; each adds to the one before. Streaming is not among them where the base is dense or each
            expert has an adapter of its own.
        stream: A streamed pass of this one unit, or None.
    """

    weights: Mapping[str, int]
    adapter: int
    activations: int
    fused: int
    checkpointed: int
    kept: int
    driver: int
    remedies: tuple[Remedy, ...]
    stream: Load | None


def fit(
    described: Mapping[str, Any],
    *,
    tokens: int,
    answers: int | None = None,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    targets: str = "attention",
    rank: int = 16,
    layers: Sequence[int] | None = None,
    driver: int = DRIVER,
) -> Fit:
    """Trace a step of one unit of one record.

    Args:
        described: The ``config.json``.
        tokens: Tokens of the record, at least 2.
        answers: Tokens that have a loss, and so logits; None for all but the first.
        limit: Bytes that there are, or None.
        dtype: The compute type, float32 or bfloat16.
        targets: What the adapter trains, as `adapter_layout` takes it.
        rank: Of the adapter, A fixed.
        layers: Which of them it trains in; None for all.
        driver: Bytes that are gone before the first tensor.

    Raises:
        ConfigError: The configuration needs a part that this version does not have.
        UsageError: Fewer than 2 tokens, or more than the model takes; no answer, or more than there can be.
    """
    most = int(described["max_position_embeddings"])
    if not 2 <= tokens <= most:
        raise UsageError(f"expected 2 to {most} tokens, the model's longest text, got {tokens}")
    answers = tokens - 1 if answers is None else answers
    if not 1 <= answers < tokens:
        raise UsageError(f"expected 1 to {tokens - 1} answer tokens of {tokens}, got {answers}")
    stored = specs_of(described)
    weights = {part: entry.bytes for part, entry in by_part(stored).items()}
    if dtype != torch.bfloat16:
        converted = {name: spec for name, spec in stored.items() if spec.dtype == torch.bfloat16}
        for part, entry in by_part(converted).items():
            weights[part] += entry.bytes * (dtype.itemsize - 2) // 2
    decoded = _decoded(described, dtype, on_gpu=driver > 0)
    step = _Step(
        described=described,
        tokens=tokens,
        answers=answers,
        dtype=dtype,
        targets=targets,
        rank=rank,
        adapted=layers,
        decoded=decoded,
    )
    plain, adapter = step.trace(fused=False, checkpointing=False)
    fused, _ = step.trace(fused=True, checkpointing=False)
    again, _ = step.trace(fused=True, checkpointing=True)
    fixed = adapter + driver
    resident = sum(weights.values())
    inputs = tokens * int(described["hidden_size"]) * dtype.itemsize  # Of one layer.
    kept = int(described["num_hidden_layers"]) * inputs
    # Of what waits on the host, the input of the layer at work is on the device again.
    offloaded = again - kept + inputs
    layout = adapter_layout(described, targets=targets, rank=rank, layers=layers)
    stream = planned(described, layout, tokens=tokens, dtype=dtype)
    ways = [
        ("as it is", resident + fixed + plain),
        ("fused attention", resident + fixed + fused),
        ("fused attention, checkpointing", resident + fixed + again),
        ("the same, offload of the layers' inputs", resident + fixed + offloaded),
    ]
    if stream is not None:
        load, stays = stream
        ways.append(("the same, streaming of layers", stays + load.ring_bytes + fixed + offloaded))
    return Fit(
        weights=weights,
        adapter=adapter,
        activations=plain,
        fused=fused,
        checkpointed=again,
        kept=kept,
        driver=driver,
        remedies=tuple(
            Remedy(name=name, bytes=count, fits=None if limit is None else count <= limit) for name, count in ways
        ),
        stream=None if stream is None else stream[0],
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What is traced; the fields are `fit`'s, `adapted` its `layers`."""

    described: Mapping[str, Any]
    tokens: int
    answers: int
    dtype: torch.dtype
    targets: str
    rank: int
    adapted: Sequence[int] | None
    decoded: int

    def trace(self, *, fused: bool, checkpointing: bool) -> tuple[int, int]:
        """The peak of what a step makes but for the gradients, and the bytes of the adapter with its gradients.

        The experts' operators take any codec alike, so that one stands for all; dense linear layers stand for
        quantised ones.
        """
        model = empty_model(quantised_config(self.described, "mxfp4"), self.dtype)
        layout = adapter_layout(self.described, targets=self.targets, rank=self.rank, layers=self.adapted)
        with torch.device("meta"):
            adapted = attach(model, layout, seed="0" * 64, alpha=self.rank, rank=self.rank)
        if fused:
            fuse_attention(model)
        if checkpointing:
            recompute_layers(model)
        factors = [one for name, one in model.named_parameters() if "lora" in name]
        adapter = sum(one.nbytes for one in factors) + sum(one.nbytes for one in adapted.trained)
        ids = torch.zeros(1, self.tokens, dtype=torch.int64, device="meta")
        with _Count(self.decoded) as count:
            places = torch.arange(self.tokens - 1 - self.answers, self.tokens - 1, device="meta")  # (answers,)
            losses = losses_at(model, ids, torch.zeros_like(places), places)
            gradients = torch.autograd.grad(losses.sum(), adapted.trained)
        return count.peak - sum(one.nbytes for one in gradients), adapter


def _decoded(described: Mapping[str, Any], dtype: torch.dtype, *, on_gpu: bool) -> int:
    """Decoded matrices at one time: the kernels' working set, or one matrix where that is larger."""
    if quantisation_of(described) == "dense":
        return 0
    matrix = 2 * int(described["intermediate_size"]) * int(described["hidden_size"]) * dtype.itemsize
    return max(DECODE_BYTES_CUDA if on_gpu else DECODE_BYTES, matrix)


class _Count(TorchDispatchMode):
    """Counts the bytes of storages made inside it, and their peak."""

    def __init__(self, decoded: int) -> None:
        super().__init__()
        self._decoded = decoded
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._seen:
                continue
            self._seen.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now + _inner(func, args, self._decoded))
        return out

    def _gone(self, key: int, count: int) -> None:
        self._seen.discard(key)
        self.now -= count


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _inner(func: Any, args: Any, decoded: int) -> int:
    """Bytes that an operator makes and drops inside.

    The experts': decoded matrices, rows (S, K) and (S, N). The loss': logits of t rows and their softmax, (t, V) each.
    """
    name = func.name()
    if name == "foedus::cross_entropy_forward":
        hidden, words = args[0], args[1].shape[0]
        rows = min(hidden.shape[0], max(1, CHUNK_ELEMENTS // words))
        return 2 * rows * int(words) * max(hidden.element_size(), torch.float32.itemsize)
    if name == "foedus::experts_forward":
        hidden, ids, twice = args[0], args[2], args[5].shape[1]
    elif name == "foedus::experts_backward":
        hidden, ids, twice = args[2], args[4], args[1].shape[1]
    else:
        return 0
    wide, narrow = ids.numel() * hidden.shape[1], ids.numel() * twice // 2
    if name == "foedus::experts_forward":
        values = max(wide, 3 * narrow, narrow + wide, 2 * wide)
    else:
        values = max(wide + 6 * narrow, 2 * wide + 2 * narrow)
    return decoded + int(values * hidden.element_size())
