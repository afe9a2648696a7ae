"""Low-rank pairs on routed experts against autograd of dense matrices ``W_e + scale * B_e A_e``, and by unit.

The dense layer here is written a second time, a token and a choice at a time, and is never built from the packed one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from foedus_kernels import grouped, int8, mxfp4, nf4
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.weights import DenseWeights

GATE = Gate()
PAIRS = ("both", "gate_up", "down")
MATRICES = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def dense_layer(experts, ins, inner, dtype=torch.float64, seed=0) -> PackedExperts:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)

    return PackedExperts(
        DenseWeights(normal(experts, 2 * inner, ins)),
        normal(experts, 2 * inner),
        DenseWeights(normal(experts, ins, inner)),
        normal(experts, ins),
    )


def packed_layer(experts, ins, inner) -> PackedExperts:
    dense = dense_layer(experts, ins, inner, torch.float32)
    return dense._replace(
        gate_up=mxfp4.Mxfp4Weights(*mxfp4.encode(dense.gate_up.tensors()[0])),
        down=mxfp4.Mxfp4Weights(*mxfp4.encode(dense.down.tensors()[0])),
    )


def pairs_of(layer, pairs, rank, which="both", seed=1) -> ExpertLora:
    generator = torch.Generator().manual_seed(seed)
    dtype = layer.down_bias.dtype
    _, twice, ins = layer.gate_up.shape
    shapes = {"gate_up_a": (rank, ins), "gate_up_b": (twice, rank), "down_a": (rank, twice // 2), "down_b": (ins, rank)}
    return ExpertLora(
        **{
            name: torch.randn(pairs, *shape, generator=generator, dtype=dtype).mul(0.4).requires_grad_()
            if which == "both" or name.startswith(which)
            else None
            for name, shape in shapes.items()
        },
        scale=1.5,
    )


def inputs_of(tokens, ins, allowed, top_k, dtype=torch.float64, seed=2):
    """Hidden states, routing among the allowed experts alone, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, ins, generator=generator, dtype=dtype).requires_grad_()
    drawn = [torch.randperm(len(allowed), generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.tensor(allowed)[torch.stack(drawn)] if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=dtype).requires_grad_()
    return hidden, ids, weights


def by_hand(hidden, ids, weights, layer, lora) -> torch.Tensor:
    """Every matrix built in full, every token and choice on its own."""
    every = range(layer.down.shape[0])
    gate_up, down = (stack.decode(list(every), hidden.dtype) for stack in (layer.gate_up, layer.down))
    if lora.gate_up_a is not None:
        gate_up = gate_up + lora.scale * (lora.gate_up_b @ lora.gate_up_a)
    if lora.down_a is not None:
        down = down + lora.scale * (lora.down_b @ lora.down_a)
    rows = []
    for token in range(hidden.shape[0]):
        total = torch.zeros(hidden.shape[1], dtype=hidden.dtype)
        for choice, expert in enumerate(ids[token].tolist()):
            found = gate_up[expert] @ hidden[token] + layer.gate_up_bias[expert]
            gate, up = found[0::2].clamp(max=GATE.limit), found[1::2].clamp(-GATE.limit, GATE.limit)
            inner = (up + 1) * gate * torch.sigmoid(GATE.alpha * gate)
            total = total + weights[token, choice] * (down[expert] @ inner + layer.down_bias[expert])
        rows.append(total)
    return torch.stack(rows) if rows else hidden * 0


def trained(lora) -> list[torch.Tensor]:
    return [matrix for matrix in lora.matrices() if matrix is not None]


def assert_equal_by_hand(hidden, ids, weights, layer, lora, tolerance) -> None:
    want = by_hand(hidden, ids, weights, layer, lora)
    got = experts_torch(hidden, ids, weights, layer, GATE, lora)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    wrt = (hidden, weights, *trained(lora))
    found = torch.autograd.grad(got, wrt, upstream)
    expected = torch.autograd.grad(want, wrt, upstream, allow_unused=True)
    for ours, theirs in zip((got, *found), (want, *expected), strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (9, 2), (23, 3)])
