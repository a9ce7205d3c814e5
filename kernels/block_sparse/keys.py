"""Keys and values of a batch, whatever memory they lie in: contiguous, inside a static cache, or in pages (design.md §3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


class KeyView(ABC):
    """The keys and values of B sequences. Methods and executors read them only through this class.

    Sequence b holds tokens 0 … kv_len[b] − 1; block j of it holds tokens j·b … min((j + 1)·b, kv_len) − 1.
    """

    layout: ClassVar[Literal["contiguous", "paged"]]
    kv_len: Tensor          # (B,) int64

    @property
    @abstractmethod
    def storage(self) -> Tensor:
        """The tensor that holds the keys, (..., Hkv, D)."""

    @property
    @abstractmethod
    def value_storage(self) -> Tensor:
        """The tensor that holds the values, (..., Hkv, Dv)."""

    @property
    def n_kv_heads(self) -> int:
        return self.storage.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.storage.shape[-1]

    @property
    def value_dim(self) -> int:
        """Dv, the head size of V."""
        return self.value_storage.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def why_outside(self) -> str | None:
        """Which sequence lies partly outside the storage, or None. Reads lengths on the host: for CPUs."""
        return None

    @abstractmethod
    def tokens(self, b: int) -> tuple[Tensor, Tensor]:
        """K and V of sequence b, each (Hkv, N, D): views where memory allows it, otherwise one gathered copy."""

    def head_tokens(self, b: int, heads: range) -> tuple[Tensor, Tensor]:
        """K and V of some KV heads of sequence b, (len(heads), N, D): `tokens`, without reading the other heads."""
        k, v = self.tokens(b)
        return k[heads.start : heads.stop], v[heads.start : heads.stop]

    @abstractmethod
    def gather(self, b: int, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """K and V of some key blocks of sequence b, each (Hkv, len(blocks)·block_size, D); rows past the end are zero.

        blocks: (n,) int64 block indices, the same for every KV head.
        """

    def keeps_means(self, block_size: int) -> bool:
        """Whether `block_mean` answers from means that were kept, and so costs less than the keys that are read anyway."""
        return False

    def block_mean(self, b: int, block_size: int) -> Tensor:
        """Mean key of each block over its valid tokens, (Hkv, nk, D) fp32. sparse-attention.md §2.6."""
        keys, _ = self.tokens(b)
        n_heads, n, dim = keys.shape
        nk = -(-n // block_size)
        full = n // block_size
        means = torch.empty(n_heads, nk, dim, dtype=torch.float32, device=keys.device)
        means[:, :full] = keys[:, : full * block_size].reshape(n_heads, full, block_size, dim).mean(2, dtype=torch.float32)
        if nk > full:
            means[:, full] = keys[:, full * block_size :].mean(1, dtype=torch.float32)
        return means


@dataclass(frozen=True)
class ContiguousKeys(KeyView):
    """Keys in one (tokens, Hkv, D) view, sequence b from row `start[b]` on. Also a static cache, and left padding.

    k, v: last stride 1. Never copied here; a cache of shape (B, Hkv, n, D) becomes such a view through `from_cache`.
    """

    k: Tensor
    v: Tensor
    start: Tensor           # (B,) int64
    kv_len: Tensor          # (B,) int64

    layout = "contiguous"

    @property
    def storage(self) -> Tensor:
        return self.k

    @property
    def value_storage(self) -> Tensor:
        return self.v

    def __post_init__(self) -> None:
        for name, t in (("k", self.k), ("v", self.v)):
            if t.dim() != 3 or t.stride(-1) != 1:
                found = f"shape {tuple(t.shape)}, strides {t.stride()}"
                raise ValueError(f"{name} must be (tokens, heads, head_dim) with last stride 1, got {found}")

    @classmethod
    def from_cache(cls, k: Tensor, v: Tensor, *, start: Tensor | None = None, kv_len: Tensor | None = None) -> ContiguousKeys:
        """View of a (B, Hkv, n, D) cache, of which sequence b uses tokens start[b] … start[b] + kv_len[b] − 1 (default: all n)."""
        batch, _, n, _ = k.shape
        begin = torch.zeros(batch, dtype=torch.int64, device=k.device) if start is None else start
        length = torch.full((batch,), n, dtype=torch.int64, device=k.device) if kv_len is None else kv_len
        (k_flat, k_pitch), (v_flat, v_pitch) = token_major(k.transpose(1, 2)), token_major(v.transpose(1, 2))
        if k_pitch != v_pitch:
            raise ValueError(f"k and v need the same memory layout, got strides {k.stride()} and {v.stride()}")
        return cls(k=k_flat, v=v_flat, start=begin + torch.arange(batch, device=k.device) * k_pitch, kv_len=length)

    def why_outside(self) -> str | None:
        for b, (first, n) in enumerate(zip(self.start.tolist(), self.kv_len.tolist(), strict=True)):
            if n and not 0 <= first <= self.k.shape[0] - n:
                return f"sequence {b}: keys {first}..{first + n - 1} lie outside the {self.k.shape[0]} tokens of k"
        return None

    def tokens(self, b: int) -> tuple[Tensor, Tensor]:
        rows = slice(int(self.start[b]), int(self.start[b]) + int(self.kv_len[b]))
        return self.k[rows].transpose(0, 1), self.v[rows].transpose(0, 1)

    def gather(self, b: int, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":
            return self._gather_slices(b, blocks, block_size)
        token, valid = block_tokens(blocks, block_size, self.kv_len[b])
        row = torch.where(valid, token + self.start[b], self.start[b])
        # filled, not multiplied by zero: the row read in place of a missing one may hold NaN
        k, v = (t.index_select(0, row).masked_fill_(~valid[:, None, None], 0).transpose(0, 1) for t in (self.k, self.v))
        return k, v

    def _gather_slices(self, b: int, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """The same by slices, a run of neighbouring blocks each: four times as fast as row by row, but it reads `blocks` on the host."""
        n = int(self.kv_len[b])
        runs: list[list[int]] = []
        for block in blocks.tolist():
            if runs and runs[-1][1] == block:
                runs[-1][1] = block + 1
            else:
                runs.append([block, block + 1])
        sides = []
        for tokens in self.tokens(b):
            side = tokens.new_empty(tokens.shape[0], blocks.shape[0] * block_size, tokens.shape[2])
            at = 0
            for first, last in runs:
                piece = tokens[:, first * block_size : min(last * block_size, n)]
                side[:, at : at + piece.shape[1]] = piece
                side[:, at + piece.shape[1] : at + (last - first) * block_size] = 0
                at += (last - first) * block_size
            sides.append(side)
        return sides[0], sides[1]


@dataclass(frozen=True)
class PagedKeys(KeyView):
    """Keys in pages, as vLLM keeps them: page p of sequence b is `page_table[b, p]`.

    k_pages, v_pages: (pages, page_size, Hkv, D) views, any strides. vLLM's CPU cache keeps K transposed inside a page; pass
    its (pages, Hkv, D, page_size) tensor as `k.permute(0, 3, 1, 2)`: only strides differ, nothing is copied.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor      # (B, max_pages) int32
    kv_len: Tensor          # (B,) int64

    layout = "paged"

    @property
    def storage(self) -> Tensor:
        return self.k_pages

    @property
    def value_storage(self) -> Tensor:
        return self.v_pages

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    def tokens(self, b: int) -> tuple[Tensor, Tensor]:
        return self.head_tokens(b, range(self.n_kv_heads))

    def head_tokens(self, b: int, heads: range) -> tuple[Tensor, Tensor]:
        n = int(self.kv_len[b])
        pages = self.page_table[b, : -(-n // self.page_size)].long()
        # (pages, page_size, heads, D) -> (heads, N, D)
        chosen = (t[:, :, heads.start : heads.stop].index_select(0, pages) for t in (self.k_pages, self.v_pages))
        k, v = (t.flatten(0, 1)[:n].transpose(0, 1) for t in chosen)
        return k, v

    def gather(self, b: int, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        token, valid = block_tokens(blocks, block_size, self.kv_len[b])
        token = torch.where(valid, token, 0)
        sides = []
        for t in (self.k_pages, self.v_pages):
            if block_size % self.page_size == 0:
                pages = self.page_table[b, token[:: self.page_size] // self.page_size].long()
                side = t.index_select(0, pages).flatten(0, 1)
            else:
                side = t[self.page_table[b, token // self.page_size].long(), token % self.page_size]
            sides.append(side.masked_fill_(~valid[:, None, None], 0).transpose(0, 1))
        return sides[0], sides[1]


def block_tokens(blocks: Tensor, block_size: int, n: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of some blocks, (len(blocks) · block_size) int64, and which of them lie before token `n`."""
    token = (blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)).flatten()
    return token, token < n


def token_major(x: Tensor) -> tuple[Tensor, int]:
    """(B, n, H, D) as one (tokens, H, D) view and the number of rows between two sequences. Raises where only a copy would do.

    A (B, H, n, D) cache transposed to (B, n, H, D) qualifies: its token stride is D, so that the next sequence starts H·n rows later.
    """
    batch, n, heads, dim = x.shape
    token_stride = x.stride(1) if n > 1 else max(x.stride(1), dim)
    pitch, rest = divmod(x.stride(0), token_stride) if batch > 1 else (0, 0)
    if x.stride(3) != 1 or rest:
        raise ValueError(f"no (tokens, heads, head_dim) view of shape {tuple(x.shape)} with strides {x.stride()}: call .contiguous() first")
    view = x.as_strided(((batch - 1) * pitch + n, heads, dim), (token_stride, x.stride(2), 1))
    return view, pitch
