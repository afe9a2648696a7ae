"""A streamed step against one unit a forward: the same gradients, the planned bytes, the base untouched."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foedus_client.checks import streaming_check
from foedus_client.privacy import SeededBytes, StepTerms
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from foedus_client.training import clipped_sum, unit_gradient, unit_loss
from foedus_model import streaming
from foedus_model.adapter import AttachedAdapter, attach
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint
from foedus_model.experts import choose_path
from foedus_model.loss import Batch, UnitLoss, batch_of, token_losses
from foedus_model.quantize import convert
from foedus_model.stream_plan import Fetch, Free, residency
from foedus_model.stream_ring import HostEngine
from foedus_model.streaming import RingShape, Streamer, stream_experts
from foedus_protocols.errors import ConfigError, PrivacyCheckFailed
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_config

RANK, LAYERS = 4, 4
SHAPE = RingShape(per_chunk=4, chunks=4, slots=5)
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "experts-shared": {"targets": "experts-shared", "train": "both"},
    "above the lowest layers": {"targets": "experts-shared", "layers": [1, 3]},
}


@pytest.fixture
def deep(base: Path, write_base: Callable[..., Path]) -> Callable[[str], Path]:
    """A random base of four layers in a quantisation."""

    def write(quantisation: str = "mxfp4") -> Path:
        types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        config = read_config(base) | {"num_hidden_layers": LAYERS, "layer_types": types}
        folder = write_base("deep", config=config)
        if quantisation != "mxfp4":
            folder = folder.with_name(quantisation)
            convert(open_checkpoint(folder.with_name("deep")), folder, to=quantisation, requantise=True)
        return folder

    return write


def adapted(folder: Path, **kind: Any) -> AttachedAdapter:
    """The base with a random adapter of a kind."""
    layout = adapter_layout(read_config(folder), rank=RANK, **(kind or KINDS["attention"]))
    adapter = attach(load_base(folder, stream=True), layout, seed="s", alpha=8.0, rank=RANK)
    adapter.load_vector((np.random.default_rng(7).normal(size=layout.length) * 0.05).astype(np.float32))
    return adapter


def units_of(*lengths: list[int]) -> list[SyntheticUnit]:
    """Units of records of these lengths, some of their tokens answers."""
    rng = np.random.default_rng(3)
    return [
        SyntheticUnit(
            records=[
                SyntheticRecord(
                    tokens=rng.integers(0, 256, length).astype(np.int32), loss_mask=np.arange(length) >= length // 3
                )
                for length in unit
            ]
        )
        for unit in lengths
    ]


UNITS = units_of([40], [17, 33], [9], [1, 24])


def batches(units: list[SyntheticUnit] = UNITS) -> list[Batch]:
    found = [batch_of(unit.records, torch.device("cpu")) for unit in units]
    return [batch for batch in found if batch is not None]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def closing() -> Iterator[list[Streamer]]:
    opened: list[Streamer] = []
    yield opened
    for one in opened:
        one.close()


@pytest.mark.parametrize("quantisation", ["mxfp4", "nf4"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_one_unit_a_forward(
    deep: Callable[[str], Path], kind: dict[str, Any], quantisation: str, closing: list[Streamer]
) -> None:
    folder = deep(quantisation)
    before = digests(folder)
    adapter = adapted(folder, **kind)
    expected = [unit_gradient(adapter, unit.records) for unit in UNITS]
    weights = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE)
    closing.append(streamer)
    found = streamer.gradients(batches(), unit_loss)
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(other) > 1e-3
        np.testing.assert_array_equal(one, other)
    plain = [unit_gradient(adapter, unit.records) for unit in UNITS]
    np.testing.assert_array_equal(plain, expected, err_msg="a forward that no plan runs streams as well")
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert digests(folder) == before


@pytest.mark.parametrize("quantisation", ["mxfp4", "nf4"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_whole_layers_stream_to_the_same_gradients(
    deep: Callable[[str], Path], kind: dict[str, Any], quantisation: str, closing: list[Streamer]
) -> None:
    """As on a GPU: the rest of each layer through the ring and the embeddings on the host."""
    adapter = adapted(deep(quantisation), **kind)
    expected = [unit_gradient(adapter, unit.records) for unit in UNITS]
    scored = token_losses(adapter.model, batches()[1])[0]
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE, whole=True)
    closing.append(streamer)
    np.testing.assert_array_equal(streamer.gradients(batches(), unit_loss), expected)
    np.testing.assert_array_equal([unit_gradient(adapter, unit.records) for unit in UNITS], expected)
    assert torch.equal(token_losses(adapter.model, batches()[1])[0], scored)
    at_rest = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in [
            *adapter.model.model.layers.named_parameters(),
            *adapter.model.model.layers.named_buffers(),
        ]
        if "lora" not in name and not name.endswith(("_blocks", "_scales", "_codes"))
    }
    assert len(at_rest) == 1, "one buffer holds the layer at work, none any other"
    (count,) = at_rest.values()
    assert count == streamer._ring.stacks[streaming.REST][:16].nbytes


def test_a_rest_of_another_layer_is_noticed(
    deep: Callable[[], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(deep())
    expected = np.stack([unit_gradient(adapter, unit.records) for unit in UNITS])
    own, left = streaming.Rest.gather, [6]

    def once_less(rest: Any, *args: Any) -> None:
        left[0] -= rest._layer != args[0]
        if left[0]:
            own(rest, *args)
        else:
            rest._layer = args[0]

    monkeypatch.setattr(streaming.Rest, "gather", once_less)
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE, whole=True)
    closing.append(streamer)
    found = streamer.gradients(batches(), unit_loss)
    assert np.linalg.norm(found - expected) > 1e-2 * np.linalg.norm(expected)


def test_the_fused_path_reads_the_ring_as_it_reads_a_layer(deep: Callable[[], Path], closing: list[Streamer]) -> None:
    adapter = adapted(deep())
    choose_path(adapter.model, rows=2, wanted="fused", interpreted=True)
    module = adapter.model.model.layers[1].mlp.experts
    hidden = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    call = (hidden, torch.tensor([[15, 2], [2, 7]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    with torch.no_grad():
        at_rest = module(*call)
        closing.append(stream_experts(adapter.model, adapter.trained, units=1, shape=SHAPE))
        assert module.path == "fused"
        for layer, chunk, slot in ((1, 0, 3), (1, 1, 4), (1, 2, 0), (2, 0, 2), (1, 3, 1)):
            closing[0]._ring.fetch(layer, chunk, slot)
        assert torch.equal(module(*call), at_rest)


def test_a_unit_does_not_depend_on_who_shares_its_pass(deep: Callable[[], Path], closing: list[Streamer]) -> None:
    adapter = adapted(deep())
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE)
    closing.append(streamer)
    together = streamer.gradients(batches(), unit_loss)
    backwards = streamer.gradients(batches()[::-1], unit_loss)[::-1]
    alone = np.concatenate([streamer.gradients([batch], unit_loss) for batch in batches()])
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together, alone)
    assert streamer.gradients([], unit_loss).shape == (0, together.shape[1])


@pytest.mark.parametrize("quantisation", ["mxfp4", "nf4"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_fit_says_is_what_streams(
    deep: Callable[[str], Path], kind: dict[str, Any], quantisation: str, closing: list[Streamer]
) -> None:
    folder = deep(quantisation)
    adapter = adapted(folder, **kind)
    found = streaming.planned(read_config(folder), adapter.layout, tokens=40, dtype=torch.float32)
    assert found is not None
    closing.append(stream_experts(adapter.model, adapter.trained, units=1, whole=True))
    assert found[0] == closing[0].load(batches(UNITS[:1]))
    head = adapter.model.lm_head.weight.nbytes + adapter.model.model.norm.weight.nbytes
    assert found[1] == head + closing[0]._ring.stacks[streaming.REST][:16].nbytes


@pytest.mark.parametrize("slots", [4, 5, 16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_resident_is_what_the_plan_says(
    deep: Callable[[], Path], kind: dict[str, Any], slots: int, closing: list[Streamer], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(deep(), **kind)
    streamer = stream_experts(
        adapter.model, adapter.trained, units=4, shape=RingShape(per_chunk=4, chunks=4, slots=slots)
    )
    closing.append(streamer)
    ring, found = streamer._ring, []
    assert sum(stack.nbytes for stack in ring.stacks.values()) == slots * ring.chunk_bytes
    own = streaming._Pass.do

    def measured(run: Any, step: Any) -> None:
        own(run, step)
        there = [] if run.newest is None else [run.newest.nbytes]
        host = run.vectors.nbytes + sum(tensor.nbytes for tensor in run.waiting.values())
        found.append((step, ring.held * ring.chunk_bytes, host, sum(there) + sum(one.nbytes for one in run._pieces)))

    monkeypatch.setattr(streaming._Pass, "do", measured)
    streamer.gradients(batches(), unit_loss)
    load = streamer.load(batches())
    planned = list(residency(load))
    assert [(step, one.ring, one.host) for step, one in planned] == [entry[:3] for entry in found]
    # Of a step's hidden states the newest outlives it alone; the plan counts those that it read as well.
    assert all(one.device - load.ring_bytes >= entry[3] for (_, one), entry in zip(planned, found, strict=True))
    assert max(entry[1] for entry in found) <= load.ring_bytes == slots * ring.chunk_bytes
    assert max(entry[2] for entry in found) == load.host_peak
    fetched = sum(isinstance(entry[0], Fetch) for entry in found)
    assert fetched * ring.chunk_bytes == load.link_bytes


def test_what_a_slot_held_before_is_seen_by_nobody(
    deep: Callable[[], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring whose free slots are overwritten with nonsense gives the same gradients: no reader comes late."""
    adapter = adapted(deep())
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE)
    closing.append(streamer)
    expected = streamer.gradients(batches(), unit_loss)
    ring = streamer._ring
    free = ring.free

    def spoiled(slot: int) -> None:
        free(slot)
        for stack in ring.stacks.values():
            stack[slot * 4 : slot * 4 + 4] = 123

    monkeypatch.setattr(ring, "free", spoiled)
    np.testing.assert_array_equal(streamer.gradients(batches(), unit_loss), expected)


