"""Which rows a program multiplies: rows sorted by expert, cut into tiles of one expert each, all on the device.

A grouped product is one small product an expert. A GPU wants them as tiles of equal size, an expert's last one partly
empty; which expert a tile belongs to depends on the routing, which lies on the device. Reading it would stop the host
until the device is done (a rival's loop left the GPU idle for 80 % of a step). The host needs only how many programs to
start, and the shapes bound that: M rows over E experts make at most M // BLOCK + min(E, M) tiles. Tiles too many find
no expert and end at once.

A tile's rows are counted from its expert's first row, so that the tiles' size is a constant and not a function of the
routing. Idea: the maps of `triton_kernels` and MegaBlocks, the second of which makes them on the device as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Rows sorted by expert, and the tiles that they are cut into. M = T * experts_per_token rows."""

    order: (
        torch.Tensor
    )  # int64 (M,): of each sorted row its (token, choice), counted token * experts_per_token + choice
    places: torch.Tensor  # int64 (M,): of each (token, choice) its sorted row
    offsets: torch.Tensor  # int64 (E + 1,): where an expert's rows begin, and the end
    expert: torch.Tensor  # int32 (tiles,): E where there is no such tile
    first: torch.Tensor  # int64 (tiles,): the tile's first row
    block: int  # rows of a tile


def tiles_of(expert_ids: torch.Tensor, num_experts: int, block: int) -> Tiles:
    """Sort rows by expert, in the order of the tokens, and cut them. Nothing of it comes to the host.

    Args:
        expert_ids: int64 [T, experts_per_token], each in [0, E).
        num_experts: E.
        block: Rows of a tile.

    Raises:
        ValueError: A shape or type of ids that is not the above, or a block below 1.
    """
    if expert_ids.dim() != 2 or expert_ids.dtype != torch.int64:
        raise ValueError(f"expected int64 expert ids (T, top-k), got {expert_ids.dtype} {tuple(expert_ids.shape)}")
    if block < 1:
        raise ValueError(f"expected a block of at least 1 row, got {block}")
    flat = expert_ids.reshape(-1)
    device = flat.device
    ranked, order = torch.sort(flat, stable=True)  # (M,)
    ranks = torch.arange(flat.numel(), device=device)
    places = torch.empty_like(order).scatter_(0, order, ranks)  # (M,)
    offsets = torch.searchsorted(ranked, torch.arange(num_experts + 1, device=device))  # (E + 1,)
    ends = (offsets.diff() + (block - 1)).div_(block, rounding_mode="floor").cumsum(0)  # (E,) tiles up to an expert's
    tile = torch.arange(flat.numel() // block + min(num_experts, flat.numel()), device=device)
    expert = torch.searchsorted(ends, tile, right=True)  # (tiles,)
    own = expert.clamp(max=num_experts - 1)
    # Tiles before an expert's own: none before the first one's.
    before = torch.cat([ends.new_zeros(1), ends]).index_select(0, own)
    first = offsets.index_select(0, own).add_((tile - before).mul_(block))
    return Tiles(order, places, offsets, expert.to(torch.int32), first, block)


def unit_offsets(expert_ids: torch.Tensor, tiles: Tiles, units: int, num_experts: int) -> torch.Tensor:
    """Where each (expert, unit) begins among the sorted rows: `clip.segment_offsets` without a value on the host.

    Args:
        expert_ids: int64 [U * T, experts_per_token]: a unit's T tokens are neighbours.
        tiles: Of these ids.
        units: U.
        num_experts: E.

    Returns:
        int64 [E * U + 1].
    """
    if units == 1:
        return tiles.offsets
    rows = max(1, expert_ids.numel() // units)  # of a unit
    unit_of = tiles.order.div(rows, rounding_mode="floor")  # (M,)
    segments = expert_ids.reshape(-1).index_select(0, tiles.order).mul_(units).add_(unit_of)  # (M,), ascending
    return torch.searchsorted(segments, torch.arange(num_experts * units + 1, device=segments.device))
