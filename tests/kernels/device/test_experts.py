"""K1 and K2 in Triton against the reference: ragged routing, pairs, units, a unit's bits, kernels with one fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from foedus_kernels import experts, mxfp4, weights
from foedus_kernels.device import experts as device
from foedus_kernels.device.tiles import tiles_of, unit_offsets
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.testing import assert_close
from support.interpreted import sum_rows_alone
from support.mutants import faulty

E = 5
ALLOWED = [0, 1, 3, 4]  # Expert 2 gets no row, whatever the draw.
GATE = experts.Gate()
MATRICES = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def layer_of(ins: int, inner: int, place, num_experts: int = E) -> experts.PackedExperts:
    where, dtype = place
    generator = torch.Generator().manual_seed(ins + inner)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.5)

    def packed(outs: int, width: int) -> mxfp4.Mxfp4Weights:
        return mxfp4.Mxfp4Weights(*(one.to(where) for one in mxfp4.encode(normal(num_experts, outs, width))))

    return experts.PackedExperts(
        packed(2 * inner, ins),
        normal(num_experts, 2 * inner).to(where, dtype),
        packed(ins, inner),
        normal(num_experts, ins).to(where, dtype),
    )


def inputs_of(tokens: int, ins: int, top_k: int, place, allowed=ALLOWED, seed: int = 2):
    where, dtype = place
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, ins, generator=generator).to(where, dtype).requires_grad_()
    drawn = [torch.randperm(len(allowed), generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.tensor(allowed)[torch.stack(drawn)] if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    chosen = torch.rand(tokens, top_k, generator=generator).to(where, dtype).requires_grad_()
    return hidden, ids.to(where), chosen


def pairs_of(layer: experts.PackedExperts, pairs: int, rank: int) -> ExpertLora | None:
    """None for 0 pairs. Float32, as adapters are, beside rows of any type."""
    if not pairs:
        return None
    generator = torch.Generator().manual_seed(rank)
    _, twice, ins = layer.gate_up.shape
    shapes = ((rank, ins), (twice, rank), (rank, twice // 2), (ins, rank))
    given = [torch.randn(pairs, *shape, generator=generator).mul(0.4).to(layer.down_bias.device) for shape in shapes]
    return ExpertLora(*(one.requires_grad_() for one in given), scale=1.5)


def run(hidden, ids, chosen, layer, lora, path: str) -> list[torch.Tensor]:
    """The output and every gradient, from one upstream gradient."""
    wrt = [hidden, chosen, *([] if lora is None else lora.matrices())]
    out = experts.experts_torch(hidden, ids, chosen, layer, GATE, lora, path=path)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [one for one in wrt if one is not None], upstream)]


def exact(one: torch.Tensor) -> torch.Tensor:
    return one.detach().float().requires_grad_()


def reference(hidden, ids, chosen, layer, lora) -> list[torch.Tensor]:
    """The same values by the reference in float32."""
    wide = layer._replace(gate_up_bias=layer.gate_up_bias.float(), down_bias=layer.down_bias.float())
    return run(exact(hidden), ids, exact(chosen), wide, lora, "dequantised")


def assert_equal(given, close) -> None:
    found = zip(run(*given, "fused"), reference(*given), strict=True)
    for name, (got, want) in zip(("out", "hidden", "weights", *MATRICES), found, strict=False):
        assert_close(got, want, **close, what=name)


@pytest.mark.parametrize(
    ("ins", "inner", "tokens", "top_k", "pairs", "rank"),
    [
        (64, 32, 1, 1, 0, 0),  # one row
        (64, 96, 23, 2, 1, 3),  # a last tile of columns that is not full, a rank below 16
        (96, 64, 37, 3, E, 8),  # several tiles of rows an expert, a width that 64 does not divide
        (32, 64, 9, 4, E, 17),  # a rank above 16
        (64, 64, 20, 2, 0, 0),
    ],
)
def test_equal_to_the_reference(ins, inner, tokens, top_k, pairs, rank, place, close) -> None:
    layer = layer_of(ins, inner, place)
    assert_equal((*inputs_of(tokens, ins, top_k, place), layer, pairs_of(layer, pairs, rank)), close)


@pytest.mark.parametrize(
    "ids",
    [
        [[0]] * 17,  # the first expert alone, one row more than a tile of the interpreter
        [[4], [4]],  # the last
        [[4], [3], [2], [1], [0]],  # one row each
        [[0, 4], [4, 0]],  # both ends, with a gap
    ],
    ids=["first", "last", "each", "ends"],
)
def test_group_boundaries(ids, place, close) -> None:
    layer = layer_of(32, 32, place)
    hidden, _, _ = inputs_of(len(ids), 32, 1, place)
    chosen = torch.linspace(0.2, 1.1, len(ids) * len(ids[0])).view(len(ids), -1).to(*place).requires_grad_()
    assert_equal((hidden, torch.tensor(ids, device=place[0]), chosen, layer, None), close)


def test_the_clamps_are_reached_and_cut_the_gradient(place, close) -> None:
    layer = layer_of(32, 32, place)
    hidden, ids, chosen = inputs_of(16, 32, 2, place)
    hidden = (hidden.detach() * 5).requires_grad_()
    out, rows = device.forward(
        *(hidden.detach(), chosen.detach(), ids, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias),
        *(None, None, None, None, 0.0, GATE.alpha, GATE.limit),
    )
    assert 0.1 < (rows.abs() > GATE.limit).float().mean() < 0.9
    assert torch.isfinite(out).all()
    assert_equal((hidden, ids, chosen, layer, None), close)


@pytest.mark.parametrize("trains", MATRICES)
def test_only_what_requires_a_gradient_gets_one(trains, place, close) -> None:
    layer = layer_of(32, 32, place)
    hidden, ids, chosen = (one.detach() for one in inputs_of(8, 32, 2, place))
    full = pairs_of(layer, E, 4)
    frozen = {name: getattr(full, name).detach().requires_grad_(name == trains) for name in MATRICES}
    out = experts.experts_torch(hidden, ids, chosen, layer, GATE, ExpertLora(**frozen, scale=1.5), path="fused")
    out.float().square().sum().backward()
    wide = layer._replace(gate_up_bias=layer.gate_up_bias.float(), down_bias=layer.down_bias.float())
    want = experts.experts_torch(hidden.float(), ids, chosen.float(), wide, GATE, full).square().sum()
    assert_close(frozen[trains].grad, torch.autograd.grad(want, getattr(full, trains))[0], **close)
    assert all(one.grad is None for name, one in frozen.items() if name != trains)


@pytest.mark.parametrize("pairs", [1, E])
def test_an_axis_of_units_gives_each_units_own_gradient(pairs, place, close) -> None:
    units, tokens = 2, 5
    layer = layer_of(32, 32, place)
    lora = pairs_of(layer, pairs, 3)
    wide = ExpertLora(*(one.detach().expand(units, -1, -1, -1).requires_grad_() for one in lora.matrices()), scale=1.5)
    assert_equal((*inputs_of(units * tokens, 32, 2, place), layer, wide), close)


@pytest.mark.parametrize("pairs", [0, 1, E])
def test_no_tokens(pairs, place) -> None:
    layer = layer_of(32, 32, place)
    found = run(*inputs_of(0, 32, 2, place), layer, pairs_of(layer, pairs, 3), "fused")
    assert found[0].shape == (0, 32)
    assert not any(bool(one.any()) for one in found)


# --- A unit's bits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_alone(place, monkeypatch) -> None:
    """Where a product is the interpreter's, each row is summed on its own."""
    if place[0].type == "cpu":
        sum_rows_alone(monkeypatch)


