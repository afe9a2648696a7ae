"""What each kernel has to move and to multiply, and so the least time that it can take on a card: its roofline.

A kernel is a list of launches that run one after the other. A launch's floor is its bytes over the card's bandwidth or
its FLOPs over the card's rate of products, whichever is longer (Williams, Waterman and Patterson 2009); a kernel's
floor is the sum. Bytes are those that *must* cross to memory: every tensor that goes in or out of a launch once,
weights as they are stored, a token's row once although four experts read it (the others find it in the cache). So
nothing can be faster, and a kernel that is slower has a reason that can be named.

Activations are bfloat16. All experts have rows; FLOPs count products only, two for a multiply and an add, but where
there is none (K0) one for each value. Left out: launches' own time, the router, and the low-rank epilogue of K1 and K2,
which adds 0.4 % of FLOPs at rank 8 and no pass over the rows.

`tests/bench/roofline.py` prints the table of `docs/model.md`, which a test compares with it; `tests/bench/gpu.py`
puts measured times beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foedus_kernels.log_sparse import Pattern, tile_count

_BF16, _FP32 = 2, 4


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card's peaks.

    Attributes:
        name: As it is called.
        flops: bfloat16 products with float32 sums, FLOP a second.
        bandwidth: Of its own memory, bytes a second.
        link: From the host, bytes a second.
        source: Where the figures come from.
    """

    name: str
    flops: float
    bandwidth: float
    link: float
    source: str


