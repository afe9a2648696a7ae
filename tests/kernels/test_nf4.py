"""NF4 against bitsandbytes, bit for bit in both directions, and without it."""

from __future__ import annotations

import sys

import pytest
import torch
from bitsandbytes import functional
from foedus_kernels import nf4
from torch._subclasses.fake_tensor import FakeTensorMode

# The code book of the paper's appendix E, written out a second time on purpose.
BOOK = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which bitsandbytes cannot be imported."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    nf4._bitsandbytes.cache_clear()
    nf4._decoder.cache_clear()
    yield
    monkeypatch.undo()
    nf4._bitsandbytes.cache_clear()
    nf4._decoder.cache_clear()


def _weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows over forty orders of magnitude, with a group of zeros."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    rows *= torch.logspace(-25, 15, shape[-2]).unsqueeze(-1)
    rows[..., 0, : nf4.GROUP] = 0
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [nf4.decode, nf4.decode_torch])
def test_every_byte_at_many_scales_is_book_times_scale(decode: object, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)  # each byte once
    pairs = torch.tensor([[BOOK[byte >> 4], BOOK[byte & 15]] for byte in range(256)]).view(8, 64)
    for scale in torch.logspace(-30, 30, 200).tolist():
        got = decode(codes, torch.full((8, 1), scale), dtype)  # type: ignore[operator]
        assert torch.equal(got, (pairs * torch.tensor(scale)).to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_encoding_has_the_bits_of_bitsandbytes(dtype: torch.dtype) -> None:
    dense = _weights(3, 40, 192) if dtype != torch.float16 else torch.randn(3, 40, 192)
    dense = dense.to(dtype)
    codes, scales = nf4.encode(dense)
    want, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    assert torch.equal(codes.reshape(-1), want.reshape(-1))
    assert torch.equal(scales.reshape(-1), state.absmax)


def test_values_between_two_codes_and_on_them_round_as_bitsandbytes_does() -> None:
    book = torch.tensor(BOOK)
    middles = (book[:-1] + book[1:]) / 2
    near = [torch.nextafter(middles, torch.tensor(side)) for side in (-2.0, 2.0)]
    values = torch.cat([book, middles, *near, torch.tensor([1.0, -1.0, -0.0])])  # 64 of them
    codes, _ = nf4.encode(values)
    want, _ = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert torch.equal(codes, want.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_has_the_bits_of_bitsandbytes(dtype: torch.dtype) -> None:
    codes, scales = nf4.encode(_weights(2, 40, 128))
    state = functional.QuantState(
        absmax=scales.reshape(-1), shape=torch.Size([2, 40, 128]), dtype=dtype, blocksize=64, quant_type="nf4"
    )
    want = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    for decode in (nf4.decode, nf4.decode_torch):
        assert torch.equal(decode(codes, scales, dtype), want)


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bitsandbytes_the_bits_are_the_same(dtype: torch.dtype) -> None:
    codes, scales = nf4.encode(_weights(2, 40, 128))
    assert nf4._decoder(dtype, "cpu") is nf4.decode_torch
    assert torch.equal(nf4.decode(codes, scales, dtype), nf4.decode_torch(codes, scales, dtype))


def test_with_bitsandbytes_float32_is_its_work() -> None:
    assert nf4._decoder(torch.float32, "cpu") is nf4._decode_library
    assert nf4._decoder(torch.float64, "cpu") is nf4.decode_torch


def test_a_library_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_decode_library", lambda *arguments: nf4.decode_torch(*arguments) * 1.0001)
    nf4._decoder.cache_clear()
    try:
        assert nf4._decoder(torch.float32, "cpu") is nf4.decode_torch
    finally:
        nf4._decoder.cache_clear()


def test_float64_holds_the_values_of_float32() -> None:
    codes, scales = nf4.encode(_weights(4, 64))
    assert torch.equal(nf4.decode(codes, scales, torch.float64), nf4.decode_torch(codes, scales).double())


def test_the_error_is_within_the_stated_bounds() -> None:
    dense = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2))
    codes, scales = nf4.encode(dense)
    error = nf4.decode(codes, scales) - dense
    largest = dense.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True)
    assert float((error.unflatten(-1, (-1, 64)).abs() / largest).max()) <= 0.152
    assert 0.090 < float(error.norm() / dense.norm()) < 0.094
    assert codes.nbytes + scales.nbytes == dense.numel() * 9 // 16  # 4.5 bits a value