@pytest.mark.parametrize("fault", ["a chunk further", "another expert's bias", "a chunk that never came"])
def test_a_wrong_ring_is_noticed(
    deep: Callable[[], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """With a deliberate fault the comparison fails: the tests here can tell."""
    adapter = adapted(deep())
    expected = np.stack([unit_gradient(adapter, unit.records) for unit in UNITS])
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE)
    closing.append(streamer)
    ring = streamer._ring
    rows = ring.rows
    if fault == "a chunk further":
        monkeypatch.setattr(ring, "rows", lambda layer: (rows(layer)[0].roll(4), rows(layer)[1]))
    elif fault == "another expert's bias":
        monkeypatch.setattr(ring, "rows", lambda layer: (rows(layer)[0], rows(layer)[1].roll(1)))
    else:
        start = HostEngine.start
        monkeypatch.setattr(
            HostEngine, "start", lambda engine, slot, copies: start(engine, slot, copies if slot else copies[:1])
        )
    found = streamer.gradients(batches(), unit_loss)
    assert np.linalg.norm(found - expected) > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("where", [Fetch, Free, streaming.Forward, streaming.Head, streaming.Backward])
def test_an_interruption_leaves_nothing_behind(
    deep: Callable[[], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch, where: type
) -> None:
    adapter = adapted(deep())
    streamer = stream_experts(adapter.model, adapter.trained, units=4, shape=SHAPE)
    closing.append(streamer)
    expected = streamer.gradients(batches(), unit_loss)
    model, layers, norm = adapter.model, adapter.model.model.layers, adapter.model.model.norm
    own, left = streaming._Pass.do, [2]

    def interrupted(run: Any, step: Any) -> None:
        own(run, step)
        if isinstance(step, where):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    monkeypatch.setattr(streaming._Pass, "do", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamer.gradients(batches(), unit_loss)
    monkeypatch.undo()
    assert streamer._ring.held == 0
    assert model.model.layers is layers
    assert model.model.norm is norm
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is streaming._Pass]
    np.testing.assert_array_equal(streamer.gradients(batches(), unit_loss), expected)
    streamer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("expert-copies")]
    np.testing.assert_array_equal(streamer.gradients(batches(), unit_loss), expected, err_msg="opens again")


def test_the_clipped_sum_of_a_step_is_the_same_to_the_bit(deep: Callable[[], Path], closing: list[Streamer]) -> None:
    """Units without an answer, more records than count, and a last pass that is not full."""
    adapter = adapted(deep())
    silent = SyntheticUnit(records=[SyntheticRecord(tokens=np.arange(5, dtype=np.int32), loss_mask=np.zeros(5, bool))])
    units = [*UNITS, silent, *units_of([7, 8, 9], [1], [30])]
    terms = StepTerms(
        l2_clip_norm=1.0, noise_multiplier=0.0, sampling_prob=1.0, expected_units=8, max_records_per_unit=2
    )

    def summed(streamer: Streamer | None) -> tuple[np.ndarray, list[float]]:
        rng = SeededBytes(seed=5, org="ahorn", round_number=2)
        total, scales = clipped_sum(adapter, units, terms=terms, step=2.0**-20, rng=rng, streaming=streamer)
        return total.values, sorted(scales)

    values, scales = summed(None)
    assert values.any()
    closing.append(stream_experts(adapter.model, adapter.trained, units=3, shape=SHAPE))
    streamed, streamed_scales = summed(closing[0])
    np.testing.assert_array_equal(streamed, values)
    assert streamed_scales == scales


def test_losses_without_gradients_stream_too(deep: Callable[[], Path], closing: list[Streamer]) -> None:
    adapter = adapted(deep())
    with torch.no_grad():
        expected = token_losses(adapter.model, batches()[1])[0]
        closing.append(stream_experts(adapter.model, adapter.trained, units=1, shape=SHAPE))
        assert torch.equal(token_losses(adapter.model, batches()[1])[0], expected)


@pytest.mark.parametrize(
    ("experts", "layer_bytes", "shape"),
    [
        (128, 1_692_057_600, (4, 32, 40)),  # 120b
        (32, 423_014_400, (4, 8, 10)),  # 20b
        (16, 16 * (200 << 20), (1, 16, 20)),
        (16, 16, (16, 1, 2)),
        (7, 7 * (30 << 20), (1, 7, 8)),
    ],
)
def test_how_a_layer_is_cut(experts: int, layer_bytes: int, shape: tuple[int, int, int]) -> None:
    found = RingShape.of(experts, layer_bytes)
    assert (found.per_chunk, found.chunks, found.slots) == shape


def test_what_cannot_stream_is_refused(deep: Callable[..., Path]) -> None:
    folder = deep()
    paired = adapted(folder, targets="experts", layers=[1])
    with pytest.raises(ConfigError, match="got one with a pair for each expert"):
        stream_experts(paired.model, paired.trained, units=1)
    adapter = adapted(folder)
    with pytest.raises(ConfigError, match="expected at least one unit a pass, got 0"):
        stream_experts(adapter.model, adapter.trained, units=0)
    with pytest.raises(ConfigError, match="got one outside"):
        stream_experts(adapter.model, [adapter.model.lm_head.weight], units=1)
    with pytest.raises(ConfigError, match="a ring of at least 4 chunks, one layer, got 3"):
        stream_experts(adapter.model, adapter.trained, units=1, shape=RingShape(per_chunk=4, chunks=4, slots=3))
    streamer = stream_experts(adapter.model, adapter.trained, units=1)
    with pytest.raises(ValueError, match="expected at most 1 units a pass, got 4"):
        streamer.gradients(batches(), unit_loss)
    dense = adapted(folder)
    dense.model.model.layers[0].mlp.experts = torch.nn.Identity()
    with pytest.raises(ConfigError, match="got dense ones"):
        stream_experts(dense.model, dense.trained, units=1)


def test_a_copy_between_a_layers_forward_and_backward_changes_nothing_that_it_saved(
    deep: Callable[[str], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next layer's chunks arrive while a layer computes; autograd must not take that for a change of its ring."""
    begun: dict[int, Any] = {}

    def arrive(*_: Any) -> None:
        for slot in list(begun):
            HostEngine._copy(begun.pop(slot))

    monkeypatch.setattr(HostEngine, "start", lambda self, slot, copies: begun.update({slot: copies}))
    monkeypatch.setattr(HostEngine, "wait", lambda self, slot: HostEngine._copy(begun.pop(slot, ())))
    adapter = adapted(deep("mxfp4"))
    closing.append(stream_experts(adapter.model, adapter.trained, units=len(UNITS), shape=SHAPE))
    expected = [unit_gradient(adapter, unit.records) for unit in UNITS]
    for layer in adapter.model.model.layers:
        layer.mlp.experts.register_forward_hook(arrive)
    found = closing[0].gradients(batches(), unit_loss)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_units_that_could_not_wait_on_the_host_are_refused(
    deep: Callable[[str], Path], closing: list[Streamer], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(deep("mxfp4"))
    closing.append(stream_experts(adapter.model, adapter.trained, units=3, shape=SHAPE))
    needed = closing[0].load([batches()[0]] * 3).host_peak
    monkeypatch.setattr(streaming, "host_free", lambda: needed)
    closing[0].require_host(40)
    monkeypatch.setattr(streaming, "host_free", lambda: needed - 1)
    with pytest.raises(ConfigError, match="free host memory for 3 units of 40 tokens to wait in, got"):
        closing[0].require_host(40)


class _Leaking:
    """A pass that leaves a little of each unit's gradient in the next one's."""

    def __init__(self, right: Streamer) -> None:
        self.units, self._right = right.units, right

    def gradients(self, given: Any, loss: UnitLoss) -> Any:
        found = self._right.gradients(given, loss)
        found[1:] += np.float32(1e-4) * found[:-1]
        return found


def test_streamed_gradients_that_depend_on_others_are_refused(
    deep: Callable[[str], Path], closing: list[Streamer]
) -> None:
    adapter = adapted(deep("mxfp4"))
    closing.append(stream_experts(adapter.model, adapter.trained, units=len(UNITS), shape=SHAPE))
    assert streaming_check(adapter, UNITS, closing[0]) == 0.0
    with pytest.raises(PrivacyCheckFailed, match="expected streamed gradients within 0 of those of one unit a forward"):
        streaming_check(adapter, UNITS, _Leaking(closing[0]))
