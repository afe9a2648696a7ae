"""A ring of experts on a device, and the two engines that fill it from the host or from mapped files (K4).

The ring's slots lie one behind another in one stack for each stored tensor, so that a layer's experts are rows of a
stack wherever in the ring they lie: the kernels take the whole ring as their stack and expert ids as its rows, and
nothing is copied together. Experts keep their own products, so the bits are those of a layer at rest.

`CudaEngine` copies on a stream of its own, ordered with the computing stream by events; `HostEngine` copies in a thread
beside the computing one, for a machine whose memory is smaller than its base: it reads the files twice a pass, in
order, where the mapped experts would be read twice a unit. Direct storage (NVMe to GPU) is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from foedus_protocols.errors import ConfigError

from foedus_model.memory import host_free
from foedus_model.parts import in_units

_LOG = logging.getLogger(__name__)

_BOUNCE_BYTES = 16 << 20  # A power of two, to which torch rounds pinned memory up; large enough for a link's full rate.
_PAGE = 4096
_READ_ONLY = 8  # cudaHostRegisterReadOnly
_LEFT_FREE = 4 << 30  # Of the host's memory, where the experts are pinned.

Copy = tuple[torch.Tensor, torch.Tensor]
"""Where to, in the ring; where from, on the host. Equal in type and shape, both without gaps."""


class Engine(Protocol):
    """Copies chunks into slots beside the computation."""

    def start(self, slot: int, copies: Sequence[Copy]) -> None:
        """Begin to fill a slot, once what read it before `release` is done."""

    def wait(self, slot: int) -> None:
        """Whatever is computed from here on sees what was started for the slot."""

    def release(self, slot: int) -> None:
        """What was computed up to here were the slot's last readers."""

    def close(self) -> None:
        """End, whatever is under way; nothing stays pinned or running."""


class HostEngine:
    """Copies in one thread of this process. Computation on a CPU is done when it returns: `release` has no work."""

    def __init__(self) -> None:
        """Start no thread before it is needed."""
        self._thread = ThreadPoolExecutor(1, "expert-copies")
        self._started: dict[int, Future[None]] = {}

    def start(self, slot: int, copies: Sequence[Copy]) -> None:
        """Begin to fill a slot."""
        self._started[slot] = self._thread.submit(self._copy, copies)

    def wait(self, slot: int) -> None:
        """Wait until the slot is filled; an error of its copy is raised here."""
        started = self._started.pop(slot, None)
        if started is not None:
            started.result()

    def release(self, slot: int) -> None:
        """Nothing: readers are done."""

    def close(self) -> None:
        """Wait for the copy under way, drop the others."""
        self._thread.shutdown(cancel_futures=True)
        self._started.clear()

    @staticmethod
    def _copy(copies: Sequence[Copy]) -> None:
        for target, source in copies:
            target.copy_(source)


