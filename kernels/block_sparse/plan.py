"""Which key blocks each block of queries reads: three encodings behind one class (design.md §4).

Query blocks and key blocks are the same `block_size` tokens and lie on the grid that starts at position 0 of each sequence.
A plan never lists a block twice and never one above the diagonal; causality inside the diagonal block is the executor's.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from accel.kernels.block_sparse.ragged import Ragged, Rows


class BlockPlan(ABC):
    """The tiles to compute. `block_mask` is the definition; executors may read the encoding itself."""

    block_size: int

    @abstractmethod
    def block_mask(self, rows: Rows) -> Tensor:
        """Tiles of one sequence, (Hq, nq, nk) bool; (1, nq, nk) where every head has the same. True only at or below the diagonal."""

    def checked_mask(self, rows: Rows, n_heads: int) -> Tensor:
        """`block_mask`, after checking that it suits this many query heads."""
        mask = self.block_mask(rows)
        if mask.shape[0] not in (1, n_heads):
            raise ValueError(f"the plan describes {mask.shape[0]} heads, q has {n_heads}")
        return mask

    def to(self, device: torch.device) -> Self:
        """The plan with its tensors on `device`; itself where they are there already."""
        moved = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor) and t.device != device}
        if not moved:
            return self
        plan = copy.copy(self)
        vars(plan).update(moved)
        return plan

    @abstractmethod
    def active_tiles(self, lens: Ragged, n_heads: int) -> Tensor:
        """Tiles the plan computes, over all sequences and heads: () int64, on the lengths' device, which is never waited for."""

    def tile_counts(self, lens: Ragged, n_heads: int) -> Tensor:
        """`active_tiles`, and the tiles that a dense causal kernel would compute: (2,) int64. Waits for no device."""
        return torch.stack([self.active_tiles(lens, n_heads), causal_tiles(lens, self.block_size) * n_heads])

    def tiles(self, lens: Ragged, n_heads: int) -> tuple[int, int]:
        """`tile_counts` as Python numbers."""
        active, total = self.tile_counts(lens, n_heads).tolist()
        return active, total

    def density(self, lens: Ragged, n_heads: int) -> float:
        """Share of the causal tiles that the plan computes. 1.0 for a dense run, and where there is no tile at all."""
        active, total = self.tiles(lens, n_heads)
        return active / total if total else 1.0


