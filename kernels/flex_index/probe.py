"""Attention of the last queries over all keys, reduced while it streams by: no (heads, rows, keys) tensor exists (§2.3, §2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.kernels.block_sparse import Rows
from accel.kernels.block_sparse.cpu_native import native_probe


@dataclass(frozen=True)
class Probe:
    """Reductions of the probe rows' attention, fp32. Each mass sums to 1 per head."""

    column_mass: Tensor     # a_v (Hq, N), by key
    distance_mass: Tensor   # a_s (Hq, N), by token distance
    tile_mass: Tensor       # (Hq, p, nk), by query block and key block; p = 2 where the probe rows straddle two query blocks
    mean_query: Tensor      # q̄ (Hq, D), over the probe rows
    mean_keys: Tensor       # k̄ (Hkv, nk, D), over the valid keys of each block


def probe_length(rows: Rows, block_size: int) -> int:
    """ℓ, the number of probe rows: the last of the call, at most one block."""
    return min(block_size, rows.q_len)


def run_probe(
    q: Tensor, k: Tensor, rows: Rows, *, block_size: int, scale: float, softcap: float | None, mean_keys: Tensor | None = None
) -> Probe:
    """Reductions of the last rows of one sequence.

    q: (L, Hq, D), k: (Hkv, N, D), views of any floating dtype. mean_keys: (Hkv, nk, D) fp32, the mean key of each block, where it is known
    already. One head at a time passes through one (ℓ, N) fp32 buffer that stays in the last-level cache: several times cheaper than all heads
    at once (kernels.md §3).
    """
    n_heads, n_kv, n = q.shape[1], k.shape[0], rows.kv_len
    length, nk = probe_length(rows, block_size), rows.key_blocks(block_size)
    queries = q[-length:].float()
    scaled = (queries * scale).transpose(0, 1)
    block_of_row = torch.arange(n - length, n, device=q.device) // block_size
    # (p, ℓ): one row of averaging weights per query block, so that column sums come out by query block
    weights = (block_of_row == torch.unique(block_of_row)[:, None]).float() / length
    scratch = _Scratch.empty(length, n, q.device)
    column_mass, distance_mass = (queries.new_empty(n_heads, n) for _ in range(2))
    tile_mass = queries.new_empty(n_heads, weights.shape[0], nk)
    means = queries.new_empty(n_kv, nk, k.shape[2]) if mean_keys is None else mean_keys
    for i_kv in range(n_kv):
        keys = k[i_kv].float()
        if mean_keys is None:
            means[i_kv] = grid_means(keys, 0, block_size)
        for i_h in range(i_kv * (n_heads // n_kv), (i_kv + 1) * (n_heads // n_kv)):
            row_sum = scratch.fill(scaled[i_h], keys, softcap)
            by_key, distance_mass[i_h] = scratch.reduce(weights / row_sum)
            column_mass[i_h] = by_key.sum(0)
            tile_mass[i_h] = sum_blocks(by_key, block_size)
    return Probe(column_mass, distance_mass, tile_mass, queries.mean(0), means)


def run_native_probe(
    q: Tensor, k: Tensor, rows: Rows, *, block_size: int, scale: float, softcap: float | None, mean_keys: Tensor | None = None
) -> Probe:
    """`run_probe` by the compiled CPU kernel, for bf16: two passes over the keys, nothing of size (ℓ, N) stored."""
    n, length = rows.kv_len, probe_length(rows, block_size)
    queries = q[-length:]
    # rows of the first of two query blocks; all of them where there is one
    split = min(length, -(n - length) % block_size or block_size)
    by_key, distance_mass = native_probe(queries, k, block_size=block_size, split=split, scale=scale, softcap=softcap)
    by_key = by_key.div_(length)[:, : 1 if split == length else 2]
    if mean_keys is None:
        mean_keys = torch.stack([grid_means(head.float(), 0, block_size) for head in k])
    return Probe(by_key.sum(1), distance_mass.div_(length), sum_blocks(by_key, block_size), queries.float().mean(0), mean_keys)


@dataclass(frozen=True)
class _Scratch:
    """One head's probe attention before division by the row sums.

    The ℓ columns on the left stay zero: with them the keys at one distance from their row form a column of `diagonal`.
    """

    padded: Tensor      # (ℓ, ℓ + N)
    logits: Tensor      # (ℓ, N), a view of `padded`
    diagonal: Tensor    # (ℓ, N), a view of `padded`: column x holds token distance N − 1 − x
    future: Tensor      # (ℓ, ℓ) bool, the keys of the last ℓ that a row may not see

    @classmethod
    def empty(cls, length: int, n: int, device: torch.device) -> _Scratch:
        padded = torch.zeros(length, length + n, dtype=torch.float32, device=device)
        diagonal = padded.as_strided((length, n), (length + n + 1, 1), 1)
        return cls(padded, padded[:, length:], diagonal, torch.ones(length, length, dtype=torch.bool, device=device).triu(1))

    def fill(self, queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
        """Writes exp(logit − row maximum), and returns the row sums (ℓ,). queries: (ℓ, D), scaled; keys: (N, D); both fp32."""
        torch.mm(queries, keys.T, out=self.logits)
        if softcap is not None:
            self.logits.div_(softcap).tanh_().mul_(softcap)
        self.logits[:, -len(self.future) :].masked_fill_(self.future, -torch.inf)
        self.logits.sub_(self.logits.amax(-1, keepdim=True)).exp_()
        return self.logits.sum(-1)

    def reduce(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums by key, (p, N), and by token distance over all rows, (N,). weights: (p, ℓ), every row in one part."""
        return weights @ self.logits, (weights.sum(0) @ self.diagonal).flip(0)


def grid_means(x: Tensor, offset: int, block_size: int) -> Tensor:
    """Mean of the rows in each grid block, (blocks, D). x: (rows, D) fp32, its first row at absolute position `offset`."""
    lead = min(-offset % block_size, x.shape[0])
    n_full = (x.shape[0] - lead) // block_size
    tail = lead + n_full * block_size
    parts = [x[lead:tail].reshape(n_full, block_size, x.shape[1]).mean(1)]
    if lead:
        parts.insert(0, x[:lead].mean(0, keepdim=True))
    if tail < x.shape[0]:
        parts.append(x[tail:].mean(0, keepdim=True))
    return torch.cat(parts)


def sum_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sums of runs of `block_size` along the last dimension, the last run perhaps shorter: (…, n) → (…, ⌈n / block_size⌉)."""
    return split_blocks(x, block_size).sum(-1)


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """The last dimension cut into runs: (…, n) → (…, ⌈n / block_size⌉, block_size), zeros behind the end."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).reshape(*x.shape[:-1], -1, block_size)