@pytest.mark.parametrize("decode_bytes", [1, grouped.DECODE_BYTES])
def test_values_and_gradients_equal_the_dense_model(which, pairs, tokens, top_k, decode_bytes, monkeypatch) -> None:
    """Odd widths in float64, expert 2 never chosen; experts decoded one at a time and all at once."""
    monkeypatch.setattr(grouped, "DECODE_BYTES", decode_bytes)
    layer = dense_layer(5, 7, 3)
    hidden, ids, weights = inputs_of(tokens, 7, [0, 1, 3, 4], top_k)
    assert_equal_by_hand(hidden, ids, weights, layer, pairs_of(layer, pairs, 2, which), 1e-12)


@pytest.mark.parametrize("pairs", [1, 5])
def test_on_packed_experts_in_float32(pairs) -> None:
    layer = packed_layer(5, 64, 32)
    hidden, ids, weights = inputs_of(33, 64, [0, 1, 3, 4], 2, torch.float32)
    assert_equal_by_hand(hidden, ids, weights, layer, pairs_of(layer, pairs, 4), 2e-5)


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize(
    "ids",
    [
        [[0], [0], [0], [0]],  # the first expert alone
        [[3], [3], [3]],  # the last
        [[1], [2], [1]],  # none at either end
        [[3], [2], [1], [0]],  # one row each
        [[0, 3], [3, 0]],  # both ends, with a gap
    ],
)
def test_group_boundaries(pairs, ids) -> None:
    layer = dense_layer(4, 6, 5)
    hidden, _, _ = inputs_of(len(ids), 6, [0], 1)
    weights = torch.linspace(0.2, 1.1, len(ids) * len(ids[0]), dtype=torch.float64).view(len(ids), -1).requires_grad_()
    assert_equal_by_hand(hidden, torch.tensor(ids), weights, layer, pairs_of(layer, pairs, 3), 1e-12)


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("row_multiple", [1, 16])
def test_no_tokens(pairs, row_multiple) -> None:
    layer = dense_layer(4, 6, 5)
    lora = pairs_of(layer, pairs, 3)
    hidden, ids, weights = inputs_of(0, 6, [0, 1], 2)
    out = experts_torch(hidden, ids, weights, layer, GATE, lora, row_multiple=row_multiple)
    assert out.shape == (0, 6)
    found = torch.autograd.grad(out.sum(), (hidden, weights, *trained(lora)))
    assert [one.shape for one in found] == [hidden.shape, weights.shape, *(one.shape for one in trained(lora))]
    assert not any(bool(one.any()) for one in found)


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("row_multiple", [1, 4])
def test_gradcheck(which, pairs, row_multiple) -> None:
    layer = dense_layer(3, 4, 3)
    lora = pairs_of(layer, pairs, 2, which)
    hidden, ids, weights = inputs_of(5, 4, [0, 2], 2)

    def layer_of(hidden, weights, *matrices):
        left = iter(matrices)
        given = {name: None if getattr(lora, name) is None else next(left) for name in MATRICES}
        return experts_torch(
            hidden, ids, weights, layer, GATE, ExpertLora(**given, scale=1.5), row_multiple=row_multiple
        )

    assert torch.autograd.gradcheck(layer_of, (hidden, weights, *trained(lora)))


@pytest.mark.parametrize("codec", ["mxfp4", "int8", "nf4"])
@pytest.mark.parametrize("pairs", [1, 2])
def test_gradcheck_over_packed_weights(codec, pairs) -> None:
    """Every codec decodes to float64, so that the gradients over stored bytes are checked to float64's digits too.

    Differences of the decoded layer against the operator's backward, which decodes again: bytes of another expert, or
    in another order, in one of the two directions would show.
    """
    encode, stack = {
        "mxfp4": (mxfp4.encode, mxfp4.Mxfp4Weights),
        "int8": (int8.encode, int8.Int8Weights),
        "nf4": (nf4.encode, nf4.Nf4Weights),
    }[codec]
    dense = dense_layer(2, 64, 64)
    layer = dense._replace(
        gate_up=stack(*encode(dense.gate_up.tensors()[0] * 0.2)), down=stack(*encode(dense.down.tensors()[0] * 0.2))
    )
    lora = pairs_of(layer, pairs, 1)
    hidden, ids, weights = inputs_of(2, 64, [0, 1], 2)

    def layer_of(hidden, weights, *matrices):
        return experts_torch(hidden, ids, weights, layer, GATE, ExpertLora(*matrices, scale=1.5))

    assert torch.autograd.gradcheck(layer_of, (hidden, weights, *trained(lora)))


