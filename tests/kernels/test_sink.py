"""Full and sliding attention with sinks, by stock kernels and a rescale, against the dense masked oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foedus_kernels import sink, stock
from foedus_kernels.records import offsets_of_padding, records_of
from foedus_kernels.sink import sink_attention_torch
from support.attention import Inputs, attention_inputs, dense_attention, everything, last, peak_bytes

SCALE = 0.3


def _both(inputs: Inputs, window: int | None, offsets: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    packed = None if offsets is None else torch.tensor(offsets)
    got = sink_attention_torch(*inputs, scale=SCALE, window=window, offsets=packed)
    return got, dense_attention(inputs, SCALE, everything if window is None else last(window), offsets)


@pytest.mark.parametrize("window", [None, 1, 5, 100, 300])
@pytest.mark.parametrize(
    ("rows", "keys", "queries", "offsets"),
    [
        (1, 1, 1, None),
        (1, 37, 37, None),
        (2, 330, 330, None),  # more than two chunks, the last one short
        (1, 320, 320, None),  # whole chunks
        (2, 330, 200, None),  # a cache
        (2, 330, 1, None),  # decoding
        (2, 33, 33, [0, 1, 5, 33, 34, 66]),  # packed records, of one token too
        (2, 330, 70, [0, 130, 330, 334, 660]),  # a cache and left padding
        (2, 330, 1, [0, 7, 330, 410, 660]),
    ],
)
def test_equals_the_dense_masked_oracle(
    rows: int, keys: int, queries: int, offsets: list[int] | None, window: int | None
) -> None:
    inputs = attention_inputs(rows, keys, queries, dtype=torch.float64)
    got, want = _both(inputs, window, offsets)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (got, want))
    for name, ours, theirs in zip(["q", "k", "v", "sinks"], *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 40])
def test_the_compute_types(dtype: torch.dtype, error: float, window: int | None) -> None:
    exact = attention_inputs(1, 150, 150, width=32, dtype=torch.float64)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    got, want = (sink_attention_torch(*x, scale=0.2, window=window) for x in (inputs, exact))
    assert got.dtype == dtype
    gradients = (torch.autograd.grad(out.double().square().sum(), x) for out, x in ((got, inputs), (want, exact)))
    for ours, theirs in [(got, want), *zip(*gradients, strict=True)]:
        assert float(((ours.double() - theirs).norm() / theirs.norm()).detach()) < error


@pytest.mark.parametrize(("window", "queries"), [(None, 9), (3, 9), (None, 4), (3, 4)])
def test_gradient_by_finite_differences(window: int | None, queries: int) -> None:
    inputs = attention_inputs(1, 9, queries, width=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: sink_attention_torch(*x, scale=SCALE, window=window), inputs)


@pytest.mark.parametrize(("window", "offsets"), [(None, None), (3, torch.tensor([0, 5, 24]))])
def test_the_registered_ops_are_sound(window: int | None, offsets: torch.Tensor | None) -> None:
    inputs = attention_inputs(2, 12, 12, width=4, dtype=torch.float32)
    torch.library.opcheck(sink.sink_forward, (*inputs, offsets, SCALE, window))
    plain = [x.detach() for x in inputs]
    out, lse = sink.sink_forward(*plain, offsets, SCALE, window)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(sink.sink_backward, (out, *plain, out, lse, offsets, SCALE, window), test_utils=tests)


def test_a_sink_that_outweighs_everything_and_one_that_is_nothing() -> None:
    q, k, v, _ = attention_inputs(1, 20, 20, dtype=torch.float32)
    for logit, want in ((200.0, torch.zeros_like(q)), (-200.0, None)):
        sinks = torch.full((4,), logit)
        got = sink_attention_torch(q, k, v, sinks, scale=SCALE)
        if want is None:
            key, value = (x.repeat_interleave(2, 1) for x in (k, v))
            want = torch.nn.functional.scaled_dot_product_attention(q, key, value, is_causal=True, scale=SCALE)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_like_the_sequence(window: int | None) -> None:
    def job(length: int) -> int:
        inputs = attention_inputs(1, length, length, heads=2, kv_heads=1, dtype=torch.float32)
        return peak_bytes(lambda: sink_attention_torch(*inputs, scale=SCALE, window=window).sum().backward())

    job(128)  # What torch allocates once.
    short, long = job(2048), job(4096)
    assert long < 2.2 * short
    assert long < 4096 * 4096 // 2, "not even an eighth of the n x n scores of one head in float32"


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, sinks = attention_inputs(2, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="window of at least 1 key, got 0"):
        sink_attention_torch(q, k, v, sinks, scale=SCALE, window=0)
    with pytest.raises(ValueError, match="ascend from 0 to 16"):
        sink_attention_torch(q, k, v, sinks, scale=SCALE, offsets=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        sink_attention_torch(q, k, v, sinks[:2], scale=SCALE)
    with pytest.raises(ValueError, match="CPU or CUDA device, got meta"):
        sink.attend(*(x.to("meta") for x in (q, k, v)), scale=SCALE, mask=None)


def test_records_of_padding() -> None:
    present = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    offsets = offsets_of_padding(present)
    assert offsets.tolist() == [0, 2, 4, 8, 11, 12, 16, 17, 19, 20]
    places = [(record.row, record.start, record.stop) for record in records_of(offsets, rows=5, keys=4, queries=4)]
    assert places[:4] == [(0, 0, 2), (0, 2, 4), (1, 0, 4), (2, 0, 3)]
    with pytest.raises(ValueError, match="2 separate runs of tokens in row 1"):
        offsets_of_padding(torch.tensor([[1, 1, 1], [1, 0, 1]]).bool())
    with pytest.raises(ValueError, match="1 to 4 queries"):
        records_of(None, rows=1, keys=4, queries=5)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (9, False)])
def test_the_backward_on_cuda_takes_all_keys_in_one_split(
    window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's operator, stood in for by its arguments' meaning: split keys are added in no fixed order."""
    q, k, v, _ = (x.detach() for x in attention_inputs(2, 37, 37, dtype=torch.float32))
    mask = None if window is None else stock.band(37, 37, window, q)
    out, lse = stock.attend(q, k, v, scale=SCALE, mask=mask, causal=causal)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    names = [one.name for one in stock._CUDA_BACKWARD.default._schema.arguments]

    def operator(*given: Any, **named: Any) -> tuple[torch.Tensor | None, ...]:
        known = dict(zip(names, given, strict=False)) | named
        assert known.keys() <= set(names)
        assert (known["num_splits_key"], known["dropout_p"], known["bias_requires_grad"]) == (1, 0.0, False)
        assert (known["cu_seqlens_q"], known["max_seqlen_q"], known["max_seqlen_k"]) == (None, 37, 37)
        assert known["logsumexp"].shape == (2, 4, 64)
        tensors = [known[name].transpose(1, 2) for name in ("grad_out_", "query", "key", "value")]
        # The kernel's strides of `out`, which it does not ask for.
        rows, queries, heads, width = known["out"].shape
        strides = (known["out"].stride(0), heads * width, known["out"].stride(2), 1)
        tensors.append(known["out"].as_strided((rows, queries, heads, width), strides).transpose(1, 2))
        bias = known["bias"]
        found = stock._CPU_BACKWARD(
            *(*tensors, known["logsumexp"][..., :37], 0.0, {0: False, 1: True}[known["custom_mask_type"]]),
            attn_mask=None if bias is None else bias[0, 0],
            scale=known["scale"],
        )
        return *(one.transpose(1, 2) for one in found), None

    monkeypatch.setattr(stock, "_CUDA_BACKWARD", operator)
    got = stock._backward_on_cuda(grad, q, k, v, out, lse, SCALE, mask, causal)
    want = stock.attend_backward(grad, q, k, v, out, lse, scale=SCALE, mask=mask, causal=causal)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("queries", [500, 70, 1])
def test_cuda_equals_the_cpu(window: int | None, queries: int) -> None:
    exact = attention_inputs(2, 500, queries, heads=8, width=64, dtype=torch.float32)
    moved = [x.detach().cuda().requires_grad_() for x in exact]
    options: dict[str, Any] = {"scale": 0.125, "window": window}
    want, got = sink_attention_torch(*exact, **options), sink_attention_torch(*moved, **options)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), moved), torch.autograd.grad(want.square().sum(), exact), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