def test_what_is_on_the_grid_survives_a_round_trip() -> None:
    codes = torch.randint(0, 256, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    codes[:, ::32] = 0xF0  # Each group has its scale among its values.
    scales = torch.logspace(-20, 20, 64).unsqueeze(-1).repeat(1, 3)
    again, scales_again = nf4.encode(nf4.decode(codes, scales))
    assert torch.equal(scales_again, scales)
    assert torch.equal(again, codes)


def test_a_tensor_that_starts_at_an_odd_byte_decodes_alike() -> None:
    storage = torch.randint(0, 256, (1 + 4 * 32,), dtype=torch.uint8)
    scales = torch.ones(4, 1)
    odd = storage[1:].view(4, 32)
    for decode in (nf4.decode, nf4.decode_torch):
        assert torch.equal(decode(odd, scales), decode(odd.clone(), scales))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_tensors_without_values_decode_to_a_shape_and_leave_nothing_behind(dtype: torch.dtype) -> None:
    codes, scales = nf4.encode(_weights(2, 40, 128))
    want = nf4.decode_torch(codes, scales, dtype)
    nf4._decoder.cache_clear()
    nf4._quad_table.cache_clear()
    with FakeTensorMode() as mode:
        fake = nf4.decode(mode.from_tensor(codes), mode.from_tensor(scales), dtype)
    outside = nf4.decode(mode.from_tensor(codes), mode.from_tensor(scales), dtype)
    meta = nf4.decode(codes.to("meta"), scales.to("meta"), dtype)
    for got in (fake, outside, meta):
        assert (got.shape, got.dtype) == (want.shape, dtype)
    assert (fake.device.type, outside.device.type, meta.device.type) == ("cpu", "cpu", "meta")
    assert torch.equal(nf4.decode(codes, scales, dtype), want), "real tensors decode as ever afterwards"


def test_a_stack_decodes_the_experts_it_is_asked_for() -> None:
    codes, scales = nf4.encode(_weights(5, 6, 128))
    stack = nf4.Nf4Weights(codes, scales)
    whole = nf4.decode(codes, scales)
    assert stack.shape == (5, 6, 128)
    assert stack.nbytes == codes.nbytes + scales.nbytes
    assert torch.equal(nf4.Nf4Weights(*stack.tensors()).decode(range(5), torch.float32), whole)
    for experts in ([2], [1, 2, 3], [0, 3, 4]):
        got = stack.decode(experts, torch.float32)
        assert got.is_contiguous()
        assert torch.equal(got, whole[experts])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: nf4.encode(torch.zeros(2, 96)), "groups of 64 inputs, got 96"),
        (lambda: nf4.encode(torch.zeros(2, 0)), "groups of 64 inputs, got 0"),
        (lambda: nf4.encode(torch.full((2, 64), float("inf"))), "finite"),
        (lambda: nf4.encode(torch.full((2, 64), float("nan"))), "finite"),
        (lambda: nf4.decode(torch.zeros(2, 31, dtype=torch.uint8), torch.zeros(2, 1)), r"\(2, 32\).*got \(2, 31\)"),
        (lambda: nf4.decode(torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, 1)), "got torch.int8"),
        (lambda: nf4.decode(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1).half()), "torch.float16"),
        (
            lambda: nf4.decode(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1), torch.float16),
            "not to torch.float16",
        ),
        (lambda: nf4.Nf4Weights(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)), "a stack of codes"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]