@pytest.mark.usefixtures("rows_alone")
@pytest.mark.parametrize("pairs", [0, 1, E])
def test_a_units_bits_alone_and_among_others(pairs, place) -> None:
    """The whole layer, forward and backward, without padded rows: every unit alone, and all in two orders."""
    units, tokens, ins = 2, 6, 64
    layer = layer_of(ins, 32, place)
    lora = pairs_of(layer, pairs, 4)
    hidden, ids, chosen = inputs_of(units * tokens, ins, 2, place)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9)).to(hidden)

    def of(*chosen_units: int) -> list[torch.Tensor]:
        rows = torch.cat([torch.arange(tokens) + unit * tokens for unit in chosen_units]).to(place[0])
        count = len(chosen_units)
        wide = [] if lora is None else [one.detach().expand(count, -1, -1, -1) for one in lora.matrices()]
        wide = [one.requires_grad_() for one in wide]
        given = [one.detach()[rows].requires_grad_() for one in (hidden, chosen)]
        pair = ExpertLora(*wide, scale=1.5) if lora else None
        out = experts.experts_torch(given[0], ids[rows], given[1], layer, GATE, pair, path="fused")
        found = torch.autograd.grad(out, [*given, *wide], upstream[rows])
        return [*(one.detach().unflatten(0, (count, tokens)) for one in (out, *found[:2])), *found[2:]]

    together, turned = of(0, 1), of(1, 0)
    for unit in range(units):
        for alone, first, second in zip(of(unit), together, turned, strict=True):
            assert torch.equal(alone[0], first[unit])
            assert torch.equal(alone[0], second[1 - unit])


