"""The order of a streamed step: what a step needs is there, no slot is used twice, and the peaks are the formulas."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from foedus_model.stream_plan import (
    Backward,
    Collect,
    Embed,
    Fetch,
    Forward,
    Free,
    Head,
    Load,
    Offload,
    residency,
    steps,
)
from foedus_protocols.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

BYTES = st.integers(1, 1000)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    layers = draw(st.integers(1, 5))
    chunks = tuple(tuple(draw(st.lists(BYTES, min_size=1, max_size=4))) for _ in range(layers))
    gradients = draw(st.lists(st.integers(0, 1000), min_size=layers, max_size=layers).filter(any))
    slots = max(len(layer) for layer in chunks) + draw(st.integers(0, 6))
    hidden = tuple(draw(st.lists(BYTES, max_size=4)))
    return Load(chunks=chunks, slots=slots, hidden=hidden, gradients=tuple(gradients))


@given(loads())
@settings(max_examples=300, deadline=None)
def test_the_peaks_are_the_formulas(load: Load) -> None:
    found = [resident for _, resident in residency(load)]
    assert max((one.device for one in found), default=load.ring_bytes) == load.device_peak
    assert max((one.host for one in found), default=0) == load.host_peak
    assert all(one.ring <= load.ring_bytes for one in found)
    assert all(one.device >= load.ring_bytes for one in found)
    if found:
        assert found[-1].device == load.ring_bytes
        assert found[-1].host == len(load.hidden) * sum(load.gradients), "only the vectors are left"
        assert found[-1].ring == 0


@given(loads(), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_chunks_are_fetched_once_up_and_once_down_however_many_units(load: Load, more: int) -> None:
    several = dataclasses.replace(load, hidden=(7,) * more)
    found = Counter((step.layer, step.chunk) for step in steps(several) if isinstance(step, Fetch))
    for layer, chunks in enumerate(several.chunks):
        for chunk in range(len(chunks)):
            assert found[layer, chunk] == (2 if layer >= several.first else 1)
    assert several.link_bytes == sum(several.chunks[layer][chunk] * count for (layer, chunk), count in found.items())
    assert list(steps(dataclasses.replace(load, hidden=()))) == []
    assert dataclasses.replace(load, hidden=()).link_bytes == 0


@given(loads())
@settings(max_examples=300, deadline=None)
def test_the_order_can_be_executed(load: Load) -> None:
    """A second account, of what each step needs instead of bytes, written apart from the first."""
    layers, slots = len(load.chunks), {}
    inputs, newest, pieces, vectors = set(), None, None, Counter()

    def whole(layer: int) -> bool:
        return set(slots.values()) >= {(layer, chunk) for chunk in range(len(load.chunks[layer]))}

    for step in steps(load):
        match step:
            case Fetch(layer, chunk, slot):
                assert 0 <= slot < load.slots
                assert slot not in slots, "a slot is filled again only after its last reader"
                slots[slot] = (layer, chunk)
            case Free(layer, chunk, slot):
                assert newest is None
                assert slots.pop(slot) == (layer, chunk)
            case Embed(unit):
                newest = ("input", 0, unit)
            case Forward(layer, unit):
                assert newest is None
                assert whole(layer)
                assert ("input", layer, unit) in inputs
                if layer < load.first:
                    inputs.remove(("input", layer, unit))
                newest = ("input", layer + 1, unit)
            case Head(unit):
                inputs.remove(("input", layers, unit))
                newest = ("gradient", layers, unit)
            case Backward(layer, unit):
                assert newest is None
                assert pieces is None
                assert whole(layer)
                inputs.remove(("gradient", layer + 1, unit))
                inputs.remove(("input", layer, unit))
                pieces = (layer, unit) if load.gradients[layer] else None
                newest = ("gradient", layer, unit) if layer > load.first else None
            case Collect(layer, unit):
                assert pieces == (layer, unit)
                vectors[unit] += load.gradients[layer]
                pieces = None
            case Offload(layer, unit):
                assert newest is not None
                assert newest[1:] == (layer, unit)
                inputs.add(newest)
                newest = None
    assert not inputs
    assert not slots
    assert vectors == Counter({unit: sum(load.gradients) for unit in range(len(load.hidden))})


@given(loads())
@settings(max_examples=200, deadline=None)
def test_the_ring_is_full_while_anything_is_to_come(load: Load) -> None:
    """Prefetch is as deep as the ring: no computation starts beside a free slot that a later chunk could use."""
    several = dataclasses.replace(load, hidden=(3, 5))
    order = list(steps(several))
    left, used = sum(isinstance(step, Fetch) for step in order), 0
    for step in order:
        if isinstance(step, Fetch):
            left, used = left - 1, used + 1
        elif isinstance(step, Free):
            used -= 1
        elif left:
            assert used == several.slots


def test_a_pass_of_a_known_shape() -> None:
    load = Load(chunks=((4, 4), (4, 4)), slots=3, hidden=(10, 20), gradients=(1, 2))
    assert load.device_peak == 3 * 4 + 2 + 3 * 20
    assert load.host_peak == 2 * 3 + 3 * 30
    assert load.link_bytes == 2 * 16
    frozen_below = dataclasses.replace(load, gradients=(0, 2))
    assert (frozen_below.first, frozen_below.link_bytes) == (1, 8 + 16)
    assert frozen_below.device_peak == 12 + 2 + 2 * 20
    assert frozen_below.host_peak == 2 * 2 + 2 * 30


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"slots": 1}, "a ring of at least 2 chunks, one layer, got 1"),
        ({"gradients": (0, 0)}, "expected a trained matrix in at least one layer"),
        ({"gradients": (1,)}, "got 2 layers of"),
        ({"chunks": ((4, 4), ())}, r"of \[2, 0\] chunks"),
        ({"chunks": (), "gradients": ()}, "got 0 layers"),
    ],
)
def test_what_cannot_be_streamed_is_refused(change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(Load(chunks=((4, 4), (4, 4)), slots=3, hidden=(1,), gradients=(1, 2)), **change)