def test_a_pair_changes_what_the_layer_says_and_b_of_zero_does_not() -> None:
    layer = dense_layer(4, 6, 5)
    hidden, ids, weights = inputs_of(8, 6, [0, 1, 2, 3], 2)
    lora = pairs_of(layer, 4, 2)
    plain = experts_torch(hidden, ids, weights, layer, GATE)
    assert not torch.allclose(experts_torch(hidden, ids, weights, layer, GATE, lora), plain)
    silent = replace(lora, gate_up_b=torch.zeros_like(lora.gate_up_b), down_b=torch.zeros_like(lora.down_b))
    assert torch.equal(experts_torch(hidden, ids, weights, layer, GATE, silent), plain)


@pytest.mark.parametrize("trains", MATRICES)
def test_only_what_requires_a_gradient_gets_one(trains) -> None:
    """A frozen A beside a trained B and the other way round; frozen hidden states."""
    layer = dense_layer(4, 6, 5)
    full = pairs_of(layer, 4, 2)
    hidden, ids, weights = (one.detach() for one in inputs_of(8, 6, [0, 1, 3], 2))
    matrices = {name: getattr(full, name).detach().requires_grad_(name == trains) for name in MATRICES}
    out = experts_torch(hidden, ids, weights, layer, GATE, ExpertLora(**matrices, scale=1.5))
    out.square().sum().backward()
    want = experts_torch(hidden, ids, weights, layer, GATE, full).square().sum()
    (expected,) = torch.autograd.grad(want, getattr(full, trains))
    torch.testing.assert_close(matrices[trains].grad, expected)
    assert all(one.grad is None for name, one in matrices.items() if name != trains)


def test_an_expert_that_nobody_is_routed_to_gets_a_gradient_of_zero() -> None:
    layer = dense_layer(4, 6, 5)
    lora = pairs_of(layer, 4, 2)
    hidden, ids, weights = inputs_of(8, 6, [0, 1, 3], 2)
    found = torch.autograd.grad(experts_torch(hidden, ids, weights, layer, GATE, lora).sum(), trained(lora))
    for one in found:
        assert one[[0, 1, 3]].flatten(1).any(1).all()
        assert not one[2].any()


def test_matrices_are_decoded_a_few_at_a_time(monkeypatch) -> None:
    """Also beside pairs: at most two experts of the widest stack are decoded at once, in both directions."""
    layer = packed_layer(8, 64, 32)
    monkeypatch.setattr(grouped, "DECODE_BYTES", 2 * 64 * 64 * 4)
    asked = []

    def decode(self, experts, dtype):
        asked.append(len(experts))
        return mxfp4.decode(self.blocks[list(experts)], self.scales[list(experts)], dtype)

    monkeypatch.setattr(mxfp4.Mxfp4Weights, "decode", decode)
    hidden, ids, weights = inputs_of(40, 64, list(range(8)), 4, torch.float32)
    lora = pairs_of(layer, 8, 2)
    experts_torch(hidden, ids, weights, layer, GATE, lora).sum().backward()
    assert max(asked) * 32 * 64 <= 2 * 64 * 64
    assert sum(asked) == 4 * 8  # each of the two stacks once in each direction