def causal_blocks(rows: Rows, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Block distances i − j of one sequence, (nq, nk) int64; negative above the diagonal."""
    i = torch.arange(rows.query_blocks(block_size), device=device) + rows.first_block(block_size)
    return i[:, None] - torch.arange(rows.key_blocks(block_size), device=device)


def query_block_range(lens: Ragged, block_size: int) -> tuple[Tensor, Tensor]:
    """First query block of each sequence and the number of them, both (B,) int64."""
    first = (lens.kv_len - lens.q_len) // block_size
    n = (lens.kv_len + block_size - 1) // block_size - first
    return first, torch.where(lens.q_len > 0, n, 0)


def causal_tiles(lens: Ragged, block_size: int) -> Tensor:
    """Tiles at or below the diagonal, one head, over all sequences: () int64."""
    first, n = query_block_range(lens, block_size)
    return (n * first + n * (n + 1) // 2).sum()


@dataclass(frozen=True)
class ImplicitPlan(BlockPlan):
    """Sink, window and power-of-two distances, the same for every head and input: nothing is stored (sparse-attention.md §3.2).

    `window_blocks` counts the own block. `powers=False` leaves sink and window. `max_power` m keeps distances up to 2^m.
    A window of at least nk blocks is the dense plan: `ImplicitPlan.dense(block_size)`.
    """

    block_size: int
    window_blocks: int
    sink_blocks: int = 1
    powers: bool = True
    max_power: int | None = None

    @classmethod
    def dense(cls, block_size: int) -> ImplicitPlan:
        return cls(block_size=block_size, window_blocks=2**31, sink_blocks=0, powers=False)

    def block_mask(self, rows: Rows) -> Tensor:
        distance = causal_blocks(rows, self.block_size)
        return (self.lists(distance, torch.arange(distance.shape[1], device=distance.device)) & (distance >= 0))[None]

    def lists(self, distance: Tensor, key_block: Tensor) -> Tensor:
        """Whether the query block `distance` blocks further on lists the key block; for distances of 0 and more. Waits for no device."""
        keep = (distance < self.window_blocks) | (key_block < self.sink_blocks)
        if self.powers:
            power = (distance > 0) & (distance & (distance - 1) == 0)
            keep |= power if self.max_power is None else power & (distance <= 2**self.max_power)
        return keep

    def active_tiles(self, lens: Ragged, n_heads: int) -> Tensor:
        first, n = query_block_range(lens, self.block_size)
        # a power of two: decoding grows the length at every step, but rarely the table
        before = _tiles_before(self, 1 << (-(-lens.max_kv // self.block_size)).bit_length(), first.device)
        return (before[first + n] - before[first]).sum() * n_heads

    def row_blocks(self, i: int) -> list[int]:
        """Key blocks of query block i, ascending, without duplicates (sparse-attention.md §3.3)."""
        start = max(0, i - self.window_blocks + 1)
        powers = []
        if self.powers:
            # distances 2^m past the window; far blocks first, so that keys ascend
            top = i.bit_length() if self.max_power is None else min(i.bit_length(), self.max_power + 1)
            powers = [i - 2**m for m in reversed(range(top)) if self.sink_blocks <= i - 2**m < start]
        return [*range(min(self.sink_blocks, start)), *powers, *range(start, i + 1)]


@lru_cache(maxsize=64)
def _tiles_before(plan: ImplicitPlan, nk: int, device: torch.device) -> Tensor:
    """Tiles of the first i rows of one head, (nk + 1,) int64, for i from 0 to nk."""
    per_row = range(1, nk + 1) if plan.window_blocks >= nk else (len(plan.row_blocks(i)) for i in range(nk))
    return torch.tensor([0, *itertools.accumulate(per_row)], device=device)


@dataclass(frozen=True)
class VerticalSlashPlan(BlockPlan):
    """Columns and diagonals per head: tile (i, j) runs iff j ≤ i and (vertical[j] or slash[i − j] or extra[i, j]).

    vertical, slash: (B, Hq, nk) bool, nk the most key blocks of the batch; entries past a sequence's end are ignored.
    extra: (B, Hq, nq, nk) bool or None, nq the most query blocks: the tiles of query-aware heads beside the lines (§2.7).
    """

    block_size: int
    vertical: Tensor
    slash: Tensor
    extra: Tensor | None = None

    def block_mask(self, rows: Rows) -> Tensor:
        distance = causal_blocks(rows, self.block_size, self.vertical.device)
        nq, nk = distance.shape
        vertical, slash = self.vertical[rows.index, :, :nk], self.slash[rows.index, :, :nk]
        keep = vertical[:, None] | slash[:, distance.clamp_min(0)]
        if self.extra is not None:
            keep = keep | self.extra[rows.index, :, :nq, :nk]
        return keep & (distance >= 0)

    def active_tiles(self, lens: Ragged, n_heads: int) -> Tensor:
        # no (nq, nk) map is built for the lines: columns and diagonals are counted, and less what they share
        first, n = (t[:, None, None] for t in query_block_range(lens, self.block_size))
        end = first + n
        line = torch.arange(self.vertical.shape[-1], device=self.vertical.device)
        rows_of_line = (end - torch.maximum(first, line)).clamp_min(0) * (n > 0)
        columns_up_to = torch.nn.functional.pad(self.vertical.cumsum(-1), (1, 0))
        # diagonal Δ meets column j in row j + Δ, which must be a query row
        lowest, highest = ((t - line).clamp(0, len(line)).expand_as(self.slash) for t in (first, end))
        shared = (columns_up_to.gather(-1, highest) - columns_up_to.gather(-1, lowest)) * (n > 0)
        active = (self.vertical * rows_of_line + self.slash * (rows_of_line - shared)).sum()
        return active if self.extra is None else active + self._tiles_beside_lines(first, n)

    def _tiles_beside_lines(self, first: Tensor, n: Tensor) -> Tensor:
        """How many tiles `extra` adds. first, n: (B, 1, 1), query blocks."""
        assert self.extra is not None
        nq, nk = self.extra.shape[2:]
        i, j = torch.arange(nq, device=self.extra.device)[:, None], torch.arange(nk, device=self.extra.device)
        distance = first + i - j
        on_diagonal = self.slash.gather(-1, distance.clamp(0, nk - 1).flatten(1)[:, None].expand(-1, self.slash.shape[1], -1))
        on_line = on_diagonal.view(self.extra.shape) | self.vertical[:, :, None]
        return (self.extra & ~on_line & ((distance >= 0) & (i < n))[:, None]).sum()


@dataclass(frozen=True)
class ListPlan(BlockPlan):
    """FlexAttention's BlockMask layout: per row, how many key blocks need a mask or none, and which.

    mask_count, full_count: (B, Hq, nq) int32. mask_index, full_index: (B, Hq, nq, capacity) int32, the first `count` entries valid,
    ascending, without duplicates. A masked block is one that holds the diagonal; a full block lies wholly below it.
    """

    block_size: int
    mask_count: Tensor
    mask_index: Tensor
    full_count: Tensor
    full_index: Tensor

    @classmethod
    def from_mask(cls, masks: list[Tensor], lens: Ragged, block_size: int, *, capacity: int | None = None) -> ListPlan:
        """Lists of the given tiles; masks[b] (Hq, nq, nk) bool. A row with more than `capacity` blocks raises: nothing is dropped."""
        all_rows = list(lens.rows())
        n_heads = masks[0].shape[0]
        nq = max(r.query_blocks(block_size) for r in all_rows)
        # a sequence without queries has no rows
        longest = max((int(m.sum(-1).max()) for m in masks if m.numel()), default=0)
        width = longest if capacity is None else capacity
        if longest > width:
            raise ValueError(f"a row lists {longest} key blocks, but the capacity is {width}")
        shape = (len(masks), n_heads, nq)
        counts = [torch.zeros(shape, dtype=torch.int32, device="cpu") for _ in range(2)]
        indices = [torch.zeros(*shape, max(width, 1), dtype=torch.int32, device="cpu") for _ in range(2)]
        for rows, mask in zip(all_rows, masks, strict=True):
            distance = causal_blocks(rows, block_size)
            n = distance.shape[0]
            for count, index, part in zip(counts, indices, (mask & (distance == 0), mask & (distance > 0)), strict=True):
                count[rows.index, :, :n] = part.sum(-1, dtype=torch.int32)
                # a stable sort brings the kept blocks to the front, ascending
                order = part.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :width]
                index[rows.index, :, :n, : order.shape[-1]] = order.to(torch.int32)
        return cls(block_size, counts[0], indices[0], counts[1], indices[1])

    def active_tiles(self, lens: Ragged, n_heads: int) -> Tensor:
        _, n = query_block_range(lens, self.block_size)
        counts = self.mask_count + self.full_count
        is_row = torch.arange(counts.shape[2], device=counts.device) < n[:, None, None]
        return (counts * is_row).sum(dtype=torch.int64) * (n_heads // counts.shape[1])

    def block_mask(self, rows: Rows) -> Tensor:
        distance = causal_blocks(rows, self.block_size, self.mask_count.device)
        nq, nk = distance.shape
        keep = torch.zeros(self.mask_count.shape[1], nq, nk, dtype=torch.int32, device=distance.device)
        for count, index in ((self.mask_count, self.mask_index), (self.full_count, self.full_index)):
            valid = torch.arange(index.shape[-1], device=index.device) < count[rows.index, :, :nq, None]
            keep.scatter_add_(-1, index[rows.index, :, :nq].long(), valid.to(torch.int32))
        return (keep > 0) & (distance >= 0)
