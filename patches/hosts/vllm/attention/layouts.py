"""How vLLM's backends lay out keys and values in their pages, as our kernels see them. Nothing of vLLM is imported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse import KeyView, PagedKeys
from accel.kernels.block_sparse.keys import block_tokens
from accel.patches.hosts.vllm.attention.pooled import PageMeans, PooledPages


def joint_keys(kv_cache: Tensor, head_dim: int, table: Tensor, kv_len: Tensor) -> KeyView:
    """Keys in the layout of vLLM's GPU backends, (pages, kv_heads, page, 2 · head_dim) with K in front of V."""
    by_token = kv_cache.transpose(1, 2)
    return PagedKeys(by_token[..., :head_dim], by_token[..., head_dim:], table, kv_len)


def sides(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of vLLM's CPU cache (pages, kv_heads, page, 2 · D), both (pages, kv_heads, page, D), the inside of a page packed."""
    pages, heads, page_size, _ = kv_cache.shape
    k, v = kv_cache.view(pages, heads, 2 * page_size, -1).chunk(2, dim=2)
    return k, v


def plain_pages(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values where vLLM's vector kernels keep them, (pages, page, kv_heads, D): keys are transposed inside a page, (D, page)."""
    k, v = sides(kv_cache)
    transposed = k.view(*k.shape[:2], k.shape[3], k.shape[2])
    return transposed.permute(0, 3, 1, 2), v.transpose(1, 2)


@dataclass(frozen=True)
class TiledKeys(PooledPages):
    """Keys as vLLM packs them for AMX: inside a page (page/16, D/2, 16, 2) of tokens, pairs, tokens, pair; values with tokens and D exchanged.

    k_tiles, v_tiles: (pages, Hkv, page, D) views of that memory. No strides describe it, so that what is read is unpacked first.
    """

    k_tiles: Tensor
    v_tiles: Tensor
    page_table: Tensor      # (B, max_pages) int32
    kv_len: Tensor          # (B,) int64
    pool: PageMeans | None = None

    layout = "paged"

    @property
    def page_size(self) -> int:
        return self.k_tiles.shape[2]

    @property
    def storage(self) -> Tensor:
        return self.k_tiles.transpose(1, 2)

    @property
    def value_storage(self) -> Tensor:
        return self.v_tiles.transpose(1, 2)

    def tokens(self, b: int) -> tuple[Tensor, Tensor]:
        return self.head_tokens(b, range(self.n_kv_heads))

    def head_tokens(self, b: int, heads: range) -> tuple[Tensor, Tensor]:
        n = int(self.kv_len[b])
        k, v = self._pages(self.page_table[b, : -(-n // self.page_size)].long(), heads)
        return k[:, :n], v[:, :n]

    def gather(self, b: int, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        token, valid = block_tokens(blocks, block_size, self.kv_len[b])
        pages, place = torch.unique(torch.where(valid, token // self.page_size, 0), return_inverse=True)
        at = place * self.page_size + token % self.page_size
        k, v = self._pages(self.page_table[b, pages].long(), range(self.n_kv_heads))
        found = [side.index_select(1, at).masked_fill_(~valid[:, None], 0) for side in (k, v)]
        return found[0], found[1]

    def page_keys(self, pages: Tensor) -> Tensor:
        k, _ = self._pages(pages, range(self.n_kv_heads))
        return k.view(k.shape[0], -1, self.page_size, k.shape[2]).transpose(0, 1)

    def _pages(self, pages: Tensor, heads: range) -> tuple[Tensor, Tensor]:
        """K and V of some pages in order, each (heads, tokens, D)."""
        k, v = (t[:, heads.start : heads.stop].index_select(0, pages) for t in (self.k_tiles, self.v_tiles))
        n, n_heads, page_size, dim = k.shape
        # (pages, heads, page/16, D/2, 16, 2) -> (heads, pages, page/16, 16, D/2, 2)
        k = k.reshape(n, n_heads, page_size // 16, dim // 2, 16, 2).permute(1, 0, 2, 4, 3, 5)
        # (pages, heads, D/16, page/2, 16, 2) -> (heads, pages, page/2, 2, D/16, 16)
        v = v.reshape(n, n_heads, dim // 16, page_size // 2, 16, 2).permute(1, 0, 3, 5, 2, 4)
        return k.reshape(n_heads, n * page_size, dim), v.reshape(n_heads, n * page_size, dim)