class CudaEngine:
    """Copies on a CUDA stream beside the computing one.

    The host's experts are pinned in place (``cudaHostRegister``) where memory allows: pages of a private mapping are
    copied by the system when they are pinned, so this takes the experts' bytes of the host's memory. Otherwise they go
    through two pinned buffers of 16 MB, filled by a thread. (torch's own pinned memory is rounded up to a power of two,
    which for a layer of 120b would be 27 % more.)

    Raises:
        ConfigError: There is no CUDA device.
    """

    def __init__(self, device: torch.device, sources: Sequence[torch.Tensor]) -> None:
        """Pin `sources`, all that will be copied from, or make the buffers."""
        require_cuda(device)
        self._device = device
        self._copying = torch.cuda.Stream(device)
        # The ring is made, and was last read, in the computing stream.
        self._copying.wait_stream(torch.cuda.current_stream(device))
        self._filled: dict[int, Any] = {}
        self._read: dict[int, Any] = {}
        self._thread = ThreadPoolExecutor(1, "expert-copies")
        self._started: dict[int, Future[None]] = {}
        self._pinned = _pin(sources, device)
        self._bounce: list[tuple[torch.Tensor, Any]] = []
        if not self._pinned:
            for _ in range(2):
                buffer = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)
                self._bounce.append((buffer, torch.cuda.Event()))

    def start(self, slot: int, copies: Sequence[Copy]) -> None:
        """Begin to fill a slot: the copying stream waits for the slot's last reader, the host for nothing."""
        self._started[slot] = self._thread.submit(self._copy, slot, copies)

    def wait(self, slot: int) -> None:
        """The computing stream waits for the slot; the host only until the copies are in their stream."""
        started = self._started.pop(slot, None)
        if started is not None:
            started.result()
            torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        """Mark the place in the computing stream after which the slot may be written."""
        event = self._read[slot] = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Let the copies under way end, and unpin."""
        self._thread.shutdown(cancel_futures=True)
        self._started.clear()
        try:
            self._copying.synchronize()
        finally:
            _unpin(self._pinned)
            self._pinned = []
            self._bounce = []

    def _copy(self, slot: int, copies: Sequence[Copy]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
            if slot in self._read:
                self._copying.wait_event(self._read[slot])
            for target, source in copies:
                if self._pinned:
                    target.copy_(source, non_blocking=True)
                else:
                    self._through_buffers(_bytes(target), _bytes(source))
            event = self._filled[slot] = torch.cuda.Event()
            event.record(self._copying)

    def _through_buffers(self, target: torch.Tensor, source: torch.Tensor) -> None:
        for place in range(0, source.numel(), _BOUNCE_BYTES):
            buffer, sent = self._bounce[0]
            self._bounce.reverse()
            sent.synchronize()  # What the buffer held before has arrived; at once where it held nothing.
            piece = source[place : place + _BOUNCE_BYTES]
            buffer[: piece.numel()].copy_(piece)
            target[place : place + piece.numel()].copy_(buffer[: piece.numel()], non_blocking=True)
            sent.record(self._copying)


def require_cuda(device: torch.device) -> None:
    """Refuse a device that the copy engine cannot fill.

    Raises:
        ConfigError: There is no CUDA device.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"expected a CUDA device to copy experts to, got {device} and "
            f"{torch.cuda.device_count()} CUDA devices here: set FOEDUS_DEVICE=cpu, or leave FOEDUS_STREAMING out"
        )


