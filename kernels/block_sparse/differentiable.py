"""Block-sparse attention with gradients: masked SDPA on a CPU, FlexAttention on CUDA (design.md §4). Slower than the executors, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan
from accel.kernels.block_sparse.ragged import Ragged, Rows


def differentiable_attention(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None = None) -> Tensor:
    """What `block_sparse_attention` returns, (T, Hq, Dv), with gradients for q, k and v.

    q: (T, Hq, D) view. On a CPU one sequence at a time with a (heads, L, N) boolean mask, so that memory grows with L·N; on CUDA through
    compiled FlexAttention, which reads the same block lists. Rows outside every sequence are 0. Raises UnsupportedError for paged keys.
    """
    if keys.layout != "contiguous":
        raise UnsupportedError("gradients need contiguous keys; a paged cache is for inference")
    outputs = []
    spans = []
    for rows in lens.rows():
        if rows.q_len == 0:
            continue
        k, v = keys.tokens(rows.index)
        q_rows = q[rows.q_start : rows.q_start + rows.q_len].transpose(0, 1)
        outputs.append(_one_sequence(q_rows[None], k[None], v[None], plan, rows, scale=scale, softcap=softcap)[0].transpose(0, 1))
        spans.append(torch.arange(rows.q_start, rows.q_start + rows.q_len, device=q.device))
    width = keys.tokens(0)[1].shape[-1] if lens.batch else q.shape[-1]
    out = q.new_zeros(q.shape[0], q.shape[1], width)
    return out.index_copy(0, torch.cat(spans), torch.cat(outputs)) if outputs else out


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: Rows, *, scale: float, softcap: float | None) -> Tensor:
    """q (1, Hq, L, D), k and v (1, Hkv, N, D) → (1, Hq, L, Dv)."""
    if q.device.type == "cuda":
        return _flex(torch.compile(flex_attention, dynamic=True), q, k, v, plan, rows, scale=scale, softcap=softcap)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(plan, rows)[None], scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    return scores.masked_fill(~token_mask(plan, rows), -torch.inf).softmax(-1) @ v


def token_mask(plan: BlockPlan, rows: Rows) -> Tensor:
    """The plan's visible keys token by token, causality included: (Hq or 1, L, N) bool."""
    tiles = plan.block_mask(rows)
    query = torch.arange(rows.q_len, device=tiles.device) + rows.offset
    key = torch.arange(rows.kv_len, device=tiles.device)
    block = query // plan.block_size - rows.first_block(plan.block_size)
    return tiles[:, block][:, :, key // plan.block_size] & (key <= query[:, None])


def _flex(attention: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: Rows, *, scale: float, softcap: float | None) -> Tensor:
    """The same through FlexAttention; `attention` is `flex_attention`, compiled where speed matters."""
    score_mod = None
    if softcap is not None:

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    out: Tensor = attention(q, k, v, score_mod=score_mod, block_mask=flex_block_mask(plan, rows, q.device), scale=scale, enable_gqa=True)
    return out


def flex_block_mask(plan: BlockPlan, rows: Rows, device: torch.device) -> BlockMask:
    """The plan of one sequence as FlexAttention's BlockMask. Rows are counted from the first query block of the grid.

    A cached prefix must end on a block boundary, because FlexAttention's rows start at the first query.
    """
    size, offset = plan.block_size, rows.offset
    if offset % size:
        raise UnsupportedError(f"gradients on CUDA need the cached prefix ({offset} tokens) to be a multiple of the block size {size}")
    tiles = plan.block_mask(rows)[None].to(device)
    distance = torch.arange(tiles.shape[2], device=device)[:, None] + rows.first_block(size) - torch.arange(tiles.shape[3], device=device)
    lists = []
    for part in (tiles & (distance == 0), tiles & (distance > 0)):
        order = part.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        lists += [part.sum(-1, dtype=torch.int32), order]

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + offset >= j

    lengths = (rows.q_len, rows.kv_len)
    return BlockMask.from_kv_blocks(lists[0], lists[1], lists[2], lists[3], BLOCK_SIZE=size, mask_mod=causal, seq_lengths=lengths)