def test_tiles_follow_from_the_shape_and_the_type_alone() -> None:
    """No count of rows goes into a size, and the widths of gpt-oss take the same tiles in every product."""
    assert device.blocks_of(2880, torch.bfloat16) == device.blocks_of(5760, torch.bfloat16)
    assert device.blocks_of(96, torch.bfloat16).inner == 32


# --- The map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 3), (40, 2), (0, 2)])
def test_the_map_has_every_row_once_and_one_expert_a_tile(tokens, top_k, block, place) -> None:
    _, ids, _ = inputs_of(tokens, 4, top_k, place)
    tiles = tiles_of(ids, E, block)
    flat = ids.flatten().cpu()
    assert len(tiles.expert) == flat.numel() // block + min(E, flat.numel())
    assert torch.equal(tiles.order[tiles.places].cpu(), torch.arange(flat.numel()))
    found: list[tuple[int, int]] = []
    for expert, first in zip(tiles.expert.tolist(), tiles.first.tolist(), strict=True):
        if expert < E:
            stop = min(first + block, int(tiles.offsets[expert + 1]))
            assert first < stop
            found += [(expert, int(tiles.order[row])) for row in range(first, stop)]
    # Sorted by expert, rows of one expert in the order of the tokens.
    assert found == sorted((int(expert), place) for place, expert in enumerate(flat))
    if tokens == 40:
        for units in (1, 4, 8):
            keys = sorted((int(expert), place * units // flat.numel()) for place, expert in enumerate(flat))
            want = [sum(key < (e, u) for key in keys) for e in range(E) for u in range(units)]
            assert unit_offsets(ids, tiles, units, E).tolist() == [*want, flat.numel()]


def test_no_value_is_brought_to_the_host(place, monkeypatch) -> None:
    layer = layer_of(32, 32, place)
    lora = pairs_of(layer, E, 4)
    hidden, ids, chosen = (one.detach() for one in inputs_of(8, 32, 2, place))
    pairs = (*(one.detach() for one in lora.matrices()), 1.5, GATE.alpha, GATE.limit)
    packed = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)

    class HostValue(Exception):
        pass

    def refuse(*_: object) -> None:
        raise HostValue

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__len__"):
            patch.setattr(torch.Tensor, name, refuse)
        _, rows = device.forward(hidden, chosen, ids, *packed, *pairs)
        device.backward(hidden, rows, hidden, chosen, ids, packed[0], packed[2], packed[3], *pairs, [True] * 6)
        with pytest.raises(HostValue):
            experts.experts_torch(hidden, ids, chosen, layer, GATE, lora)


@pytest.mark.gpu
def test_no_launch_waits_for_the_device() -> None:
    place = torch.device("cuda"), torch.bfloat16
    layer = layer_of(64, 64, place)
    given = (*inputs_of(40, 64, 2, place), layer, pairs_of(layer, E, 4))
    run(*given, "fused")
    upstream = torch.ones_like(given[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.experts_torch(*given[:4], GATE, given[4], path="fused").backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_matrices_further_than_32_bits_from_the_first(place, tmp_path) -> None:
    """More than 2^31 bytes of codes lie before the experts that are chosen. On a CPU they are a file of holes."""
    far, near, ins = (1 << 20) + 8, 8, 64
    small = layer_of(ins, 32, place, near)

    def stretched(name: str, values: torch.Tensor) -> torch.Tensor:
        shape = (far, *values.shape[1:])
        if place[0].type == "cpu":
            size = far * values[0].numel()
            whole = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=values.dtype).view(shape)
        else:
            whole = torch.zeros(shape, device=place[0], dtype=values.dtype)
        whole[-near:] = values
        return whole

    tensors = (*small.gate_up.tensors(), small.gate_up_bias, *small.down.tensors(), small.down_bias)
    wide = [stretched(str(place), one) for place, one in enumerate(tensors)]
    assert wide[0][:-near].numel() >= 2**31
    large = experts.PackedExperts(mxfp4.Mxfp4Weights(*wide[:2]), wide[2], mxfp4.Mxfp4Weights(*wide[3:5]), wide[5])
    hidden, ids, chosen = inputs_of(4, ins, 2, place, [1, 3, 4, 7])
    want = run(hidden, ids, chosen, small, None, "fused")
    for got, same in zip(run(hidden, ids + (far - near), chosen, large, None, "fused"), want, strict=True):
        assert torch.equal(got, same)


@pytest.mark.gpu
def test_rows_of_more_than_2_to_31_elements() -> None:
    """400,000 rows of 5,760: gate and up of the last row lie beyond 2^31 elements."""
    place = torch.device("cuda"), torch.bfloat16
    layer = layer_of(64, 2880, place)
    hidden, ids, chosen = (one.detach() for one in inputs_of(8, 64, 2, place))
    many = 200_000
    repeated = [one.repeat(many // 8, 1) for one in (hidden, ids, chosen)]
    given = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
    constants = (None, None, None, None, 0.0, GATE.alpha, GATE.limit)
    out, rows = device.forward(repeated[0], repeated[2], repeated[1], *given, *constants)
    assert rows.numel() > 2**31
    want, _ = device.forward(hidden, chosen, ids, *given, *constants)
    assert torch.equal(out[-8:], want)
    assert torch.equal(out[:8], want)


# --- Kernels with one fault -------------------------------------------------------------------------------------------

# What stands in the source, and what is written in its place.
FAULTS = {
    "no bias": ("(total + bias[None, :])", "(total + 0.0 * bias[None, :])"),
    "the next expert's matrix": ("matrix = expert * N + column", "matrix = (expert + 1) % E * N + column"),
    "the next expert's matrix, adjoint": ("matrix = expert * N + n", "matrix = (expert + 1) % E * N + n"),
    "groups of a neighbour": ("scales_at += INNER // 32", "scales_at += 0"),
    "groups of a neighbour, adjoint": ("scales_at += INNER * (K // 32)", "scales_at += 0"),
    "an expert's rows one late": ("tl.load(first_ptr + tile) +", "tl.load(first_ptr + tile) + 1 +"),
    "gate and up in halves": (
        "tl.split(tl.reshape(result.to(tl.float32), (ROWS, COLUMNS // 2, 2)))",
        "tl.split(tl.trans(tl.reshape(result.to(tl.float32), (ROWS, 2, COLUMNS // 2)), 0, 2, 1))",
    ),
    "the gate is not clamped": ("gate = tl.minimum(gate, limit)", "gate = gate + 0.0 * limit"),
    "the clamp passes the gradient": ("tl.where(raw_gate > limit, 0.0, adjoint * up * slope)", "adjoint * up * slope"),
    "choices are not weighed": ("values *= tl.load(weights_ptr", "values *= 0.5 + 0.0 * tl.load(weights_ptr"),
    "the bias is left out of a weight's gradient": (
        "total += grad * tl.load(bias_at",
        "total += 0.0 * tl.load(bias_at",
    ),
    "a pair's last column is lost": ("matrix_at, mask=(r < RANK)[None, :]", "matrix_at, mask=(r < RANK - 1)[None, :]"),
    "a pair is not scaled": ("total += scale * tl.dot(low", "total += tl.dot(low"),
    "a pair is not scaled, adjoint": ("total += scale * tl.dot(outer", "total += tl.dot(outer"),
    "the first expert's pair": ("pair = matrix - expert * N if SHARED else matrix", "pair = matrix - expert * N"),
    "the first expert's pair, adjoint": ("r.to(tl.int64) if SHARED else expert * RANK + r", "r.to(tl.int64)"),
    "segments one row late": ("order, offsets = None, unit_offsets(", "order, offsets = None, 1 + unit_offsets("),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_with_one_fault_is_seen(fault, place, close, tmp_path, monkeypatch) -> None:
    wrong = faulty(device, *FAULTS[fault], tmp_path, monkeypatch)
    monkeypatch.setattr(experts, "_fused", lambda: wrong)
    layer = layer_of(64, 32, place)
    hidden, ids, chosen = inputs_of(5, 64, 2, place)
    given = ((hidden.detach() * 3).requires_grad_(), ids, chosen, layer, pairs_of(layer, E, 4))
    with pytest.raises(AssertionError):
        assert_equal(given, close)


def test_swapped_nibbles_and_unsorted_rows_are_seen(place, close, monkeypatch) -> None:
    layer = layer_of(64, 32, place)
    given = (*inputs_of(10, 64, 2, place), layer, None)
    assert_equal(given, close)
    codes = layer.gate_up.blocks
    swapped = replace(layer.gate_up, blocks=(codes << 4) | (codes >> 4))
    with pytest.raises(AssertionError):
        assert_close(run(*given[:3], layer._replace(gate_up=swapped), None, "fused")[0], reference(*given)[0], **close)

    def unsorted(expert_ids, num_experts, block):
        tiles = tiles_of(expert_ids, num_experts, block)
        return tiles._replace(order=torch.arange(len(tiles.order), device=tiles.order.device))

    monkeypatch.setattr(device, "tiles_of", unsorted)
    with pytest.raises(AssertionError):
        assert_equal(given, close)


# --- The operators and the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [0, E])
def test_the_operators_fakes_hold_on_this_path(pairs, place) -> None:
    layer = layer_of(32, 32, place)
    lora = pairs_of(layer, pairs, 3)
    hidden, ids, chosen = inputs_of(3, 32, 2, place)
    matrices = [None] * 4 if lora is None else list(lora.matrices())
    stacks = (
        *(weights.codec_of(layer.gate_up), list(layer.gate_up.tensors()), layer.gate_up_bias),
        *(weights.codec_of(layer.down), list(layer.down.tensors()), layer.down_bias),
    )
    constants = (0.5, GATE.alpha, GATE.limit, 16, "fused")  # Rows are padded on the other path alone.
    given = (hidden, chosen, ids, *stacks, *matrices, *constants)
    torch.library.opcheck(experts.experts_forward, given, test_utils=("test_schema", "test_faketensor"))
    _, rows = experts.experts_forward(*given)
    assert rows.shape == (ids.numel(), 64)
    frozen = [None if one is None else one.detach() for one in matrices]
    torch.library.opcheck(
        experts.experts_backward,
        (
            *(torch.ones_like(hidden), rows.detach(), hidden.detach(), chosen.detach(), ids),
            *(stacks[0], stacks[1], stacks[3], stacks[4], stacks[5], *frozen, *constants),
            [True, True, *[bool(pairs)] * 4],
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("targets", ["attention", "experts-shared", "experts"])
def test_a_whole_model_on_this_path_equals_the_other(targets, caplog) -> None:
    """Logits, and the gradient of every matrix of an adapter, of a small gpt-oss in float32."""
    # Here, because the kernels' own tests run where the packages above them are not installed.
    from foedus_model.adapter import attach
    from foedus_model.experts import choose_path
    from foedus_protocols.layout import adapter_layout
    from support.quantised import VOCABULARY, small_model

    model = small_model("mxfp4")
    layout = adapter_layout(model.config.to_dict(), rank=4, train="both", targets=targets)
    adapter = attach(model, layout, seed="public", alpha=8.0, rank=4)
    adapter.load_vector((np.random.default_rng(5).normal(size=layout.length) * 0.1).astype(np.float32))
    ids = torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))

    def found(path: str) -> list[torch.Tensor]:
        with caplog.at_level("INFO", logger="foedus_model"):
            choose_path(model, rows=8, wanted=path, interpreted=True)
        assert caplog.messages[-1] == f"experts: {path}, since it was asked for"
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        return [logits.detach(), *torch.autograd.grad(loss, adapter.trained)]

    want, got = found("dequantised"), found("fused")
    names = ["logits", *(tensor.name for tensor in layout.trained())]
    assert any(not torch.equal(one, other) for one, other in zip(got, want, strict=True)), "another path ran"
    for name, one, other in zip(names, got, want, strict=True):
        assert float(other.norm()) > 0
        assert_close(one, other, max_relative=2e-4, rms=2e-5, what=name)


def test_what_the_kernels_do_not_take_is_refused(place, monkeypatch) -> None:
    layer = layer_of(32, 32, place)
    hidden, ids, chosen = (one.detach() for one in inputs_of(3, 32, 2, place))

    def layer_with(**changes: object) -> None:
        experts.experts_torch(hidden, ids, chosen, layer._replace(**changes), GATE, path="fused")

    dense = weights.DenseWeights(layer.down.decode(range(E), torch.float32))
    with pytest.raises(ValueError, match=r"experts in MXFP4 .* got Mxfp4Weights and DenseWeights"):
        layer_with(down=dense)
    with pytest.raises(ValueError, match=r"float32 or bfloat16 .* got torch.float64"):
        experts.experts_torch(hidden.double(), ids, chosen, layer, GATE, path="fused")
    with pytest.raises(ValueError, match="expected a path among"):
        experts.experts_torch(hidden, ids, chosen, layer, GATE, path="quick")
    with pytest.raises(ValueError, match="int64 expert ids"):
        experts.experts_torch(hidden, ids.int(), chosen, layer, GATE, path="fused")
    if place[0].type == "cpu":
        with pytest.raises(ValueError, match="float32 in Triton's interpreter"):
            experts.experts_torch(hidden.bfloat16(), ids, chosen, layer, GATE, path="fused")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="on a CUDA device"):
            layer_with()
