"""The definition of block-sparse attention: plain loops over sequences, heads and query blocks, any precision up to fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan
from accel.kernels.block_sparse.ragged import Ragged, Rows


def naive_attention(
    q: Tensor,
    keys: KeyView,
    plan: BlockPlan,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query row over the keys of its listed blocks, and the natural-log LSE (sparse-attention.md §1.2).

    q: (T, Hq, D). Returns out (T, Hq, Dv) in q's dtype and lse (Hq, T), fp32 or fp64 for fp64 inputs. Rows without keys, and rows of q that
    belong to no sequence, are 0 with LSE −inf. Sums and softmax run in fp32 (fp64 for fp64 inputs); probabilities are rounded to V's dtype.
    """
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape[0], q.shape[1], keys.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=precise, device=q.device)
    group = q.shape[1] // keys.n_kv_heads
    for rows in lens.rows():
        if not rows.q_len:
            continue
        mask = plan.checked_mask(rows, q.shape[1])
        k, v = keys.tokens(rows.index)
        for head in range(q.shape[1]):
            blocks = mask[head % mask.shape[0]]
            for i in range(blocks.shape[0]):
                own = query_rows(rows, i, plan.block_size)
                visible = visible_keys(blocks[i], rows, own, plan.block_size)
                if not visible.any():
                    continue
                place = slice(rows.q_start + own.start, rows.q_start + own.stop)
                # only listed keys are read, so that a NaN elsewhere stays elsewhere
                listed = visible.any(0)
                scores = (q[place, head].to(precise) @ k[head // group, listed].to(precise).T) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(~visible[:, listed], -torch.inf)
                probs = scores.softmax(-1).to(v.dtype).to(precise)
                out[place, head] = (probs @ v[head // group, listed].to(precise)).to(q.dtype)
                lse[head, place] = scores.logsumexp(-1)
    return out, lse


def naive_dense(
    q: Tensor, keys: KeyView, lens: Ragged, *, scale: float, softcap: float | None = None, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Causal attention over all keys by the same loops; see `naive_attention`."""
    return naive_attention(q, keys, ImplicitPlan.dense(block_size), lens, scale=scale, softcap=softcap)


def query_rows(rows: Rows, i: int, block_size: int) -> slice:
    """Rows of one sequence, counted from its first query row, that lie in the i-th query block of the call."""
    first = (rows.first_block(block_size) + i) * block_size - rows.offset
    return slice(max(first, 0), min(first + block_size, rows.q_len))


def visible_keys(listed: Tensor, rows: Rows, own: slice, block_size: int) -> Tensor:
    """Token mask of some query rows, (len(own), N) bool: keys of listed blocks, none after the query. listed: (nk,) bool."""
    position = torch.arange(own.start, own.stop, device=listed.device) + rows.offset
    token = torch.arange(rows.kv_len, device=listed.device)
    return listed[token // block_size] & (token <= position[:, None])
