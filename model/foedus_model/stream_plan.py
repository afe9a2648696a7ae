"""The order of a streamed training step, and what is resident where after each part of it. No tensors, no device.

Experts pass through a ring of slots on the device, a chunk of a layer a slot. The layer is the outer loop and the unit
the inner one: a layer's chunks are fetched once for all units on the way up and once on the way down, so that the link
is paid for per pass and not per unit (facts: 120b's experts twice are 122 GB a pass). Between layers each unit's hidden
states wait on the host; the way down computes a layer again from its kept input (Chen et al. 2016), and each unit's
adapter gradient is written into that unit's own vector on the host, since clipping needs the whole of it.

`steps` is the order; `residency` replays it with its bytes. `streaming.py` executes it, `stream_ring.py` copies.
Per-layer clipping, which needs no vectors on the host, is the heavier alternative for the privacy analysis; left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from foedus_protocols.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a pass has to move. S(u) stands for a unit's hidden states, V for one vector, L for the layers.

    Attributes:
        chunks: Bytes of each chunk of each layer.
        slots: Chunks that the ring holds.
        hidden: S(u), bytes of each unit's hidden states between two layers.
        gradients: Bytes of a unit's adapter gradient in each layer; V is their sum.

    Raises:
        ConfigError: No layer or nothing trained, a layer without chunks, or fewer slots than a layer has chunks.

    Guarantees:
        Over a pass, with f the lowest layer that trains (nothing is kept for the layers below it):

        - the device holds at most ``device_peak`` = slots * (largest chunk) + max over l >= f of
          (gradients[l] + (2 if l = f else 3) * max S(u)), beside what a layer makes inside for one unit;
        - the host holds at most ``host_peak`` = U * V + (L - f + 1) * (sum of S(u)), beside the stored experts;
        - the link carries ``link_bytes``: each chunk twice, chunks below f once, however many units there are.
    """

    chunks: tuple[tuple[int, ...], ...]
    slots: int
    hidden: tuple[int, ...]
    gradients: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that a pass is possible."""
        if not self.chunks or not all(self.chunks) or len(self.gradients) != len(self.chunks):
            raise ConfigError(
                f"expected chunks and the gradient's bytes for each layer, got {len(self.chunks)} layers of "
                f"{[len(layer) for layer in self.chunks][:8]} chunks and {len(self.gradients)} gradients"
            )
        if not any(self.gradients):
            raise ConfigError("expected a trained matrix in at least one layer, got none: there is nothing to stream")
        most = max(len(layer) for layer in self.chunks)
        if self.slots < most:
            raise ConfigError(f"expected a ring of at least {most} chunks, one layer, got {self.slots}")

    @property
    def first(self) -> int:
        """f, the lowest layer that trains."""
        return next(layer for layer, count in enumerate(self.gradients) if count)

    @property
    def ring_bytes(self) -> int:
        """Bytes that the ring takes, full or not."""
        return self.slots * max(max(layer) for layer in self.chunks)

    @property
    def device_peak(self) -> int:
        """The most that the pass holds on the device; the class says what that is."""
        largest = max(self.hidden, default=0)
        if not largest:
            return self.ring_bytes
        trained = enumerate(self.gradients[self.first :])
        return self.ring_bytes + max(count + (3 if above else 2) * largest for above, count in trained)

    @property
    def host_peak(self) -> int:
        """The most that the pass holds on the host; the class says what that is."""
        kept = len(self.chunks) - self.first + 1
        return len(self.hidden) * sum(self.gradients) + kept * sum(self.hidden)

    @property
    def link_bytes(self) -> int:
        """Bytes of experts that a pass copies to the device; 0 without units."""
        if not self.hidden:
            return 0
        by_layer = [sum(layer) for layer in self.chunks]
        return sum(by_layer) + sum(by_layer[self.first :])


@dataclass(frozen=True)
class Fetch:
    """Start to copy a chunk of a layer into a slot."""

    layer: int
    chunk: int
    slot: int


@dataclass(frozen=True)
class Free:
    """The layer's last reader is done with the slot."""

    layer: int
    chunk: int
    slot: int


@dataclass(frozen=True)
class Embed:
    """Make a unit's first hidden states."""

    unit: int


@dataclass(frozen=True)
class Forward:
    """Take a unit's input of a layer from the host and compute its output, keeping nothing inside."""

    layer: int
    unit: int


@dataclass(frozen=True)
class Head:
    """Take a unit's last hidden states from the host; loss, and its gradient in them."""

    unit: int