H200 = Card(
    name="H200",
    flops=790e12,
    bandwidth=4.3e12,
    link=52e9,
    source="what large products and copies are reported to reach, 80 % and 90 % of the datasheet's 989 TFLOP/s and "
    "4.8 TB/s; pinned copies over PCIe 5 x16",
)
H100 = Card(
    name="H100",
    flops=790e12,
    bandwidth=3.0e12,
    link=52e9,
    source="SXM: the H200's chip with slower memory, so the same shares of the datasheet's 989 TFLOP/s and 3.35 TB/s",
)
CARDS = (H100, H200)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One pass over data: bytes to and from a card's memory, FLOPs, and bytes over the link from the host."""

    name: str
    bytes: int
    flops: int
    link_bytes: int = 0

    def seconds(self, card: Card) -> float:
        """The least time that it takes on a card."""
        return max(self.bytes / card.bandwidth, self.flops / card.flops, self.link_bytes / card.link)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel does at one shape."""

    launches: tuple[Launch, ...]

    @property
    def bytes(self) -> int:
        """Bytes to and from the card's memory."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(launch.flops for launch in self.launches)

    @property
    def link_bytes(self) -> int:
        """Bytes from the host."""
        return sum(launch.link_bytes for launch in self.launches)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, card: Card) -> float:
        """The kernel's floor on a card."""
        return sum(launch.seconds(card) for launch in self.launches)

    def bound(self, card: Card) -> str:
        """What the most of the floor is spent on: ``link``, ``bytes`` or ``FLOPs``."""
        shares = {"link": 0.0, "bytes": 0.0, "FLOPs": 0.0}
        for launch in self.launches:
            times = {
                "link": launch.link_bytes / card.link,
                "bytes": launch.bytes / card.bandwidth,
                "FLOPs": launch.flops / card.flops,
            }
            longest = max(times, key=times.__getitem__)
            shares[longest] += times[longest]
        return max(shares, key=shares.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, as far as kernels see them.

    Attributes:
        name: The preset.
        experts: E.
        layers: Of the whole model.
        top_k: Experts a token.
        hidden: K.
        inner: N; gate and up together have 2N.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        width: Of a head.
        window: Keys that a sliding layer's query sees.
        vocabulary: V.
        rank: R, of the low-rank pairs.
        units: U, privacy units that share a call.
    """

    name: str
    experts: int
    layers: int
    top_k: int = 4
    hidden: int = 2880
    inner: int = 2880
    heads: int = 64
    kv_heads: int = 8
    width: int = 64
    window: int = 128
    vocabulary: int = 201_088
    rank: int = 16
    units: int = 8

    def tokens(self, rows_an_expert: int) -> int:
        """T, for a mean number of rows an expert."""
        return rows_an_expert * self.experts // self.top_k

    @property
    def gate_up_bytes(self) -> int:
        """One layer's packed gate_up matrices with their bfloat16 biases."""
        return self.experts * (packed_bytes(2 * self.inner * self.hidden) + 2 * self.inner * _BF16)

    @property
    def down_bytes(self) -> int:
        """One layer's packed down matrices with their bfloat16 biases."""
        return self.experts * (packed_bytes(self.hidden * self.inner) + self.hidden * _BF16)

    @property
    def values(self) -> int:
        """Values of one layer's matrices."""
        return 3 * self.experts * self.hidden * self.inner


GPT_OSS_120B = Shape(name="gpt-oss-120b", experts=128, layers=36)
GPT_OSS_20B = Shape(name="gpt-oss-20b", experts=32, layers=24)
SHAPES = (GPT_OSS_120B, GPT_OSS_20B)
ROWS = (16, 256)
MOE_16E_32K = Shape(name="moe-16e-32k", experts=16, layers=36, inner=23_680)
RECORDS = (4096, 16384, 32768)
"""Tokens of a record for log-sparse attention, which only this preset has and which long records are for."""


def packed_bytes(values: int) -> int:
    """Bytes of MXFP4: 16 bytes of codes and one of scale for 32 values."""
    return values // 32 * 17


def decode(shape: Shape) -> Work:
    """K0: one layer's matrices to bfloat16. Reads the packed bytes and writes two bytes a value."""
    packed = packed_bytes(shape.values)
    return Work(launches=(Launch(name="decode", bytes=packed + shape.values * _BF16, flops=shape.values),))


def experts_forward(shape: Shape, tokens: int) -> Work:
    """K1: a layer of experts over the packed bytes.

    Gate and up of each row are written for the backward; the activation is written once and read once.
    """
    rows = tokens * shape.top_k
    wide, narrow, out = 2 * shape.inner, shape.inner, shape.hidden
    return Work(
        launches=(
            Launch(
                name="gate_up",
                bytes=shape.gate_up_bytes + (tokens * out + rows * (wide + narrow)) * _BF16,
                flops=2 * rows * out * wide,
            ),
            Launch(
                name="down",
                bytes=shape.down_bytes + rows * (narrow + out) * _BF16,
                flops=2 * rows * narrow * out,
            ),
            Launch(name="combine", bytes=(rows + tokens) * out * _BF16 + rows * _FP32, flops=2 * rows * out),
        )
    )


def experts_backward(shape: Shape, tokens: int) -> Work:
    """K2: gradients of a layer of experts' hidden states and router weights, over the same bytes."""
    rows = tokens * shape.top_k
    wide, narrow, out = 2 * shape.inner, shape.inner, shape.hidden
    return Work(
        launches=(
            Launch(
                name="down, adjoint",
                # In: upstream gradients, gate and up. Out: their gradient, and a number a row for the router.
                bytes=shape.down_bytes + (tokens * out + 2 * rows * wide) * _BF16 + 2 * rows * _FP32,
                flops=2 * rows * narrow * out,
            ),
            Launch(
                name="gate_up, adjoint",
                bytes=shape.gate_up_bytes - shape.experts * wide * _BF16 + rows * (wide + out) * _BF16,
                flops=2 * rows * out * wide,
            ),
            Launch(name="combine", bytes=(rows + tokens) * out * _BF16, flops=rows * out),
        )
    )


def unit_norms(shape: Shape, tokens: int) -> Work:
    """K3: squared norms of the gradients of B of both projections, for each (expert, unit); none is written."""
    rows, outs = tokens * shape.top_k, (2 * shape.inner, shape.hidden)
    segments = shape.experts * shape.units
    return Work(
        launches=tuple(
            Launch(
                name=f"norms of {out} x {shape.rank}",
                bytes=rows * (out + shape.rank) * _BF16 + segments * 8 * 2,
                flops=2 * rows * out * shape.rank + 2 * segments * out * shape.rank,
            )
            for out in outs
        )
    )


def weight_gradient(shape: Shape, tokens: int) -> Work:
    """K3: the sum over units of factor times gradient of B of both projections, float32, one for each expert."""
    rows, outs = tokens * shape.top_k, (2 * shape.inner, shape.hidden)
    return Work(
        launches=tuple(
            Launch(
                name=f"gradient of {out} x {shape.rank}",
                bytes=rows * (out + shape.rank) * _BF16 + rows * _FP32 + shape.experts * out * shape.rank * _FP32,
                flops=2 * rows * out * shape.rank,
            )
            for out in outs
        )
    )


def log_sparse_forward(shape: Shape, tokens: int, pattern: Pattern | None = None) -> Work:
    """K5 forward over one record: two products for each tile that the pattern names, whole diagonal tiles included."""
    pattern = pattern or Pattern()
    pairs = tile_count(tokens, pattern) * pattern.block**2
    return Work(launches=(_attention_forward(shape, tokens, pairs),))


def log_sparse_backward(shape: Shape, tokens: int, pattern: Pattern | None = None) -> Work:
    """K5 backward over one record: five products for each tile."""
    pattern = pattern or Pattern()
    pairs = tile_count(tokens, pattern) * pattern.block**2
    return Work(launches=(_attention_backward(shape, tokens, pairs),))


def log_sparse_both(shape: Shape, tokens: int, pattern: Pattern | None = None) -> Work:
    """K5 forward and backward over one record."""
    passes = (log_sparse_forward(shape, tokens, pattern), log_sparse_backward(shape, tokens, pattern))
    return Work(launches=tuple(launch for one in passes for launch in one.launches))


def log_sparse_decode(shape: Shape, tokens: int, pattern: Pattern | None = None) -> Work:
    """K5 for the newest token of one record: the keys and values of its own O(log n) blocks, each read once."""
    pattern = pattern or Pattern()
    blocks = pattern.key_blocks((tokens - 1) // pattern.block)
    keys = sum(min(pattern.block, tokens - block * pattern.block) for block in blocks)
    states = shape.heads * shape.width
    return Work(
        launches=(
            Launch(
                name="decode",
                bytes=2 * (states + keys * shape.kv_heads * shape.width) * _BF16,
                flops=2 * 2 * keys * states,
            ),
        )
    )


def sink_attention(shape: Shape, tokens: int, window: int | None = None) -> Work:
    """A full or sliding layer with sinks, forward and backward: flash attention, and its output scaled once more."""
    reach = tokens if window is None else min(window, tokens)
    pairs = tokens * reach - reach * (reach - 1) // 2
    states = tokens * shape.heads * shape.width
    return Work(
        launches=(
            _attention_forward(shape, tokens, pairs),
            Launch(name="rescale", bytes=2 * states * _BF16 + 2 * tokens * shape.heads * _FP32, flops=states),
            _attention_backward(shape, tokens, pairs),
        )
    )


def _attention_forward(shape: Shape, tokens: int, pairs: int) -> Launch:
    states, keys = tokens * shape.heads * shape.width, tokens * shape.kv_heads * shape.width
    return Launch(
        name="forward",
        bytes=2 * (states + keys) * _BF16 + tokens * shape.heads * _FP32,
        flops=2 * 2 * pairs * shape.heads * shape.width,
    )


def _attention_backward(shape: Shape, tokens: int, pairs: int) -> Launch:
    states, keys = tokens * shape.heads * shape.width, tokens * shape.kv_heads * shape.width
    return Launch(
        name="backward",
        # In: q, k, v, the output, its gradient, the log-sum-exp. Out: gradients of q, k and v.
        bytes=(4 * states + 4 * keys) * _BF16 + tokens * shape.heads * _FP32,
        flops=5 * 2 * pairs * shape.heads * shape.width,
    )


def cross_entropy(shape: Shape, tokens: int) -> Work:
    """The head's losses and their gradients by the hidden states: two products with the head, no logits in memory."""
    head, rows = shape.vocabulary * shape.hidden * _BF16, tokens * shape.hidden * _BF16
    return Work(
        launches=(
            Launch(
                name="losses and gradients",
                bytes=2 * head + 2 * rows + tokens * (_FP32 + 8),
                flops=2 * 2 * tokens * shape.hidden * shape.vocabulary,
            ),
        )
    )


def layer_copy(shape: Shape) -> Work:
    """K4: one layer's experts from the host into the card's memory."""
    size = shape.gate_up_bytes + shape.down_bytes
    return Work(launches=(Launch(name="copy", bytes=size, flops=0, link_bytes=size),))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A line of the table.

    Attributes:
        name: Of the kernel.
        work: What it does for a shape and a number of tokens.
        by_rows: Whether it depends on the number of tokens.
    """

    name: str
    work: Callable[[Shape, int], Work]
    by_rows: bool = True


KERNELS = (
    Kernel(name="K0 decode", work=lambda shape, _: decode(shape), by_rows=False),
    Kernel(name="K1 experts, forward", work=experts_forward),
    Kernel(name="K2 experts, backward", work=experts_backward),
    Kernel(name="K3 norms", work=unit_norms),
    Kernel(name="K3 weight gradient", work=weight_gradient),
    Kernel(name="K5 log-sparse, forward", work=lambda shape, tokens: log_sparse_forward(shape, tokens)),
    Kernel(name="K5 log-sparse, backward", work=lambda shape, tokens: log_sparse_backward(shape, tokens)),
    Kernel(name="sinks, full layer", work=lambda shape, tokens: sink_attention(shape, tokens)),
    Kernel(name="sinks, sliding layer", work=lambda shape, tokens: sink_attention(shape, tokens, shape.window)),
    Kernel(name="cross-entropy", work=cross_entropy),
    Kernel(name="K4 link", work=lambda shape, _: layer_copy(shape), by_rows=False),
)
"""Attention and cross-entropy at the tokens that give the experts their rows."""

RECORD_KERNELS = (
    Kernel(name="K5 record, forward", work=lambda shape, tokens: log_sparse_forward(shape, tokens)),
    Kernel(name="K5 record, forward and backward", work=lambda shape, tokens: log_sparse_both(shape, tokens)),
    Kernel(name="K5 record, decode", work=lambda shape, tokens: log_sparse_decode(shape, tokens)),
)
"""Log-sparse attention by the length of a record, `RECORDS`, with the heads of `MOE_16E_32K`."""
