"""The mean key of every page of a layer, kept for methods that pool keys. Pages are shared: a prefix written by one request serves the next.

On CPUs alone: on a GPU the kernel that reads the keys of a probe makes their means in passing, and memory for them would be taken from the cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse import KeyView, PagedKeys


@dataclass(frozen=True)
class PageMeans:
    """means: (pages, Hkv, D) fp32, valid where `known` (pages,) says so. A page that is written to is forgotten."""

    means: Tensor
    known: Tensor

    @classmethod
    def empty(cls, n_pages: int, n_kv_heads: int, head_dim: int) -> PageMeans:
        """Nothing known of a cache of so many pages."""
        # what is born in inference mode could not be written outside it
        with torch.inference_mode(False):
            return cls(torch.zeros(n_pages, n_kv_heads, head_dim), torch.zeros(n_pages, dtype=torch.bool))

    def forget(self, slots: Tensor, page_size: int) -> None:
        """Notes that keys are written to these slots, (tokens,) int64; negative ones are padding."""
        self.known[slots[slots >= 0] // page_size] = False

    def of(self, pages: Tensor, page_keys: Callable[[Tensor], Tensor]) -> Tensor:
        """The means of some pages without a free place, (n, Hkv, D) fp32. page_keys: reads those not known yet, (m, Hkv, page, D)."""
        missing = torch.unique(pages[~self.known[pages]])
        if len(missing):
            self.means[missing] = page_keys(missing).mean(2, dtype=torch.float32)
            self.known[missing] = True
        return self.means[pages]


class PooledPages(KeyView):
    """Pages whose means are kept. Subclasses hold the table and read the keys."""

    page_table: Tensor      # (B, max_pages) int32
    pool: PageMeans | None

    @property
    @abstractmethod
    def page_size(self) -> int:
        """Tokens of a page."""

    @abstractmethod
    def page_keys(self, pages: Tensor) -> Tensor:
        """The keys of some pages, (n, Hkv, page, D). pages: (n,) int64."""

    def keeps_means(self, block_size: int) -> bool:
        """Whether blocks are whole pages of a cache whose means are kept."""
        return self.pool is not None and block_size % self.page_size == 0

    def block_mean(self, b: int, block_size: int) -> Tensor:
        if self.pool is None or block_size % self.page_size:
            return super().block_mean(b, block_size)
        per_block = block_size // self.page_size
        full, rest = divmod(int(self.kv_len[b]), block_size)
        pages = self.page_table[b, : full * per_block].long()
        # (pages, Hkv, D) -> (Hkv, blocks, D)
        by_page = self.pool.of(pages, self.page_keys)
        means = by_page.view(full, per_block, *by_page.shape[1:]).mean(1).transpose(0, 1)
        if not rest:
            return means
        keys, _ = self.gather(b, torch.tensor([full]), block_size)
        return torch.cat([means, keys.sum(1, keepdim=True, dtype=torch.float32) / rest], 1)


@dataclass(frozen=True)
class PooledKeys(PooledPages, PagedKeys):
    """Pages that strides describe, with their means where a pool is given."""

    pool: PageMeans | None = None

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    def page_keys(self, pages: Tensor) -> Tensor:
        return self.k_pages.index_select(0, pages).transpose(1, 2)
