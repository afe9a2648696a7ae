"""K1 and K2 in Triton: a layer of experts over packed MXFP4, forward and backward, no decoded matrix in memory.

What one program does stands in `experts_kernels.py`; here is what a call of the layer launches, and in what order::

    forward    x A^T; x W^T of gate_up, with all that follows it up to the SwiGLU; the same of down; each token's sum
    backward   g B; g W of down; the SwiGLU's slopes and the weights' gradient; g B and g W of gate_up; each token's sum

and between them K3 (`clip.py`) for the gradients of the pairs that train.

Saved for the backward is what the reference saves, gate and up of each row. Bytes and FLOPs of a layer of gpt-oss-120b
(128 experts, 2880 wide, packed 1.69 GB), forward (K1) and backward (K2), which reads the same matrices; floors on an
H100 (3.35 TB/s) and an H200 (4.8 TB/s), both with 989 TFLOP/s in bfloat16::

                          rows' bytes   FLOPs     H100                   H200
    K1   16 rows an expert  0.09 GB     0.10 T      531 us (memory)        370 us (memory)
         256                1.37 GB     1.63 T    1,648 us (arithmetic)  1,648 us (arithmetic)
    K2   16                 0.14 GB     0.10 T      548 us (memory)        383 us (memory)
         256                2.31 GB     1.63 T    1,648 us (arithmetic)  1,648 us (arithmetic)

These are floors by arithmetic; nothing was measured. A tile of weights is decoded again for every tile of rows: 279
instructions a warp for 8,192 values (`mxfp4.py`), which for up to 128 rows an expert is 0.94 ms of an H100's issue
slots a layer, beside 0.82 ms of its tensor cores. These, and not the memory, bound the layer at 16 rows an expert.

Batch-invariance: a row's result is a function of that row alone. Every row is summed over one width in blocks of one
size, in order, in float32; tiles follow from widths and type and never from the number of rows; nothing is added
atomically; what several rows share (the gradients of low-rank matrices) is K3's, by segments of a unit.

No value comes to the host (`tiles.py`). Types: float32 (for tests: products are IEEE, not TF32) and bfloat16, with
float32 sums; a low-rank product is rounded to the rows' type before its second factor, as the reference does.

Source: tiles over a device-made map after `triton_kernels` and MegaBlocks; the adjoint over the packed layout is ours.
Left out: swizzled copies of the matrices (the released bytes stay as they are), tensor memory descriptors, a persistent
grid, tiles by a run's rows an expert, and the slopes in the epilogue of the down product's adjoint: with tiles of this
size their registers spill (4.3 KB a thread on sm_90).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from foedus_kernels import backend
from foedus_kernels.device import clip
from foedus_kernels.device import experts_kernels as kernels
from foedus_kernels.device.guard import on_its_device
from foedus_kernels.device.tiles import Tiles, tiles_of, unit_offsets
from foedus_kernels.expert_lora import Pair
from foedus_kernels.mxfp4 import Mxfp4Weights
from foedus_kernels.weights import ExpertWeights

_ALIGNMENT = 16  # Bytes: rows elsewhere are copied, so that one compiled code, with one order of sums, serves all.
_MOST_PROGRAMS = 2**31 - 1  # Of a launch's first axis.
_COLUMNS = 1024  # At once, of `combine_kernel` and `slopes_kernel`. Not measured.
_RANK = 16  # A product needs 16 of each axis.


class Blocks(NamedTuple):
    """How a product is cut: a function of its widths and its type, never of its rows."""

    rows: int
    columns: int  # of the result
    inner: int  # of the axis that is summed over
    warps: int
    stages: int


def blocks_of(inner: int, dtype: torch.dtype) -> Blocks:
    """The tiles of a product over a width. Not measured: the largest for which sm_80, sm_90 and sm_100 spill nothing.

    128 rows a tile, because a tile of weights is decoded once for each tile of rows. The width is a multiple of 32.
    """
    if dtype == torch.float32:
        return Blocks(rows=16, columns=64, inner=32, warps=4, stages=2)
    return Blocks(rows=128, columns=128, inner=64 if inner % 64 == 0 else 32, warps=8, stages=3)


class _Layer(NamedTuple):
    """What every launch of a call shares."""

    tiles: Tiles
    experts: int
    choices: int
    scale: float
    alpha: float
    limit: float

    def forward(
        self,
        rows: torch.Tensor,
        stack: Mxfp4Weights,
        bias: torch.Tensor,
        pair: Pair | None,
        *,
        gathered: bool,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x W^T`` with all that follows it: (S, outs). With `inner` [S, outs / 2] also the SwiGLU, into it."""
        _, outs, ins = stack.shape
        blocks = blocks_of(ins, rows.dtype)
        out = rows.new_empty(self.tiles.order.shape[0], outs)
        low = None if pair is None else self.narrow(rows, pair.a.mT, gathered=gathered)  # (S, R)
        self._launch(
            kernels.forward_kernel,
            *(blocks, outs),
            *(rows, *_packed(stack), _ready(bias), *_or(rows, low, None if pair is None else pair.b)),
            *(*self.map(), out, rows if inner is None else inner, *self.constants()),
            *(self.experts, outs, ins, self.choices if gathered else 0, *_rank(pair), inner is not None),
        )
        return out

    def adjoint(
        self,
        rows: torch.Tensor,
        stack: Mxfp4Weights,
        pair: Pair | None,
        outer: torch.Tensor | None,
        *,
        gathered: bool,
    ) -> torch.Tensor:
        """``g W`` and the pair's part of it: (S, ins)."""
        _, outs, ins = stack.shape
        blocks = blocks_of(outs, rows.dtype)
        out = rows.new_empty(self.tiles.order.shape[0], ins)
        self._launch(
            kernels.adjoint_kernel,
            *(blocks, ins),
            *(rows, *_packed(stack), *_or(rows, outer, None if pair is None else pair.a), *self.map(), out),
            *(self.scale, self.experts, outs, ins, self.choices if gathered else 0, *_rank(pair)),
        )
        return out

    def through_activation(
        self,
        adjoint: torch.Tensor,
        gate_up: torch.Tensor,
        grad: torch.Tensor,
        bias: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        *,
        inner: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From ``g W_down`` (S, N) the gradients of gate and up (S, 2N) and of the weights, float32 (T, top-k).

        With `inner` (S, N) also what gate and up gave, into it.
        """
        out, by_weight = torch.empty_like(gate_up), torch.empty_like(weights)
        rows, width = adjoint.shape
        columns = min(_COLUMNS, triton.next_power_of_2(max(width, grad.shape[1])))
        kernels.slopes_kernel[(_programs(rows),)](
            *(adjoint, gate_up, grad, _ready(bias), weights, _ready(expert_ids), self.tiles.order),
            *(out, out if inner is None else inner, by_weight, self.alpha, self.limit),
            *(width, grad.shape[1], self.choices, inner is not None, columns),
        )
        return out, by_weight

    def narrow(self, rows: torch.Tensor, matrix: torch.Tensor, *, gathered: bool) -> torch.Tensor:
        """Rows with a narrow matrix [P, K, R] of each expert or of all: (S, R), R padded to 16 with zeros."""
        pairs, width, rank = matrix.shape
        blocks = blocks_of(width, rows.dtype)
        padded = _padded(rank)
        out = rows.new_empty(self.tiles.order.shape[0], padded)
        kernels.narrow_kernel[(self.tiles.expert.shape[0],)](
            *(rows, matrix, *self.map(), out),
            *(self.experts, width, self.choices if gathered else 0, rank, padded, pairs == 1, *matrix.stride()[1:]),
            *(blocks.rows, blocks.inner),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return out

    def combine(self, rows: torch.Tensor, like: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's rows, times their weights: (S, K) -> (T, K)."""
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        tokens, width = out.shape
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        kernels.combine_kernel[(_programs(tokens * triton.cdiv(width, columns)),)](
            *(rows, self.tiles.places, rows if weights is None else weights, out),
            *(width, self.choices, weights is not None, columns),
        )
        return out

    def map(self) -> tuple[torch.Tensor, ...]:
        """The tiles, as every kernel takes them."""
        return self.tiles.order, self.tiles.expert, self.tiles.first, self.tiles.offsets

    def constants(self) -> tuple[float, float, float]:
        """Of the low-rank pairs and of the SwiGLU."""
        return self.scale, self.alpha, self.limit

    def _launch(self, kernel: triton.JITFunction, blocks: Blocks, columns: int, *arguments: object) -> None:
        programs = _programs(self.tiles.expert.shape[0] * triton.cdiv(columns, blocks.columns))
        kernel[(programs,)](
            *(*arguments, blocks.rows, blocks.columns, blocks.inner),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


@on_its_device
def forward(
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: ExpertWeights,
    gate_up_bias: torch.Tensor,
    down: ExpertWeights,
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    scale: float,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `experts_forward` on a GPU: the output [T, K], and gate and up of each row [T * top-k, 2N].

    Raises:
        ValueError: Another codec than MXFP4, another type than float32 and bfloat16, or tensors on several devices.
    """
    gate_up, down = _require(hidden, gate_up, down)
    if not expert_ids.numel():
        return torch.zeros_like(hidden), hidden.new_empty(0, gate_up.shape[1])
    layer = _layer(hidden, expert_ids, down_bias, scale, alpha, limit)
    hidden = _ready(hidden)
    inner = hidden.new_empty(expert_ids.numel(), down.shape[2])  # (S, N)
    pair = _pair(gate_up_a, gate_up_b, scale, hidden.dtype)
    found = layer.forward(hidden, gate_up, gate_up_bias, pair, gathered=True, inner=inner)  # (S, 2N)
    pair = _pair(down_a, down_b, scale, hidden.dtype)
    outputs = layer.forward(inner, down, down_bias, pair, gathered=False)  # (S, K)
    return layer.combine(outputs, hidden, _ready(expert_weights.float())), found


@on_its_device
def backward(
    grad: torch.Tensor,
    gate_up_rows: torch.Tensor,
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    scale: float,
    alpha: float,
    limit: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The operator `experts_backward` on a GPU: the gradients of hidden, expert weights and four low-rank matrices.

    Raises:
        ValueError: As `forward`.
    """
    gate_up, down = _require(grad, gate_up, down)
    shaped = (hidden, expert_weights, gate_up_a, gate_up_b, down_a, down_b)
    if not expert_ids.numel():
        return [
            torch.zeros_like(one, memory_format=torch.contiguous_format)
            if need and one is not None
            else grad.new_empty(0)
            for one, need in zip(shaped, needs, strict=True)
        ]
    found = [grad.new_empty(0) for _ in needs]
    layer = _layer(grad, expert_ids, down_bias, scale, alpha, limit)
    grad, gate_up_rows = _ready(grad), _ready(gate_up_rows)
    weights = _ready(expert_weights.float())
    pair = _pair(down_a, down_b, scale, grad.dtype)
    outer = layer.narrow(grad, pair.b, gathered=True) if pair else None  # (S, R)
    adjoint = layer.adjoint(grad, down, pair, outer, gathered=True)  # (S, N)
    inner = torch.empty_like(adjoint) if needs[4] or needs[5] else None
    slopes, by_weight = layer.through_activation(
        *(adjoint, gate_up_rows, grad, down_bias, weights, expert_ids), inner=inner
    )  # (S, 2N), (T, top-k)
    del adjoint
    if needs[1]:
        found[1] = by_weight.to(expert_weights.dtype)
    if pair and outer is not None and inner is not None:
        by_row = weights.flatten().index_select(0, layer.tiles.order).unsqueeze(1).to(grad.dtype)  # (S, 1)
        sorted_grad = _gathered(grad, layer).mul_(by_row) if needs[5] else None
        found[4:6] = _pair_gradients(layer, expert_ids, down_a, pair, sorted_grad, outer * by_row, inner, needs[4:6])
        del sorted_grad
    del inner
    if not any((needs[0], needs[2], needs[3])):
        return found
    pair = _pair(gate_up_a, gate_up_b, scale, grad.dtype)
    outer = layer.narrow(slopes, pair.b, gathered=False) if pair else None
    if pair and outer is not None and (needs[2] or needs[3]):
        inputs = _gathered(_ready(hidden), layer)
        found[2:4] = _pair_gradients(layer, expert_ids, gate_up_a, pair, slopes, outer, inputs, needs[2:4])
        del inputs
    if needs[0]:
        found[0] = layer.combine(layer.adjoint(slopes, gate_up, pair, outer, gathered=False), hidden)
    return found


def _pair_gradients(
    layer: _Layer,
    expert_ids: torch.Tensor,
    matrix: torch.Tensor | None,
    pair: Pair,
    grad: torch.Tensor | None,
    outer: torch.Tensor,
    inputs: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients of A and B, by the segments of `expert_lora.Segments`, without a value on the host.

    Args:
        layer: With the tiles of this call.
        expert_ids: Its routing.
        matrix: A as it was given: its shape says whether experts share the pair, and whether there are units.
        pair: What is computed with.
        grad: Rows g.  # (S, out)
        outer: g B.  # (S, R padded)
        inputs: Rows x.  # (S, in)
        needs: Of A, of B.
    """
    if matrix is None:
        raise ValueError("expected a low-rank pair, got none")
    rank, pairs = pair.a.shape[1], pair.a.shape[0]
    units = matrix.shape[0] if matrix.dim() == 4 else 1
    if pairs == layer.experts and pairs > 1:
        order, offsets = None, unit_offsets(expert_ids, layer.tiles, units, layer.experts)
    else:
        # Rows in the order of tokens: a unit's rows are neighbours, whichever experts they went to.
        order = layer.tiles.places
        offsets = torch.arange(units + 1, device=grad.device if grad is not None else outer.device)
        offsets = offsets * (expert_ids.numel() // units)

    def gradient(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if order is not None:
            left, right = left.index_select(0, order), right.index_select(0, order)
        found = clip.unit_gradients(left, right, offsets).mul_(pair.scale)
        if matrix.dim() == 3:
            return found
        return found.view(pairs, units, *found.shape[1:]).transpose(0, 1).contiguous()

    empty = outer.new_empty(0)
    by_a = gradient(outer[:, :rank].contiguous(), inputs) if needs[0] else empty
    if not needs[1] or grad is None:
        return [by_a, empty]
    low = layer.narrow(inputs, pair.a.mT, gathered=False)
    return [by_a, gradient(grad, low[:, :rank].contiguous())]


def _layer(
    rows: torch.Tensor, expert_ids: torch.Tensor, bias: torch.Tensor, scale: float, alpha: float, limit: float
) -> _Layer:
    experts = bias.shape[0]
    tiles = tiles_of(expert_ids, experts, blocks_of(_RANK, rows.dtype).rows)
    return _Layer(tiles, experts, expert_ids.shape[1], scale, alpha, limit)


def _gathered(values: torch.Tensor, layer: _Layer) -> torch.Tensor:
    """Each sorted row's token: (T, D) -> (S, D)."""
    return values.index_select(0, layer.tiles.order.div(layer.choices, rounding_mode="floor"))


def _pair(a: torch.Tensor | None, b: torch.Tensor | None, scale: float, dtype: torch.dtype) -> Pair | None:
    pair = Pair.of(a, b, scale, dtype)
    return None if pair is None else Pair(_ready(pair.a), _ready(pair.b), scale)


def _padded(rank: int) -> int:
    return max(_RANK, triton.next_power_of_2(rank))


def _rank(pair: Pair | None) -> tuple[int, int, bool]:
    """RANK, PADDED and SHARED of a kernel."""
    return (0, _RANK, False) if pair is None else (pair.a.shape[1], _padded(pair.a.shape[1]), pair.a.shape[0] == 1)


def _or(instead: torch.Tensor, *given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What a kernel takes where it reads nothing: any pointer."""
    return tuple(instead if one is None else one for one in given)


def _packed(stack: Mxfp4Weights) -> tuple[torch.Tensor, torch.Tensor]:
    return _ready(stack.blocks), _ready(stack.scales)


def _ready(values: torch.Tensor) -> torch.Tensor:
    """In memory as the kernels read it."""
    if values.is_contiguous() and values.data_ptr() % _ALIGNMENT == 0:
        return values
    return values.clone(memory_format=torch.contiguous_format)


def _require(rows: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> tuple[Mxfp4Weights, Mxfp4Weights]:
    """The matrices, if the kernels take them and the rows."""
    if not isinstance(gate_up, Mxfp4Weights) or not isinstance(down, Mxfp4Weights):
        raise ValueError(
            f"expected experts in MXFP4 on the fused path, got {type(gate_up).__name__} and {type(down).__name__}"
        )
    if rows.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"expected float32 or bfloat16 on the fused path, got {rows.dtype}")
    if rows.device.type != "cuda" and not backend.interpreting():
        raise ValueError(f"expected rows on a CUDA device on the fused path, got them on {rows.device}")
    if rows.dtype != torch.float32 and backend.interpreting():
        raise ValueError(f"expected float32 in Triton's interpreter, which gets {rows.dtype} wrong")
    if not rows.device == gate_up.blocks.device == down.blocks.device:
        raise ValueError(
            f"expected rows and matrices on one device, got {rows.device}, {gate_up.blocks.device} and "
            f"{down.blocks.device}"
        )
    return gate_up, down


def _programs(count: int) -> int:
    if count > _MOST_PROGRAMS:
        raise ValueError(f"expected at most {_MOST_PROGRAMS} programs a launch, got {count}: pass fewer tokens")
    return count