@dataclass(frozen=True)
class Backward:
    """Take a unit's input of a layer and the gradient of its output; the layer again, and its gradients."""

    layer: int
    unit: int


@dataclass(frozen=True)
class Collect:
    """Write a layer's adapter gradient into the unit's vector on the host."""

    layer: int
    unit: int


@dataclass(frozen=True)
class Offload:
    """Put a unit's newest hidden states, or their gradient on the way down, where the host keeps those of a layer.

    Attributes:
        layer: They are the input of this layer; of the head where there are as many layers.
    """

    layer: int
    unit: int


Step = Fetch | Free | Embed | Forward | Head | Backward | Collect | Offload


def steps(load: Load) -> Iterator[Step]:
    """A pass over all units, in order; nothing where there is no unit.

    Slots are used in turn. A fetch stands as early as its slot is free, so that a copy engine runs ahead by what the
    ring holds beyond the layer at work.
    """
    if not load.hidden:
        return
    layers, units = len(load.chunks), range(len(load.hidden))
    ring = _Ring(load)
    yield from ring.fill()
    for unit in units:
        yield Embed(unit)
        yield Offload(0, unit)
    for layer in range(layers):
        for unit in units:
            yield Forward(layer, unit)
            yield Offload(layer + 1, unit)
        yield from ring.leave(layer)
    for unit in units:
        yield Head(unit)
        yield Offload(layers, unit)
    for layer in reversed(range(load.first, layers)):
        for unit in units:
            yield Backward(layer, unit)
            if load.gradients[layer]:
                yield Collect(layer, unit)
            if layer > load.first:
                yield Offload(layer, unit)
        yield from ring.leave(layer)


class _Ring:
    """Which chunk comes next, and which slots are free."""

    def __init__(self, load: Load) -> None:
        layers = range(len(load.chunks))
        self._chunks = load.chunks
        self._coming = iter(
            [(layer, chunk) for layer in layers for chunk in range(len(load.chunks[layer]))]
            + [(layer, chunk) for layer in reversed(layers[load.first :]) for chunk in range(len(load.chunks[layer]))]
        )
        self._free = deque(range(load.slots))
        self._held: deque[Fetch] = deque()

    def fill(self) -> Iterator[Step]:
        """Fetch what comes next into every free slot."""
        while self._free:
            coming = next(self._coming, None)
            if coming is None:
                return
            fetch = Fetch(*coming, self._free.popleft())
            self._held.append(fetch)
            yield fetch

    def leave(self, layer: int) -> Iterator[Step]:
        """Give back the slots of a layer, the oldest in the ring, one by one."""
        for _ in self._chunks[layer]:
            oldest = self._held.popleft()
            self._free.append(oldest.slot)
            yield Free(oldest.layer, oldest.chunk, oldest.slot)
            yield from self.fill()


@dataclass(frozen=True)
class Resident:
    """Bytes after a step.

    Attributes:
        device: The ring as it is allocated, hidden states, their gradients, and adapter gradients.
        host: Hidden states, their gradients, and the units' vectors.
        ring: Of the ring, what is filled or being filled.
    """

    device: int
    host: int
    ring: int


def residency(load: Load) -> Iterator[tuple[Step, Resident]]:
    """Each step of a pass with what is resident after it."""
    device = ring = 0
    host = len(load.hidden) * sum(load.gradients)  # The vectors are there from the start.
    for step in steps(load):
        match step:
            case Fetch(layer, chunk, _):
                ring += load.chunks[layer][chunk]
            case Free(layer, chunk, _):
                ring -= load.chunks[layer][chunk]
            case Embed(unit):
                device += load.hidden[unit]
            case Forward(layer, unit):
                device += 2 * load.hidden[unit]
                host -= load.hidden[unit] if layer < load.first else 0
            case Head(unit):
                device += 2 * load.hidden[unit]
                host -= load.hidden[unit]
            case Backward(layer, unit):
                device += (3 if layer > load.first else 2) * load.hidden[unit] + load.gradients[layer]
                host -= 2 * load.hidden[unit]
            case Collect(layer, _):
                device -= load.gradients[layer]
            case Offload(_, unit):
                device = 0
                host += load.hidden[unit]
        if isinstance(step, Collect) and step.layer == load.first:
            device = 0  # Nothing is passed on below.
        yield step, Resident(device=load.ring_bytes + device, host=host, ring=ring)
