"""From a block mask to batched matrix products: tiles with equally long lists run together (kernels.md §2.2). Reads no keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Tiles computed in one go: each reads `n_blocks` key blocks, the last of them its own where `has_diagonal`.

    tiles: (kv head, first query head, query block) of each; heads counted from the first of the pack, query blocks from the first of the call.
    blocks: (len(tiles), n_blocks) int64 rows of the packed keys, those of kv head h from h · nk on; ascending.
    run: the first of them where there is one tile and its list has no gaps: a slice will do, nothing need be gathered.
    """

    tiles: list[tuple[int, int, int]]
    n_blocks: int
    has_diagonal: bool
    blocks: Tensor
    run: int | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every tile of some KV heads: those with keys in steps, the others in `empty`. A tile spans `heads_per_tile` query heads."""

    steps: list[Step]
    empty: list[tuple[int, int, int]]
    heads_per_tile: int


def schedule(mask: Tensor, kv_heads: range, group: int, first_block: int, max_blocks: int) -> Schedule:
    """Steps of at most `max_blocks` (query head, query block, key block) products, or of one tile.

    mask: (Hq or 1, nq, nk) bool; first_block: the absolute index of query block 0. Query heads of a KV head with the same lists form one tile
    and share the gathered keys.
    """
    listed = lists_of(mask, kv_heads, group)
    per_kv, nq, nk = listed.shape[1:]
    heads_per_tile = group // per_kv

    counts = listed.sum(-1).flatten()
    own = torch.diagonal(listed, offset=first_block, dim1=-2, dim2=-1).flatten()
    # tiles of equal length side by side; those without their own block apart, for they need no mask
    keys, order = (counts * 2 + own).sort(stable=True)
    kv, _, _, key_block = listed.nonzero(as_tuple=True)
    packed = kv * nk + key_block
    sizes = counts[order]
    ends = sizes.cumsum(0)
    # entry e of the sorted lists belongs to the tile it falls into; its place in `packed` differs by a shift per tile
    shift = (counts.cumsum(0) - counts)[order] - (ends - sizes)
    blocks = packed[torch.arange(packed.shape[0], device="cpu") + shift.repeat_interleave(sizes)]

    places = [(t // (per_kv * nq), t // nq % per_kv * heads_per_tile, t % nq) for t in order.tolist()]
    n_empty = int((sizes == 0).sum())
    steps = cut_steps(places, keys.tolist(), ends.tolist(), blocks, n_empty, max_blocks // heads_per_tile)
    return Schedule(steps, places[:n_empty], heads_per_tile)


def lists_of(mask: Tensor, kv_heads: range, group: int) -> Tensor:
    """The tiles of some KV heads, (kv heads, G, nq, nk); (kv heads, 1, nq, nk) where all G query heads have the same."""
    if mask.shape[0] == 1:
        return mask[None].expand(len(kv_heads), -1, -1, -1)
    listed = mask[kv_heads.start * group : kv_heads.stop * group].view(len(kv_heads), group, *mask.shape[1:])
    return listed[:, :1] if group > 1 and bool((listed[:, 1:] == listed[:, :1]).all()) else listed


def cut_steps(
    places: list[tuple[int, int, int]], keys: list[int], ends: list[int], blocks: Tensor, begin: int, max_blocks: int
) -> list[Step]:
    """Steps of tiles with equal keys, from tile `begin` on. ends: where each tile's list ends in `blocks`."""
    steps = []
    n_tiles = len(places)
    first = begin
    while first < n_tiles:
        n_blocks, has_own = divmod(keys[first], 2)
        limit = min(first + max(1, max_blocks // n_blocks), n_tiles)
        last = first + 1
        while last < limit and keys[last] == keys[first]:
            last += 1
        chosen = blocks[ends[first] - n_blocks : ends[last - 1]]
        run = None
        if last == first + 1:
            lowest, highest = int(chosen[0]), int(chosen[-1])
            run = lowest if highest - lowest + 1 == n_blocks else None
        steps.append(Step(places[first:last], n_blocks, bool(has_own), chosen.view(-1, n_blocks), run))
        first = last
    return steps