class Ring:
    """Slots on a device for chunks of layers of experts.

    Attributes:
        stacks: The ring as the kernels take it: each stored tensor by name, [slots * per_chunk, ...].
        slots: How many chunks it holds.
        chunks: Of a layer.
        chunk_bytes: Of one chunk.
        layers: How many layers there are to hold.
        device: Where it is.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, torch.Tensor]], *, per_chunk: int, slots: int, device: torch.device
    ) -> None:
        """Make an empty ring.

        Args:
            layers: The stored tensors [E, ...] of each layer by name, on the host; alike in every layer.
            per_chunk: Experts of a chunk, a divisor of E.
            slots: Chunks that the ring holds, at least a layer's.
            device: Where the ring is.

        Raises:
            ConfigError: A ring smaller than a layer, or a GPU's ring without CUDA.
            ValueError: Layers that differ, or experts that make no whole chunks.
        """
        if device.type != "cpu":
            require_cuda(device)
        first = layers[0]
        experts = next(iter(first.values())).shape[0]
        for layer in layers:
            if {n: (t.dtype, t.shape) for n, t in layer.items()} != {n: (t.dtype, t.shape) for n, t in first.items()}:
                raise ValueError("expected layers of experts of one type and shape, got layers that differ")
        if experts % per_chunk:
            raise ValueError(f"expected chunks of a divisor of {experts} experts, got {per_chunk}")
        self.chunks, self.slots, self.layers = experts // per_chunk, slots, len(layers)
        if slots < self.chunks:
            raise ConfigError(f"expected a ring of at least {self.chunks} chunks, one layer, got {slots}")
        self._layers, self._per_chunk, self.device = layers, per_chunk, device
        self._engine: Engine | None = None
        self._held: dict[int, tuple[int, int]] = {}  # Layer and chunk of each slot in use.
        self._rows: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self.stacks = {
            name: torch.zeros(slots * per_chunk, *tensor.shape[1:], dtype=tensor.dtype, device=device)
            for name, tensor in first.items()
        }
        self.chunk_bytes = sum(tensor[:per_chunk].nbytes for tensor in first.values())

    @property
    def held(self) -> int:
        """How many slots are in use, filled or being filled."""
        return len(self._held)

    def fetch(self, layer: int, chunk: int, slot: int) -> None:
        """Start to copy a chunk into a free slot.

        Raises:
            ValueError: The slot is in use: its readers may not be done.
        """
        if slot in self._held:
            raise ValueError(f"expected a free slot for chunk {chunk} of layer {layer}, got {slot}, which is in use")
        to, of = slot * self._per_chunk, chunk * self._per_chunk
        # `.data`: the layer at work has saved the whole ring for its backward, which reads its own slots alone. A copy
        # into another slot must not count as a change of what was saved.
        copies = [
            (self.stacks[name].data[to : to + self._per_chunk], tensor[of : of + self._per_chunk])
            for name, tensor in self._layers[layer].items()
        ]
        self._held[slot] = (layer, chunk)
        self._rows = None
        self._started().start(slot, copies)

    def free(self, slot: int) -> None:
        """Give a slot back: everything computed so far were its last readers."""
        del self._held[slot]
        self._rows = None
        self._started().release(slot)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a layer's experts are, from here on in the computation. What is missing is fetched first.

        Returns:
            int64 (E,), the row of each expert; int64 (slots * per_chunk,), the expert of each row, 0 where there is
            none.
        """
        if self._rows is not None and self._rows[0] == layer:
            return self._rows[1], self._rows[2]
        held = {chunk: slot for slot, (owner, chunk) in self._held.items() if owner == layer}
        if len(held) < self.chunks:
            held = self._alone(layer)
        rows = torch.zeros(self.chunks, self._per_chunk, dtype=torch.int64)
        experts = torch.zeros(self.slots, self._per_chunk, dtype=torch.int64)
        within = torch.arange(self._per_chunk)
        for chunk, slot in held.items():
            self._started().wait(slot)
            rows[chunk] = slot * self._per_chunk + within
            experts[slot] = chunk * self._per_chunk + within
        found = rows.flatten().to(self.device), experts.flatten().to(self.device)
        self._rows = (layer, *found)
        return found

    def clear(self) -> None:
        """Give every slot back, after the copies under way."""
        for slot in list(self._held):
            self._started().wait(slot)
            self.free(slot)

    def close(self) -> None:
        """End the copies, any number of times. A later use starts anew."""
        self._held.clear()
        self._rows = None
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _alone(self, layer: int) -> dict[int, int]:
        """Make room and fetch a whole layer: for a forward that no plan runs."""
        self.clear()
        for chunk in range(self.chunks):
            self.fetch(layer, chunk, chunk)
        return {chunk: chunk for chunk in range(self.chunks)}

    def _started(self) -> Engine:
        if self._engine is None:
            everything = [tensor for layer in self._layers for tensor in layer.values()]
            self._engine = HostEngine() if self.device.type == "cpu" else CudaEngine(self.device, everything)
        return self._engine


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without gaps as its bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pin(sources: Sequence[torch.Tensor], device: torch.device) -> list[int]:
    """Register the pages of tensors for copies without a detour; the starts of what was pinned, none where it fails."""
    needed = sum(tensor.nbytes for tensor in sources)
    free = host_free()
    if free is None or free < needed + _LEFT_FREE:
        _LOG.info(
            "experts go through pinned buffers: pinning %s of them would leave too little of the host", in_units(needed)
        )
        return []
    runtime = torch.cuda.cudart()
    pinned: list[int] = []
    for start, stop in _pages(sources):
        if runtime.cudaHostRegister(start, stop - start, _READ_ONLY) != runtime.cudaError.success:
            _unpin(pinned)
            _forget_error(device)
            _LOG.info("experts go through pinned buffers: the system does not let their pages be pinned")
            return []
        pinned.append(start)
    return pinned


def _unpin(starts: Sequence[int]) -> None:
    for start in starts:
        torch.cuda.cudart().cudaHostUnregister(start)


def _forget_error(device: torch.device) -> None:
    """A refused registration stays the runtime's last error until the next call reports it: let it do so here."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        _LOG.debug("reported late: %s", error)


def _pages(sources: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """The whole pages of tensors as (start, stop), neighbours joined: a page must not be registered twice."""
    spans = sorted(
        (start - start % _PAGE, -(-(start + tensor.nbytes) // _PAGE) * _PAGE)
        for tensor in sources
        for start in (tensor.data_ptr(),)
    )
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
