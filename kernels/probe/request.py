"""What a probe is asked: the tensors, the rows that count, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse import KeyView, Ragged, Rows


@dataclass(frozen=True, slots=True)
class AttentionMoments:
    """Mean and variance of each key's attention over the rows that count, and how spread out those rows are; all fp32.

    mean, variance: (B, Hq, N), 0 for padding. The variance divides by the number of rows n, not n − 1 (kv-compression.md §2.7); a head's σ is
    `variance.double().sum(-1)`. row_entropy: (B, Hq), nats, the mean over the rows; log of the keys that a row sees is its largest value.
    """

    mean: Tensor
    variance: Tensor
    row_entropy: Tensor


@dataclass(frozen=True, slots=True)
class RowSet:
    """The query rows that count, by sequence.

    index: (B, n) int64, ascending rows of each sequence, of which the first `count` are meant; the rest is 0. None: all rows.
    count: (B,) int64. most: upper bound of `count`, known without reading it.
    """

    index: Tensor | None
    count: Tensor
    most: int

    @classmethod
    def all_of(cls, lens: Ragged) -> RowSet:
        return cls(None, lens.q_len, lens.max_q)

    @classmethod
    def listed(cls, index: Tensor, is_meant: Tensor) -> RowSet:
        """The entries of `index` (B, n) where `is_meant`. Sorts on the device: nothing is read."""
        behind = torch.iinfo(torch.int64).max
        ordered = torch.where(is_meant, index, behind).sort(-1).values
        return cls(ordered.masked_fill_(ordered == behind, 0), is_meant.sum(-1), index.shape[1])

    def of(self, rows: Rows) -> Tensor:
        """Rows of one sequence, (n,) int64. Waits for the device: for the torch executors."""
        if self.index is None:
            return torch.arange(rows.q_len, device=self.count.device)
        return self.index[rows.index, : int(self.count[rows.index])]


@dataclass(frozen=True, slots=True)
class Request:
    """One call after its arguments were checked. q: (tokens, Hq, D); key_mask: (B, max_kv) bool or None; the rest as in the API."""

    q: Tensor
    keys: KeyView
    lens: Ragged
    rows: RowSet
    key_mask: Tensor | None
    scale: float
    softcap: float | None
    is_causal: bool
    wants_spread: bool      # variance and entropy, not only the mean

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.keys.n_kv_heads

    def hidden(self, rows: Rows, position: Tensor, n: int) -> Tensor:
        """Which of the first n keys a row may not see, (len(position), n) bool. position: absolute, of rows of one sequence."""
        hidden = torch.zeros(len(position), n, dtype=torch.bool, device=position.device)
        if self.is_causal:
            hidden |= torch.arange(n, device=position.device) > position[:, None]
        if self.key_mask is not None:
            hidden |= ~self.key_mask[rows.index, :n]
        return hidden


@dataclass(frozen=True, slots=True)
class Columns:
    """What an executor writes: `mean` and, where wanted, the rest of `AttentionMoments`."""

    mean: Tensor
    variance: Tensor | None
    row_entropy: Tensor | None

    @classmethod
    def zeros(cls, request: Request, dtype: torch.dtype = torch.float32) -> Columns:
        heads = (request.lens.batch, request.q.shape[1])
        mean = torch.zeros(*heads, request.lens.max_kv, dtype=dtype, device=request.q.device)
        if not request.wants_spread:
            return cls(mean, None, None)
        return cls(mean, torch.zeros_like(mean), mean.new_zeros(heads))
