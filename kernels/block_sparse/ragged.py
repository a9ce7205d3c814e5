"""Where each sequence of a batch lies in token-major tensors, and on which block grid (sparse-attention.md §1.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence as Python numbers: its query rows, and where they stand among its keys."""

    index: int      # b, the place in the batch
    q_start: int    # first row of the sequence in the query tensor
    q_len: int      # L
    kv_len: int     # N

    @property
    def offset(self) -> int:
        """P, the absolute position of the first query row."""
        return self.kv_len - self.q_len

    def first_block(self, block_size: int) -> int:
        """Absolute index of the query block that holds the first query row."""
        return self.offset // block_size

    def query_blocks(self, block_size: int) -> int:
        """Number of query blocks of this call; the first and the last may be partial."""
        return self.key_blocks(block_size) - self.first_block(block_size) if self.q_len else 0

    def key_blocks(self, block_size: int) -> int:
        """nk, the number of key blocks; the last may be partial."""
        return -(-self.kv_len // block_size)

    def causal_tiles(self, block_size: int) -> int:
        """Tiles a dense causal kernel computes for these rows, per head."""
        first, n = self.first_block(block_size), self.query_blocks(block_size)
        return n * first + n * (n + 1) // 2


@dataclass(frozen=True, slots=True)
class Ragged:
    """A batch of sequences inside query rows (tokens, heads, head_dim), gaps between sequences allowed (padding).

    q_start, q_len, kv_len: (B,) int64 on the tensors' device. Row r of sequence b is row `q_start[b] + r`; its absolute position is
    `kv_len[b] - q_len[b] + r`, so the queries are always the last `q_len` of `kv_len` tokens. The block grid starts at position 0 of
    each sequence, never at the tensor index.
    max_q, max_kv: upper bounds known without reading the tensors.
    n_gapless: rows 0 … n_gapless − 1 all belong to a sequence, as far as that is known without reading the tensors. 0 where the tensors may be
    written later, say between the replays of a graph: what belongs to no sequence then is cleared, at the cost of a launch.
    """

    q_start: Tensor
    q_len: Tensor
    kv_len: Tensor
    max_q: int
    max_kv: int
    n_gapless: int = 0

    @classmethod
    def of(cls, q_len: list[int], kv_len: list[int], *, q_start: list[int] | None = None, device: torch.device | str = "cpu") -> Ragged:
        """Sequences of known lengths; without `q_start` they lie one behind the other."""
        starts = q_start if q_start is not None else [sum(q_len[:b]) for b in range(len(q_len))]
        at, rows, keys = (torch.tensor(values, dtype=torch.int64, device=device) for values in (starts, q_len, kv_len))
        return cls(at, rows, keys, max_q=max(q_len, default=0), max_kv=max(kv_len, default=0), n_gapless=gapless_rows(starts, q_len))

    @property
    def batch(self) -> int:
        return self.q_start.shape[0]

    def rows(self) -> Iterator[Rows]:
        """The sequences one by one as Python numbers. Waits for the device: for CPU executors, references and tests."""
        for b, (start, length, kv) in enumerate(zip(self.q_start.tolist(), self.q_len.tolist(), self.kv_len.tolist(), strict=True)):
            yield Rows(b, start, length, kv)


def gapless_rows(q_start: Iterable[int], q_len: Iterable[int]) -> int:
    """How many rows from the first on belong to a sequence, without a gap."""
    end = 0
    for start, length in sorted(zip(q_start, q_len, strict=True)):
        if start > end:
            break
        end = max(end, start + length)
    return end