@pytest.mark.parametrize("pairs", [1, 6])
@pytest.mark.parametrize("which", PAIRS)
def test_an_axis_of_units_gives_each_units_own_gradient(pairs, which) -> None:
    """3 units of 5 tokens in one call against three calls; expert 2 never chosen."""
    units, tokens = 3, 5
    layer = packed_layer(6, 64, 32)
    lora = pairs_of(layer, pairs, 3, which)
    hidden, ids, weights = inputs_of(units * tokens, 64, [0, 1, 3, 4, 5], 2, torch.float32)
    wide = {name: None if one is None else one.expand(units, -1, -1, -1) for name, one in named(lora).items()}
    out = experts_torch(hidden, ids, weights, layer, GATE, ExpertLora(**wide, scale=lora.scale))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(out, [one for one in wide.values() if one is not None], upstream)
    assert all(one.shape[:2] == (units, pairs) for one in found)
    for unit in range(units):
        rows = slice(unit * tokens, (unit + 1) * tokens)
        alone = experts_torch(hidden[rows], ids[rows], weights[rows], layer, GATE, lora)
        torch.testing.assert_close(alone, out[rows], rtol=1e-5, atol=1e-6 * float(out.detach().abs().max()))
        for ours, theirs in zip(found, torch.autograd.grad(alone, trained(lora), upstream[rows]), strict=True):
            torch.testing.assert_close(ours[unit], theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def named(lora) -> dict[str, torch.Tensor | None]:
    return dict(zip(MATRICES, lora.matrices(), strict=True))


def test_what_does_not_fit_is_refused() -> None:
    layer = dense_layer(4, 6, 5)
    lora = pairs_of(layer, 4, 2)
    hidden, ids, weights = inputs_of(3, 6, [0, 1], 2)
    with pytest.raises(ValueError, match="both matrices of the down pair"):
        replace(lora, down_b=None)
    with pytest.raises(ValueError, match="at least one projection"):
        ExpertLora(None, None, None, None, 1.0)
    with pytest.raises(ValueError, match="expected a gate_up pair"):
        replace(lora, gate_up_b=torch.zeros(4, 10, 3, dtype=torch.float64))
    for wrong in (pairs_of(layer, 3, 2), pairs_of(dense_layer(4, 8, 5), 4, 2)):
        with pytest.raises(ValueError, match="low-rank matrices of 1 or 4 pairs"):
            experts_torch(hidden, ids, weights, layer, GATE, wrong)
    two = ExpertLora(*(one.expand(2, -1, -1, -1) for one in lora.matrices()), scale=1.0)
    with pytest.raises(ValueError, match="2 units of one length, got 3 tokens"):
        experts_torch(hidden, ids, weights, layer, GATE, two)
    with pytest.raises(ValueError, match="one number of units"):
        experts_torch(
            hidden[:2], ids[:2], weights[:2], layer, GATE, replace(two, down_a=lora.down_a, down_b=lora.down_b)
        )


@pytest.mark.parametrize("pairs", [0, 1, 6])
def test_a_units_bits_alone_and_in_a_batch(pairs) -> None:
    """Rows padded to multiples of 16: output, its gradient, and each pair's, of every unit alone and of all together.

    Units of 1, 7 and 40 tokens: experts with one row, a few, and more than one multiple.
    """
    layer = packed_layer(6, 64, 32)
    lora = pairs_of(layer, pairs, 4) if pairs else None
    for units, tokens in ((5, 1), (4, 7), (3, 40)):
        hidden, ids, weights = inputs_of(units * tokens, 64, [0, 1, 3, 4, 5], 2, torch.float32)
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))

        def run(first, count, hidden=hidden, ids=ids, weights=weights, upstream=upstream, tokens=tokens):
            rows = slice(first * tokens, (first + count) * tokens)
            wide = [one.detach().expand(count, -1, -1, -1).requires_grad_() for one in lora.matrices()] if lora else []
            given = [hidden[rows].detach().requires_grad_(), weights[rows].detach().requires_grad_()]
            pair = ExpertLora(*wide, scale=1.5) if lora else None
            out = experts_torch(given[0], ids[rows], given[1], layer, GATE, pair, row_multiple=16)
            found = torch.autograd.grad(out, [*given, *wide], upstream[rows])
            by_unit = [one.detach().unflatten(0, (count, tokens)) for one in (out, *found[:2])]
            return [*by_unit, *found[2:]]

        together = run(0, units)
        for unit in range(units):
            for place, (alone, shared) in enumerate(zip(run(unit, 1), together, strict=True)):
                assert torch.equal(alone[0], shared[unit]), (units, tokens, unit, place)
