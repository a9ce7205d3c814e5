"""Decoding by a static pattern without a kernel: the block table keeps the pages that the pattern lists, and vLLM's attention reads no others.

Keys in the cache are rotated already, and a single query needs no causal mask: dropping pages and shortening the lengths is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, ImplicitPlan


@dataclass(frozen=True)
class PagePattern:
    """A static pattern in blocks of whole pages, for requests of `first` to `last` keys (None: without end); others keep all pages."""

    plan: ImplicitPlan
    page_size: int
    first: int = 1
    last: int | None = None

    @classmethod
    def of(cls, plan: BlockPlan, page_size: int, *, first: int, last: int | None) -> PagePattern | str:
        """The pattern, or why pages cannot express it."""
        if not isinstance(plan, ImplicitPlan):
            return "decoding reads other blocks in every head"
        if plan.block_size % page_size:
            return f"blocks of {plan.block_size} tokens are not whole pages of {page_size}"
        if plan.window_blocks < 1:
            return "decoding does not read its own block"
        return cls(plan, page_size, first, last)

    def shortens(self, lens: Tensor) -> Tensor:
        """Whether requests of these lengths follow the pattern."""
        is_long = lens >= self.first
        return is_long if self.last is None else is_long & (lens <= self.last)

    def most_keys(self, longest: int) -> int:
        """A bound of the keys that a request of at most `longest` keys reads."""
        if self.last is not None and longest > self.last:
            return longest
        powers = (longest // self.plan.block_size).bit_length() if self.plan.powers else 0
        blocks = self.plan.window_blocks + self.plan.sink_blocks + powers
        return min(longest, max(self.first - 1, blocks * self.plan.block_size))

    def compact(self, table: Tensor, lens: Tensor, is_single: Tensor, *, out_table: Tensor, out_lens: Tensor) -> None:
        """Writes the shorter table and lengths of a step. Waits for no device.

        table: (R, P) int32, the pages of every request, P enough for the longest. lens: (R,) keys. is_single: (R,) bool, requests with one
        query; others keep all pages. out_table: (R, P), of which row r holds the pages to read at its front and arbitrary pages behind them,
        out_lens: (R,), 0 where it was 0.
        """
        n_pages = table.shape[1]
        lens = lens.long()[:, None]
        page = torch.arange(n_pages, device=table.device)
        key_block = page // (self.plan.block_size // self.page_size)
        distance = (lens - 1) // self.plan.block_size - key_block
        is_whole = ~(is_single[:, None] & self.shortens(lens))
        keep = (page * self.page_size < lens) & (is_whole | self.plan.lists(distance, key_block))
        # a row with a page to drop fills its last column with none that it keeps
        place = torch.where(keep, keep.cumsum(1) - 1, n_pages - 1)
        out_table.scatter_(1, place, table)
        # the last page is always kept, and 0 keys give 0
        tail = (lens - 1) % self.page_size + 1
        out_lens.copy_(((keep.sum(1, keepdim=True) - 1) * self.page_size + tail)[:, 0])


@dataclass
class TableBuffers:
    """Memory for shorter tables that stays where it is: a captured graph goes on reading it."""

    _table: Tensor | None = field(default=None, repr=False)
    _lens: Tensor | None = field(default=None, repr=False)

    def take(self, table: Tensor, lens: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
        """A table and lengths of these shapes. rows: the most requests of any step, as far as known."""
        n, width = table.shape
        if self._table is None or self._lens is None or self._table.shape[0] < n or self._table.shape[1] != width:
            rows = max(rows, n)
            # what is born in inference mode could not be written outside it
            with torch.inference_mode(False):
                self._table, self._lens = table.new_zeros(rows, width), lens.new_zeros(rows)
        return self._table[:n], self._lens[:n]
