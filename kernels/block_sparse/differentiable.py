"""Block-sparse attention with gradients, for training: masked SDPA on a CPU, FlexAttention on CUDA (design.md §4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan, causal_blocks
from accel.kernels.block_sparse.ragged import Ragged, Rows

# FlexAttention's kernels take tiles of up to so many rows and keys, which must divide a block
FLEX_BLOCK = 128


def differentiable_attention(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None = None
) -> Tensor:
    """What `block_sparse_attention` returns, (T, Hq, Dv), with gradients for q, K and V.

    q: (T, Hq, D) view. Sequences run one after the other. On a CPU each needs a mask of (heads, L, N) booleans, one head where all are
    alike, and SDPA's own copy of it; with `softcap` also (Hq, L, N) scores. Memory is O(L·N) either way: 4K tokens and 32 heads of
    their own take 0.5 GB. On CUDA FlexAttention reads the block lists, and nothing of that size exists, where blocks are multiples of 128
    tokens, as its kernels want them; smaller ones are masked there too.
    Rows of no sequence and rows without keys are 0. Raises UnsupportedError for paged keys, which no training step has.
    """
    if keys.layout != "contiguous":
        raise UnsupportedError("gradients need contiguous keys, a paged cache is for inference")
    attend = flex_sequence if takes_flex(q.device, plan.block_size) else masked_sequence
    out = q.new_zeros(q.shape[0], q.shape[1], keys.value_dim)
    for rows in lens.rows():
        if not rows.q_len:
            continue
        own = slice(rows.q_start, rows.q_start + rows.q_len)
        k, v = keys.tokens(rows.index)
        # (L, Hq, D) -> (Hq, L, D): attention wants heads outermost, as `tokens` gives them
        out[own] = attend(q[own].transpose(0, 1), k, v, plan, rows, scale=scale, softcap=softcap).transpose(0, 1)
    return out


def takes_flex(device: torch.device, block_size: int) -> bool:
    """Whether FlexAttention runs here: it has a backward pass on CUDA, and kernels for blocks of whole tiles."""
    return device.type == "cuda" and block_size % FLEX_BLOCK == 0


def token_mask(plan: BlockPlan, rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """The plan's visible keys token by token, causality included: (Hq, L, N) bool, (1, L, N) where every head has the same."""
    tiles = plan.block_mask(rows).to(device)
    query = torch.arange(rows.q_len, device=tiles.device) + rows.offset
    key = torch.arange(rows.kv_len, device=tiles.device)
    block = query // plan.block_size - rows.first_block(plan.block_size)
    return tiles[:, block][:, :, key // plan.block_size] & (key <= query[:, None])


def masked_sequence(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: Rows, *, scale: float, softcap: float | None) -> Tensor:
    """One sequence with a token mask: q (Hq, L, D), k and v (Hkv, N, D) -> (Hq, L, Dv)."""
    mask = token_mask(plan, rows, q.device)
    if softcap is None:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None], scale=scale, enable_gqa=True)[0]
    group = q.shape[0] // k.shape[0]
    k, v = (t.repeat_interleave(group, 0) for t in (k, v))
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = softcap * torch.tanh(q.to(precise) @ k.to(precise).mT * (scale / softcap))
    is_empty = ~mask.any(-1, keepdim=True)
    # a row without keys is spared the mask: its softmax would be NaN, and so would the gradients of all others
    probs = scores.masked_fill(~(mask | is_empty), -torch.inf).softmax(-1).masked_fill(is_empty, 0)
    return probs.to(v.dtype) @ v


def flex_sequence(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: Rows, *,
    scale: float, softcap: float | None, attention: Callable[..., Tensor] | None = None,
) -> Tensor:
    """One sequence through FlexAttention: q (Hq, L, D), k and v (Hkv, N, D) -> (Hq, L, Dv).

    attention: `flex_attention` itself, where it shall not be compiled. FlexAttention has no backward on a CPU: there the tests compare its
    uncompiled forward with `masked_sequence`. The compiled one needs CUDA.
    """
    # its rows start on a block boundary, the chunk behind a cached prefix may not: rows in front, dropped again below
    n_front = rows.offset % plan.block_size
    q = F.pad(q, (0, 0, n_front, 0))
    mask = flex_block_mask(plan, rows, device=q.device)
    run = attention or _compiled_flex_attention()
    out = run(q[None], k[None], v[None], score_mod=_softcap_mod(softcap), block_mask=mask, scale=scale, enable_gqa=True)
    return out[0, :, n_front:]


def flex_block_mask(plan: BlockPlan, rows: Rows, *, device: torch.device | str) -> BlockMask:
    """The plan of one sequence as FlexAttention's BlockMask, (1, Hq or 1, query rows, N).

    Query row 0 is the first row of the first query block, which after a cached prefix may lie before the first query.
    """
    size = plan.block_size
    tiles = plan.block_mask(rows).to(device)
    distance = causal_blocks(rows, size, device)
    first_row = rows.first_block(size) * size
    has_heads = tiles.shape[0] > 1
    # only tiles on the diagonal need a test per token
    masked_count, masked_index = _block_lists(tiles[None] & (distance == 0))
    full_count, full_index = _block_lists(tiles[None] & (distance > 0))

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        # the compiled kernel asks this on the diagonal only; uncompiled, FlexAttention ignores the lists and asks everywhere
        return tiles[h if has_heads else 0, row // size, key // size] & (row + first_row >= key)

    lengths = (rows.kv_len - first_row, rows.kv_len)
    return BlockMask.from_kv_blocks(
        masked_count, masked_index, full_count, full_index, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=lengths
    )


def _block_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row holds, (..., nq) int32, and which, (..., nq, nk) int32, ascending; entries past the count mean nothing."""
    # a stable sort brings the kept blocks to the front
    return tiles.sum(-1, dtype=torch.int32), tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _softcap_mod(softcap: float | None) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)
