"""Training through a small device: experts stay on the host and stream through a ring, layer by layer.

`stream_experts` puts a ring between a loaded model's layers of experts and their stored bytes. From then on the model
runs as ever, a layer's experts fetched when the layer is reached, and its layers are computed again in the backward
(`recompute.py`): checks, evaluation and generation need nothing else. `Streamer.gradients` is the training step that
amortises the link: it executes `stream_plan.steps`, all units through a layer before the next layer comes.

A unit's arithmetic is its own forward and backward in either way, operation by operation: gradients are those of one
unit a forward to the bit wherever operations are deterministic, and do not depend on which units share a pass.
Attention, router, norms, embeddings and head stay on the device. Left out: adapters with a pair for each expert, whose
vector for every unit would not fit a host (they need clipping by layer), and Adam's states (rounds have none here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from foedus_kernels.experts import PackedExperts
from foedus_protocols.errors import ConfigError
from foedus_protocols.layout import Layout
from numpy.typing import NDArray
from torch import nn

from foedus_model.build import empty_model
from foedus_model.experts import QuantisedExperts
from foedus_model.loss import Batch, UnitLoss, head_losses
from foedus_model.memory import host_free
from foedus_model.parts import in_units
from foedus_model.recompute import kept, recompute_layers
from foedus_model.stream_layers import Rest, host_embeddings, rest_bytes
from foedus_model.stream_plan import Backward, Collect, Embed, Fetch, Forward, Free, Head, Load, Offload, Step, steps
from foedus_model.stream_ring import Ring, require_cuda

CHUNK_BYTES = 64 << 20
"""The most that a chunk takes, one expert at least: 4 of gpt-oss's experts. Requests of this size reach a link's and a
disk's full rate (not measured here)."""

REST = "rest"
"""What the ring calls the shares of a layer that are no experts."""

_VALUE = 4  # Bytes of a vector's float32; on the device a gradient of bfloat16 takes half of that for a moment.
_AHEAD = 4  # A quarter of a layer, one chunk at least, is fetched while a layer is computed.


