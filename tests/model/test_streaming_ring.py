"""The ring of experts and its copy engines: what is where, who waits for whom, and the refusal without CUDA.

No CUDA is at hand in these tests. The order of the CUDA engine's calls is checked on a recorder in place of torch.cuda,
which says nothing about what a GPU does with them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foedus_model import stream_ring
from foedus_model.stream_ring import CudaEngine, HostEngine, Ring
from foedus_protocols.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXPERTS, LAYERS = 6, 3


def layers() -> list[dict[str, torch.Tensor]]:
    """Each value says its layer and its expert; types and trailing shapes differ as codecs' do."""
    of = [(layer, torch.arange(EXPERTS) + 10 * layer) for layer in range(LAYERS)]
    return [
        {
            "blocks": value.to(torch.uint8)[:, None, None].expand(EXPERTS, 3, 5).contiguous(),
            "scales": value.to(torch.float32)[:, None].expand(EXPERTS, 4).contiguous(),
        }
        for _, value in of
    ]


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(layers(), per_chunk=2, slots=4, device=CPU)
    yield made
    made.close()


def _found(ring: Ring, layer: int) -> list[float]:
    """What lies in the rows that the ring names for a layer's experts, by two stacks that have to agree."""
    rows, experts = ring.rows(layer)
    assert torch.equal(experts[rows], torch.arange(EXPERTS))
    assert torch.equal(ring.stacks["blocks"][rows][:, 0, 0].float(), ring.stacks["scales"][rows][:, 0])
    return (ring.stacks["scales"][rows][:, 0] - 10 * layer).tolist()


def test_experts_are_found_wherever_their_chunks_lie(ring: Ring) -> None:
    assert ring.chunk_bytes == 2 * (15 + 16)
    for chunk, slot in ((0, 2), (1, 3), (2, 0)):
        ring.fetch(1, chunk, slot)
    ring.fetch(2, 0, 1)
    assert ring.held == 4
    rows, experts = ring.rows(1)
    assert rows.tolist() == [4, 5, 6, 7, 0, 1]
    assert experts.tolist() == [4, 5, 0, 0, 0, 1, 2, 3], (
        "rows of another layer stand for expert 0 and are read by nobody"
    )
    assert _found(ring, 1) == list(range(EXPERTS))
    for slot in (2, 3, 0):
        ring.free(slot)
    ring.fetch(2, 1, 2)
    ring.fetch(2, 2, 3)
    assert _found(ring, 2) == list(range(EXPERTS))


def test_a_layer_that_nobody_planned_is_fetched_alone(ring: Ring) -> None:
    for layer in (0, 2, 2, 1, 0):
        assert _found(ring, layer) == list(range(EXPERTS))
        assert ring.held == 3


def test_a_slot_in_use_is_not_filled(ring: Ring) -> None:
    ring.fetch(0, 0, 1)
    with pytest.raises(ValueError, match="expected a free slot for chunk 1 of layer 0, got 1, which is in use"):
        ring.fetch(0, 1, 1)


def test_an_error_of_a_copy_is_raised_where_the_slot_is_wanted() -> None:
    engine = HostEngine()
    engine.start(0, [(torch.zeros(2), torch.zeros(3))])
    with pytest.raises(RuntimeError, match="size"):
        engine.wait(0)
    engine.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("expert-copies")]


