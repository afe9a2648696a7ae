"""What every codec's decoder is to a tracer: an operator with a shape, on tensors that hold no values."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import experts, int8, mxfp4, nf4, weights
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

CODECS = {
    "mxfp4": (mxfp4, mxfp4.Mxfp4Weights, "foedus::mxfp4_decode"),
    "int8": (int8, int8.Int8Weights, "foedus::int8_decode"),
    "nf4": (nf4, nf4.Nf4Weights, None),  # bitsandbytes' own operator, or torch's.
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def stored(codec: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return CODECS[codec][0].encode(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_tensors_without_values_decode_to_a_shape_and_leave_nothing_behind(codec: str, dtype: torch.dtype) -> None:
    """In a fake mode, outside of it and on the meta device; real tensors decode as ever before and after."""
    module = CODECS[codec][0]
    tensors = stored(codec, 3, 40, 128)
    for cached in ("_quad_table", "_pair_table", "_decoder"):
        if hasattr(module, cached):
            getattr(module, cached).cache_clear()
    with FakeTensorMode() as mode:
        fake = module.decode(*map(mode.from_tensor, tensors), dtype)
    outside = module.decode(*map(mode.from_tensor, tensors), dtype)
    meta = module.decode(*(one.to("meta") for one in tensors), dtype)
    assert isinstance(fake, FakeTensor)
    assert isinstance(outside, FakeTensor)
    assert meta.is_meta
    want = module.decode(*tensors, dtype)
    assert not isinstance(want, FakeTensor)
    assert torch.isfinite(want).all()
    for got in (fake, outside, meta):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, dtype, want.stride())
    assert torch.equal(module.decode(*tensors, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("codec", ["mxfp4", "int8"])
@pytest.mark.parametrize("shape", [(3, 40, 128), (0, 4, 64), (64,)])
def test_a_decoder_is_an_operator_with_a_fake(codec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, _, name = CODECS[codec]
    operator = getattr(torch.ops.foedus, name.removeprefix("foedus::")).default
    given = (*stored(codec, *shape), dtype)
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(operator(*given), module.decode_torch(*given))
    assert torch.equal(module.decode(*given), module.decode_torch(*given))


@pytest.mark.parametrize("codec", ["mxfp4", "int8"])
def test_a_tracer_sees_one_operator(codec: str) -> None:
    module, _, name = CODECS[codec]
    traced = make_fx(module.decode, tracing_mode="fake")(*stored(codec, 2, 8, 64), torch.float32)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [str(target) for target in called] == [f"{name.replace('::', '.')}.default"]


@pytest.mark.parametrize("codec", ["mxfp4", "int8"])
def test_what_does_not_fit_is_refused_without_values_too(codec: str) -> None:
    module = CODECS[codec][0]
    codes, scales = (one.to("meta") for one in stored(codec, 2, 8, 64))
    with pytest.raises(ValueError, match="not to"):
        module.decode(codes, scales, torch.float16)
    with pytest.raises(ValueError, match="expected"):
        module.decode(codes[:1], scales, torch.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_a_layer_over_a_codec_is_traced_forward_and_backward(codec: str) -> None:
    """The experts' two operators over stored bytes without values: shapes of the output and of each gradient."""
    _, stack, _ = CODECS[codec]
    packed = experts.PackedExperts(
        stack(*stored(codec, 4, 128, 64)), torch.zeros(4, 128), stack(*stored(codec, 4, 64, 64)), torch.zeros(4, 64)
    )
    hidden, chosen = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])

    def step(hidden, chosen, ids, gate_up_bias, down_bias, *tensors):
        half = len(tensors) // 2
        layer = experts.PackedExperts(stack(*tensors[:half]), gate_up_bias, stack(*tensors[half:]), down_bias)
        hidden, chosen = hidden.detach().requires_grad_(), chosen.detach().requires_grad_()
        out = experts.experts_torch(hidden, ids, chosen, layer, experts.Gate())
        return out, *torch.autograd.grad(out.sum(), (hidden, chosen))

    given = (hidden, chosen, ids, packed.gate_up_bias, packed.down_bias)
    given = (*given, *packed.gate_up.tensors(), *packed.down.tensors())
    want = step(*given)
    with FakeTensorMode() as mode:
        got = step(*map(mode.from_tensor, given))
    assert all(isinstance(one, FakeTensor) for one in got)
    assert [one.shape for one in got] == [one.shape for one in want]


@pytest.mark.parametrize("codec", CODECS)
def test_a_stack_is_made_again_by_its_codecs_name(codec: str) -> None:
    stack = CODECS[codec][1](*stored(codec, 3, 8, 64))
    again = weights.codec(weights.codec_of(stack), stack.tensors())
    assert type(again) is type(stack)
    assert torch.equal(again.decode([0, 2], torch.float32), stack.decode([0, 2], torch.float32))