@dataclass(frozen=True, kw_only=True)
class RingShape:
    """How a layer of experts is cut, and how much of it a ring holds.

    Attributes:
        per_chunk: Experts of a chunk.
        chunks: Chunks of a layer.
        slots: Chunks of the ring.
    """

    per_chunk: int
    chunks: int
    slots: int

    @classmethod
    def of(cls, experts: int, layer_bytes: int) -> RingShape:
        """The largest chunks within `CHUNK_BYTES`, and a ring of a layer and a quarter.

        Args:
            experts: E.
            layer_bytes: Of a layer, as far as it streams.
        """
        fits = [count for count in range(1, experts + 1) if experts % count == 0]
        per_chunk = max((count for count in fits if count * layer_bytes <= CHUNK_BYTES * experts), default=1)
        chunks = experts // per_chunk
        return cls(per_chunk=per_chunk, chunks=chunks, slots=chunks + max(1, chunks // _AHEAD))


def stream_experts(
    model: Any,
    trained: Sequence[nn.Parameter],
    *,
    units: int,
    shape: RingShape | None = None,
    whole: bool | None = None,
) -> Streamer:
    """Have a model's experts stream through a ring on its device, from now on.

    Args:
        model: A `GptOssForCausalLM` with quantised experts on the host (`build.load_base` with `stream=True` leaves
            them there), and with its adapter; changed in place.
        trained: The adapter's trained matrices, in the vector's order.
        units: Units that share a pass, at most: host memory for throughput.
        shape: The ring's; by default `RingShape.of` the model's layers.
        whole: Have the rest of each layer and the embeddings on the host, too; by default on a GPU. The model's
            parameters are then views of one buffer: do not read or save them between layers.

    Raises:
        ConfigError: Experts that are not quantised, an adapter with a pair for each expert, a matrix outside the
            layers, or a GPU without CUDA.
    """
    modules = [layer.mlp.experts for layer in model.model.layers]
    for module in modules:
        if not isinstance(module, QuantisedExperts):
            raise ConfigError(
                "expected a base with quantised experts to stream, got dense ones: quantise the base "
                "(`foedus model quantize`), or leave FOEDUS_STREAMING out"
            )
        if module.lora is not None and any(pairs.shape[0] != 1 for pairs in module.lora.parameters()):
            raise ConfigError(
                "expected an adapter on attention or experts-shared to stream, got one with a pair for each expert, "
                "whose vector for every unit would have to wait on the host: leave FOEDUS_STREAMING out"
            )
    stored = [module.stored() for module in modules]
    device = model.model.norm.weight.device
    experts = next(iter(stored[0].values())).shape[0]
    rest = None
    if device.type != "cpu":
        require_cuda(device)  # Before anything is changed.
    if device.type != "cpu" if whole is None else whole:
        rest = Rest(model.model.layers, experts)
        host_embeddings(model)
        stored = [layer | {REST: shares} for layer, shares in zip(stored, rest.shares, strict=True)]
    if shape is None:
        shape = RingShape.of(experts, sum(tensor.nbytes for tensor in stored[0].values()))
    ring = Ring(stored, per_chunk=shape.per_chunk, slots=shape.slots, device=device)
    streamer = Streamer(model, trained, ring, units=units)
    for number, module in enumerate(modules):
        module.elsewhere = _in_ring(module, number, ring)
        if rest is not None:  # The first module of a layer to run, in a second run of the layer as well.
            first = model.model.layers[number].input_layernorm
            first.register_forward_pre_hook(_gathering(rest, number, ring))
    recompute_layers(model, offload=device.type != "cpu")  # For what runs outside a pass: checks, scores.
    return streamer


def planned(
    described: Mapping[str, Any], layout: Layout, *, tokens: int, dtype: torch.dtype
) -> tuple[Load, int] | None:
    """What streaming would take on a GPU, before a weight is there.

    Args:
        described: The ``config.json``.
        layout: The adapter's.
        tokens: Of the one unit of the pass.
        dtype: The compute type.

    Returns:
        The pass, and the weights' bytes that stay on the device beside its ring; None where this base or adapter cannot
        stream.
    """
    model = empty_model(described, dtype)
    layers = model.model.layers
    if not isinstance(layers[0].mlp.experts, QuantisedExperts) or any(
        len(tensor.shape) == 3 and tensor.shape[0] > 1 for tensor in layout.tensors
    ):
        return None
    stored = layers[0].mlp.experts.stored().values()
    experts = model.config.num_local_experts
    rest = rest_bytes(layers[0], experts)
    layer_bytes = rest + sum(tensor.nbytes for tensor in stored)
    shape = RingShape.of(experts, layer_bytes)
    load = Load(
        chunks=((layer_bytes // shape.chunks,) * shape.chunks,) * len(layers),
        slots=shape.slots,
        hidden=(tokens * model.config.hidden_size * dtype.itemsize,),
        gradients=tuple(_trained_bytes(layout, number) for number in range(len(layers))),
    )
    return load, rest + model.model.norm.weight.nbytes + model.lm_head.weight.nbytes


def _trained_bytes(layout: Layout, layer: int) -> int:
    return _VALUE * sum(one.size for one in layout.trained() if f".layers.{layer}." in one.name)


def _in_ring(
    module: QuantisedExperts, layer: int, ring: Ring
) -> Callable[[torch.Tensor], tuple[PackedExperts, torch.Tensor]]:
    """What `RoutedExperts.elsewhere` asks for: the ring as the layer's stacks, and the experts' rows in it."""

    def place(ids: torch.Tensor) -> tuple[PackedExperts, torch.Tensor]:
        rows, experts = ring.rows(layer)  # (E,), (slots * per_chunk,)
        biases = (bias.index_select(0, experts) for bias in (module.gate_up_proj_bias, module.down_proj_bias))
        return module.pack(ring.stacks, *biases), rows[ids]

    return place


def _gathering(rest: Rest, layer: int, ring: Ring) -> Callable[[nn.Module, Any], None]:
    """A hook that makes a layer the one at work."""
    return lambda *_: rest.gather(layer, ring.stacks[REST], ring.rows(layer)[0])


class Streamer:
    """Gradients of many units over streamed experts.

    Attributes:
        units: Units that share a pass, at most.
    """

    def __init__(self, model: Any, trained: Sequence[nn.Parameter], ring: Ring, *, units: int) -> None:
        """Find the layer of each trained matrix.

        Raises:
            ConfigError: Fewer than one unit, or a trained matrix outside the layers.
        """
        if units < 1:
            raise ConfigError(f"expected at least one unit a pass, got {units}")
        self.units = units
        self._model, self._ring = model, ring
        layer_of = {id(one): number for number, layer in enumerate(model.model.layers) for one in layer.parameters()}
        self._length = 0
        self._trained: list[list[tuple[nn.Parameter, slice]]] = [[] for _ in model.model.layers]
        for one in trained:
            if id(one) not in layer_of:
                raise ConfigError("expected trained matrices in the model's layers, got one outside: not supported")
            self._trained[layer_of[id(one)]].append((one, slice(self._length, self._length + one.numel())))
            self._length += one.numel()

    def __str__(self) -> str:
        """What streams, for a log."""
        ring = self._ring
        return (
            f"experts stream to {ring.device}: {ring.layers} layers, {in_units(ring.chunks * ring.chunk_bytes)} each, "
            f"through a ring of {in_units(ring.slots * ring.chunk_bytes)}; up to {self.units} units a pass"
        )

    def gradients(self, batches: Sequence[Batch], loss: UnitLoss) -> NDArray[np.float32]:
        """The gradient of each unit's loss over the trained matrices, in the vector's order.  # float32 (U, d)

        Args:
            batches: A batch for each of at most `units` units, each with an answer token.
            loss: From a unit's token losses to its loss.

        Guarantees:
            A unit's gradient is a function of its own batch. Whether it ends or is interrupted, nothing of the units
            stays: hidden states are dropped and every slot of the ring is free.
        """
        if len(batches) > self.units:
            raise ValueError(f"expected at most {self.units} units a pass, got {len(batches)}")
        run = _Pass(self._model, self._ring, self._trained, batches, loss, self._length)
        try:
            self._ring.clear()  # Of a forward that no plan ran.
            for step in steps(self.load(batches)):
                run.do(step)
        finally:
            self._ring.clear()
        if self._ring.device.type == "cuda":
            torch.cuda.synchronize(self._ring.device)  # The vectors' last copies to the host.
        return run.vectors.numpy()

    def require_host(self, tokens: int) -> None:
        """Refuse a pass whose units could not all wait on the host, before one of them is known.

        Args:
            tokens: The most that a unit's records can have together.

        Raises:
            ConfigError: The host has less free than `units` such units take.
        """
        free, needed = host_free(), self._load([tokens] * self.units).host_peak
        if free is not None and free < needed:
            raise ConfigError(
                f"expected {in_units(needed)} of free host memory for {self.units} units of {tokens} tokens to wait "
                f"in, got {in_units(free)}: set FOEDUS_STREAMING to fewer units"
            )

    def load(self, batches: Sequence[Batch]) -> Load:
        """What a pass over these units moves and holds."""
        return self._load([batch.tokens.numel() for batch in batches])

    def _load(self, tokens: Sequence[int]) -> Load:
        wide = self._model.model.norm.weight
        size = self._model.config.hidden_size * wide.element_size()
        return Load(
            chunks=((self._ring.chunk_bytes,) * self._ring.chunks,) * self._ring.layers,
            slots=self._ring.slots,
            hidden=tuple(count * size for count in tokens),
            gradients=tuple(_VALUE * sum(one.numel() for one, _ in matrices) for matrices in self._trained),
        )

    def close(self) -> None:
        """End the copies; a later pass starts anew."""
        self._ring.close()


class _Pass:
    """One pass: what waits on the host, what is on the device for one unit, and what each step does with it."""

    def __init__(
        self,
        model: Any,
        ring: Ring,
        trained: Sequence[Sequence[tuple[nn.Parameter, slice]]],
        batches: Sequence[Batch],
        loss: UnitLoss,
        length: int,
    ) -> None:
        self._model, self._ring, self._trained, self._batches, self._loss = model, ring, trained, batches, loss
        # Pinned for a GPU, so that collecting a gradient does not have the host wait for the computation.
        self.vectors = torch.zeros(len(batches), length, pin_memory=ring.device.type == "cuda")
        self.waiting: dict[tuple[int, int], torch.Tensor] = {}  # By layer and unit, on the host.
        self.newest: torch.Tensor | None = None  # A unit's hidden states or their gradient, (B, T, K).
        self._pieces: tuple[torch.Tensor, ...] = ()  # A unit's adapter gradient in a layer.
        self._first = next(layer for layer, matrices in enumerate(trained) if matrices)

    def do(self, step: Step) -> None:
        """Do one step of the plan."""
        match step:
            case Fetch(layer, chunk, slot):
                self._ring.fetch(layer, chunk, slot)
            case Free(_, _, slot):
                self._ring.free(slot)
            case Embed(unit):
                with torch.no_grad():
                    self.newest = self._model.model.embed_tokens(self._batches[unit].tokens)
            case Offload(layer, unit):
                if self.newest is not None:
                    self.waiting[layer, unit] = _to_host(self.newest)
                self.newest = None
            case Forward(layer, unit):
                self._forward(layer, unit)
            case Head(unit):
                self._head(unit)
            case Backward(layer, unit):
                self._backward(layer, unit)
            case Collect(layer, unit):
                for (_, place), piece in zip(self._trained[layer], self._pieces, strict=True):
                    self.vectors[unit, place].copy_(piece.reshape(-1), non_blocking=True)
                self._pieces = ()

    def _forward(self, layer: int, unit: int) -> None:
        given = self.waiting[layer, unit] if layer >= self._first else self.waiting.pop((layer, unit))
        with torch.no_grad(), _only(self._model.model, layer) as run:
            self.newest = run(_to_device(given, self._ring))

    def _head(self, unit: int) -> None:
        last = _to_device(self.waiting.pop((self._ring.layers, unit)), self._ring).requires_grad_()
        batch = self._batches[unit]
        owners, places = torch.nonzero(batch.answers, as_tuple=True)  # (N,), (N,)
        with torch.enable_grad():
            losses = head_losses(self._model, self._model.model.norm(last), batch.tokens, owners, places)  # (N,)
            (self.newest,) = torch.autograd.grad(self._loss(losses, owners, batch.tokens.shape[0]), last)

    def _backward(self, layer: int, unit: int) -> None:
        above = _to_device(self.waiting.pop((layer + 1, unit)), self._ring)  # (B, T, K)
        given = _to_device(self.waiting.pop((layer, unit)), self._ring)  # (B, T, K)
        matrices = [one for one, _ in self._trained[layer]]
        inputs = [given.requires_grad_(), *matrices] if layer > self._first else matrices
        with torch.enable_grad(), _only(self._model.model, layer) as run:
            found = torch.autograd.grad(run(given), inputs, above)
        self.newest = found[0] if layer > self._first else None
        self._pieces = found[1:] if layer > self._first else found


@contextmanager
def _only(inner: Any, layer: int) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Let the model's own forward, with its masks and rotations, run one layer and nothing before or after it."""
    layers, norm = inner.layers, inner.norm
    chosen: list[nn.Module] = [_PassThrough() for _ in layers]
    chosen[layer] = layers[layer]
    inner.layers, inner.norm = nn.ModuleList(chosen), nn.Identity()
    try:
        with kept(layers[layer]):
            yield lambda hidden: inner(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        inner.layers, inner.norm = layers, norm


class _PassThrough(nn.Module):
    """Stands for a layer that does not run."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; of a GPU's into pinned memory, in the order of the computing stream."""
    if tensor.device.type == "cpu":
        return tensor.detach()
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return waiting.copy_(tensor.detach(), non_blocking=True)


def _to_device(tensor: torch.Tensor, ring: Ring) -> torch.Tensor:
    """What waits on the host, again where the ring is: the same stream comes after the copy that brought it there."""
    return tensor.to(ring.device, non_blocking=True).detach()
