"""The packed experts against transformers' dense ones, forward and gradient, with one expert always empty."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import experts, grouped, mxfp4, weights
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

E, K, N = 6, 64, 96


def _pair(scale: float = 0.3) -> tuple[GptOssExperts, experts.PackedExperts]:
    """transformers' experts and ours over the same MXFP4 values."""
    generator = torch.Generator().manual_seed(3)
    config = GptOssConfig(num_local_experts=E, hidden_size=K, intermediate_size=N)
    config._experts_implementation = "eager"
    dense = GptOssExperts(config).requires_grad_(False)
    for parameter in dense.parameters():
        parameter.normal_(std=scale, generator=generator)
    gate_up = mxfp4.encode(dense.gate_up_proj.mT)
    down = mxfp4.encode(dense.down_proj.mT)
    dense.gate_up_proj.copy_(mxfp4.decode(*gate_up).mT)
    dense.down_proj.copy_(mxfp4.decode(*down).mT)
    return dense, experts.PackedExperts(
        mxfp4.Mxfp4Weights(*gate_up), dense.gate_up_proj_bias, mxfp4.Mxfp4Weights(*down), dense.down_proj_bias
    )


def _inputs(tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, K, generator=generator).requires_grad_()
    # Expert 2 gets no token, whatever the draw.
    ids = torch.stack([torch.randperm(E - 1, generator=generator)[:top_k] for _ in range(tokens)])
    ids = torch.where(ids >= 2, ids + 1, ids)
    weights = torch.softmax(torch.randn(tokens, top_k, generator=generator), -1).requires_grad_()
    return hidden, ids, weights


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("decode_bytes", [1, 2 * N * K * 4 * 2, grouped.DECODE_BYTES])
def test_equal_to_the_dense_layer(tokens: int, top_k: int, decode_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "DECODE_BYTES", decode_bytes)  # one expert at a time, two, all
    dense, packed = _pair()
    hidden, ids, weights = _inputs(tokens, top_k)
    want = dense(hidden, ids, weights)
    got = experts.experts_torch(hidden, ids, weights, packed, experts.Gate())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9))
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, weights), upstream),
        torch.autograd.grad(want, (hidden, weights), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_the_bits_are_the_same_with_a_gradient_to_come_and_without(tokens: int) -> None:
    _, packed = _pair()
    hidden, ids, weights = _inputs(tokens, 2)
    with_gradient = experts.experts_torch(hidden, ids, weights, packed, experts.Gate())
    assert with_gradient.requires_grad
    with torch.no_grad():
        assert torch.equal(experts.experts_torch(hidden, ids, weights, packed, experts.Gate()), with_gradient)


def test_the_clamps_are_reached_and_cut_the_gradient() -> None:
    dense, packed = _pair(scale=2.0)
    hidden, ids, weights = _inputs(32, 2)
    rows = hidden.detach() @ dense.gate_up_proj[0] + dense.gate_up_proj_bias[0]
    assert bool((rows.abs() > 7).any()), "the inputs must be large enough for the clamps to act"
    want = dense(hidden, ids, weights)
    got = experts.experts_torch(hidden, ids, weights, packed, experts.Gate())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))
    ours, theirs = (torch.autograd.grad(out.sum(), hidden)[0] for out in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_gradient_by_finite_differences() -> None:
    """Independent of transformers: float32 differences of a function that is smooth off the clamps."""
    _, packed = _pair()
    hidden, ids, weights = _inputs(4, 2)
    upstream = torch.randn(4, K, generator=torch.Generator().manual_seed(5))
    direction = torch.randn(4, K, generator=torch.Generator().manual_seed(6))

    def value(step: float) -> float:
        moved = hidden.detach() + step * direction
        out = experts.experts_torch(moved, ids, weights.detach(), packed, experts.Gate())
        return float((out * upstream).sum(dtype=torch.float64))

    (gradient,) = torch.autograd.grad(
        experts.experts_torch(hidden, ids, weights, packed, experts.Gate()), hidden, upstream
    )
    slope = float((gradient * direction).sum(dtype=torch.float64))
    assert (value(1e-2) - value(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-3)


def test_bfloat16_is_close_to_float32() -> None:
    _, packed = _pair()
    hidden, ids, weights = _inputs(64, 2)
    want = experts.experts_torch(hidden.detach(), ids, weights.detach(), packed, experts.Gate())
    half = packed._replace(gate_up_bias=packed.gate_up_bias.bfloat16(), down_bias=packed.down_bias.bfloat16())
    got = experts.experts_torch(hidden.detach().bfloat16(), ids, weights.detach().bfloat16(), half, experts.Gate())
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("decode_bytes", [1, 1 << 20], ids=["an-expert-at-a-time", "all-at-once"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_without_instructions_for_bfloat16_a_product_is_the_rounded_float32_one(
    adjoint: bool, decode_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "DECODE_BYTES", decode_bytes)
    monkeypatch.setattr(grouped, "_multiplies_bfloat16", lambda: False)
    _, packed = _pair()
    stack, rows_of = packed.gate_up, [3, 0, 1, *[0] * (packed.gate_up.shape[0] - 4), 5]
    rows = torch.randn(9, stack.shape[1 if adjoint else 2], generator=torch.Generator().manual_seed(4)).bfloat16()
    got = grouped.product(rows, stack, rows_of, adjoint=adjoint)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, grouped.product(rows.float(), stack, rows_of, adjoint=adjoint).bfloat16())
    monkeypatch.setattr(grouped, "_multiplies_bfloat16", lambda: True)
    torch.testing.assert_close(got, grouped.product(rows, stack, rows_of, adjoint=adjoint))


def test_nothing_decoded_is_kept_for_the_backward() -> None:
    _, packed = _pair()
    hidden, ids, weights = _inputs(8, 2)
    out = experts.experts_torch(hidden, ids, weights, packed, experts.Gate())
    stored = {tensor.data_ptr() for tensor in (*packed.gate_up.tensors(), *packed.down.tensors(), packed.down_bias)}
    kept = [one for one in out.grad_fn.saved_tensors if one is not None and one.data_ptr() not in stored]
    assert kept
    # 16 rows of the widest activation; a decoded stack would hold E * 2N * K = 73,728 elements.
    assert max(tensor.numel() for tensor in kept) <= 16 * 2 * N


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu_in_bfloat16() -> None:
    _, packed = _pair()
    hidden, ids, weights = (tensor.detach() for tensor in _inputs(64, 2))
    want = experts.experts_torch(hidden, ids, weights, packed, experts.Gate())
    moved = experts.PackedExperts(
        mxfp4.Mxfp4Weights(*(tensor.cuda() for tensor in packed.gate_up.tensors())),
        packed.gate_up_bias.bfloat16().cuda(),
        mxfp4.Mxfp4Weights(*(tensor.cuda() for tensor in packed.down.tensors())),
        packed.down_bias.bfloat16().cuda(),
    )
    got = experts.experts_torch(hidden.bfloat16().cuda(), ids.cuda(), weights.bfloat16().cuda(), moved, experts.Gate())
    assert float((got.float().cpu() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("kind", ["mxfp4", "dense"])
@pytest.mark.parametrize("pairs", [0, 1, E])
def test_the_operator_is_registered_with_fakes(tokens: int, kind: str, pairs: int) -> None:
    """torch's own check of schema, autograd and shapes without data, of the forward and the backward operator."""
    _, packed = _pair()
    if kind == "dense":
        every = list(range(E))
        packed = packed._replace(
            gate_up=weights.DenseWeights(packed.gate_up.decode(every, torch.float32)),
            down=weights.DenseWeights(packed.down.decode(every, torch.float32)),
        )
    generator = torch.Generator().manual_seed(7)
    hidden, ids, chosen = _inputs(5, 2)
    hidden, ids, chosen = (one.detach()[:tokens] for one in (hidden, ids, chosen))
    shapes = ((3, K), (2 * N, 3), (3, N), (K, 3))
    matrices = [torch.randn(pairs, *shape, generator=generator).requires_grad_() if pairs else None for shape in shapes]
    stacks = (
        *(weights.codec_of(packed.gate_up), list(packed.gate_up.tensors()), packed.gate_up_bias),
        *(weights.codec_of(packed.down), list(packed.down.tensors()), packed.down_bias),
    )
    constants = (0.5, 1.702, 7.0, 1, "dequantised")
    given = (hidden.requires_grad_(), chosen.requires_grad_(), ids, *stacks, *matrices, *constants)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(experts.experts_forward, given, test_utils=checks)
    _, rows = experts.experts_forward(*given)
    frozen = [None if one is None else one.detach() for one in matrices]
    torch.library.opcheck(
        experts.experts_backward,
        (
            *(torch.ones_like(hidden), rows.detach(), hidden.detach(), chosen.detach(), ids),
            *(stacks[0], stacks[1], stacks[3], stacks[4], stacks[5], *frozen, *constants),
            [True, True, *[bool(pairs)] * 4],
        ),
        test_utils=checks,
    )