def test_what_is_no_ring_is_refused() -> None:
    with pytest.raises(ConfigError, match="a ring of at least 3 chunks, one layer, got 2"):
        Ring(layers(), per_chunk=2, slots=2, device=CPU)
    with pytest.raises(ValueError, match="chunks of a divisor of 6 experts, got 4"):
        Ring(layers(), per_chunk=4, slots=4, device=CPU)
    uneven = layers()
    uneven[1]["scales"] = uneven[1]["scales"].half()
    with pytest.raises(ValueError, match="got layers that differ"):
        Ring(uneven, per_chunk=2, slots=4, device=CPU)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_without_cuda_there_is_one_clear_refusal(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = f"expected a CUDA device to copy experts to, got {device} and 0 CUDA devices here: set FOEDUS_DEVICE=cpu"
    with pytest.raises(ConfigError, match=text):
        Ring(layers(), per_chunk=2, slots=4, device=torch.device(device))
    with pytest.raises(ConfigError, match=text):
        CudaEngine(torch.device(device), [])


class Recorder:
    """Writes down what a stand-in for torch.cuda is asked, in order."""

    def __init__(self, *, registers: bool) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.events = 0
        self.cudaError = SimpleNamespace(success=0)
        self._registers = registers

    def cudaHostRegister(self, start: int, count: int, flags: int) -> int:
        self.calls.append(("register", start, count, flags))
        return 0 if self._registers or len(self.calls) == 2 else 1

    def cudaHostUnregister(self, start: int) -> None:
        self.calls.append(("unregister", start))

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.calls.append((name, "waits for all of", other.name)),
            wait_event=lambda event: self.calls.append((name, "waits for", event.number)),
            synchronize=lambda: self.calls.append((name, "ends")),
        )

    def event(self) -> SimpleNamespace:
        self.events += 1
        number = self.events
        return SimpleNamespace(
            number=number,
            record=lambda stream: self.calls.append((stream.name, "marks", number)),
            synchronize=lambda: self.calls.append(("host", "waits for", number)),
        )


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A stand-in for torch.cuda; its GPU's memory is the host's."""
    found = Recorder(registers=request.param)
    computing, empty = found.stream("computing"), torch.empty

    @contextmanager
    def nothing(_: object) -> Iterator[None]:
        yield

    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        Stream=lambda device: found.stream("copying"),
        Event=found.event,
        current_stream=lambda device: computing,
        device=nothing,
        stream=nothing,
        cudart=lambda: found,
    )
    fake = SimpleNamespace(
        cuda=cuda,
        empty=lambda *shape, pin_memory, **kind: empty(*shape, **kind),
        zeros=lambda *shape, device, **kind: torch.zeros(*shape, **kind),
        **{name: getattr(torch, name) for name in ("uint8", "Tensor", "device")},
    )
    monkeypatch.setattr(stream_ring, "torch", fake)
    monkeypatch.setattr(stream_ring, "host_free", lambda: 1 << 40)
    monkeypatch.setattr(stream_ring, "_BOUNCE_BYTES", 7)
    return found


@pytest.mark.parametrize("recorder", [True, False], indirect=True, ids=["pinned in place", "through buffers"])
def test_the_cuda_engine_orders_copies_and_readers_by_events(recorder: Recorder) -> None:
    source = torch.arange(20, dtype=torch.uint8)
    target = torch.zeros(20, dtype=torch.uint8)
    engine = CudaEngine(GPU, [source, torch.zeros(3 * 4096, dtype=torch.uint8)])
    pinned = engine._pinned
    assert recorder.calls[0] == ("copying", "waits for all of", "computing"), "the ring was made there"
    del recorder.calls[:]
    engine.start(5, [(target[:8], source[:8]), (target[8:], source[8:])])
    engine.wait(5)
    assert torch.equal(target, source)
    first = [call for call in recorder.calls if call[0] != "host"]
    filled = first[-1][2]
    assert first[-2:] == [("copying", "marks", filled), ("computing", "waits for", filled)]
    engine.release(5)
    read = recorder.calls[-1][2]
    assert recorder.calls[-1] == ("computing", "marks", read)
    del recorder.calls[:]
    engine.start(5, [(target, source)])
    engine.wait(5)
    assert recorder.calls[0] == ("copying", "waits for", read), "nothing is written before the last reader"
    engine.close()
    assert ("copying", "ends") in recorder.calls
    freed = [call[1] for call in recorder.calls if call[0] == "unregister"]
    assert freed == pinned
    if not pinned:
        buffers = [call for call in recorder.calls if call[0] == "host"]
        assert len(buffers) == 3, "20 bytes in pieces of 7: each waits for what its buffer held"


@pytest.mark.parametrize("recorder", [True, False], indirect=True, ids=["pinned in place", "through buffers"])
def test_a_closed_ring_has_unpinned_its_pages_once_and_dropped_its_buffers(recorder: Recorder) -> None:
    engine = CudaEngine(GPU, [torch.zeros(3 * 4096, dtype=torch.uint8)])
    buffers = [weakref.ref(buffer) for buffer, _ in engine._bounce]
    pinned = list(engine._pinned)
    ring = Ring(layers(), per_chunk=2, slots=4, device=torch.device("cpu"))
    ring._engine = engine
    del engine
    for _ in range(2):
        ring.close()
    assert [call[1] for call in recorder.calls if call[0] == "unregister"] == pinned
    assert len(buffers) == (0 if pinned else 2)
    assert not [one for one in buffers if one() is not None]


@pytest.mark.parametrize("recorder", [False], indirect=True)
def test_pages_that_cannot_all_be_pinned_are_given_back(recorder: Recorder) -> None:
    # Parts of one tensor: tensors of their own lie one behind another where the heap has room, and are joined then.
    apart = list(torch.zeros(16, 5 * 4096, dtype=torch.uint8)[::2])
    engine = CudaEngine(GPU, apart)
    assert engine._pinned == []
    registered = [call[1] for call in recorder.calls if call[0] == "register"]
    given_back = [call[1] for call in recorder.calls if call[0] == "unregister"]
    assert given_back == registered[:-1], "all but the one that was refused"
    assert len(engine._bounce) == 2
    engine.close()


@pytest.mark.parametrize("recorder", [True], indirect=True)
def test_a_host_without_room_pins_nothing(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_ring, "host_free", lambda: 1 << 20)
    engine = CudaEngine(GPU, [torch.zeros(4096)])
    assert not [call for call in recorder.calls if call[0] == "register"]
    assert len(engine._bounce) == 2
    engine.close()


def test_no_page_is_pinned_twice() -> None:
    whole = torch.zeros(10 * 4096, dtype=torch.uint8)
    start = whole.data_ptr()
    found = stream_ring._pages([whole[100:5000], whole[5000:5001], whole[30000:]])
    assert all(one % 4096 == 0 and other % 4096 == 0 for one, other in found)
    assert all(stop < later for (_, stop), (later, _) in pairwise(found))
    assert any(one <= start + 100 and start + 5001 <= other for one, other in found)
    assert any(one <= start + 30000 and start + 40960 <= other for one, other in found)
