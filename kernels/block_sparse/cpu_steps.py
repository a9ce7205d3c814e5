"""From a block mask to batched matrix products: tiles with equally long lists run together (kernels.md §2.2). All vectorised, no tensor data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse.ragged import Rows


@dataclass(frozen=True)
class Tiles:
    """How the query rows of one sequence are cut: one tile per query block, of `height` rows that begin `lead` rows into the block.

    Only a short sequence (decode) has a `lead`: its single tile is no taller than its rows.
    """

    rows: Rows
    block_size: int
    height: int
    lead: int

    @classmethod
    def of(cls, rows: Rows, block_size: int) -> Tiles:
        if rows.query_blocks(block_size) == 1:
            return cls(rows, block_size, rows.q_len, rows.offset - rows.first_block(block_size) * block_size)
        return cls(rows, block_size, block_size, 0)

    def span(self, i: int) -> tuple[int, int, int]:
        """Rows of tile i that exist: first and last + 1 as rows of q, and the place of the first inside the tile."""
        first = (self.rows.first_block(self.block_size) + i) * self.block_size + self.lead - self.rows.offset
        lo, hi = max(first, 0), min(first + self.height, self.rows.q_len)
        return self.rows.q_start + lo, self.rows.q_start + hi, lo - first


@dataclass(frozen=True)
class Step:
    """Tiles computed in one go: each reads `n_blocks` key blocks, the last of them its own where `has_diagonal`.

    tiles: (kv head, first query head, query block) of each, kv heads counted from the first of the pack.
    blocks: (len(tiles) · n_blocks) int64 rows of the packed keys, the blocks of kv head h from h · nk on; ascending per tile.
    run: (first row, last row + 1) instead of `blocks` where there is one tile and its list has no gaps: nothing is gathered.
    """

    tiles: list[tuple[int, int, int]]
    n_blocks: int
    has_diagonal: bool
    blocks: Tensor
    run: tuple[int, int] | None


@dataclass(frozen=True)
class Schedule:
    """Every tile of some KV heads: those with keys in steps, the others in `empty`. A tile spans `heads_per_tile` query heads."""

    steps: list[Step]
    empty: list[tuple[int, int, int]]
    heads_per_tile: int


def schedule(mask: Tensor, kv_heads: range, group: int, first_block: int, max_blocks: int) -> Schedule:
    """Steps of at most about `max_blocks` (tile, key block, query head) products, one longer list at a time.

    mask: (Hq or 1, nq, nk) bool. Query heads of one KV head that share their lists share the gathered keys too.
    """
    nq, nk = mask.shape[1:]
    listed = mask[None] if mask.shape[0] == 1 else mask.unflatten(0, (-1, group))[kv_heads.start : kv_heads.stop]
    if listed.shape[1] > 1 and bool((listed == listed[:, :1]).all()):
        listed = listed[:, :1]
    listed = listed.expand(len(kv_heads), -1, -1, -1)
    lists_per_kv = listed.shape[1]
    heads_per_tile = group // lists_per_kv

    kv, _, _, key_block = listed.nonzero(as_tuple=True)
    packed = kv * nk + key_block
    counts = listed.sum(-1)
    diagonal = torch.diagonal(listed, offset=first_block, dim1=-2, dim2=-1)
    # tiles of equal length side by side, those without their own block apart from the others
    key = (counts * 2 + diagonal).flatten()
    begin = counts.flatten().cumsum(0) - counts.flatten()
    order = key.argsort(stable=True)
    sorted_keys, sorted_begin = key[order].tolist(), begin[order]
    places = [(t // (lists_per_kv * nq), t // nq % lists_per_kv * heads_per_tile, t % nq) for t in order.tolist()]

    n_empty = next((at for at, k in enumerate(sorted_keys) if k), len(sorted_keys))
    steps = []
    at = n_empty
    while at < len(places):
        n_blocks, has_diagonal = divmod(sorted_keys[at], 2)
        end = min(at + max(1, max_blocks // (n_blocks * heads_per_tile)), len(places))
        while sorted_keys[end - 1] != sorted_keys[at]:
            end -= 1
        blocks = packed[(sorted_begin[at:end, None] + torch.arange(n_blocks)).flatten()]
        steps.append(Step(places[at:end], n_blocks, bool(has_diagonal), blocks, _run(blocks) if end == at + 1 else None))
        at = end
    return Schedule(steps, places[:n_empty], heads_per_tile)


def _run(blocks: Tensor) -> tuple[int, int] | None:
    first, last = int(blocks[0]), int(blocks[-1])
    return (first, last + 1) if last - first + 1 == blocks.shape[0] else None
