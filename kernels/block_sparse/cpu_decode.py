"""Decoding on a CPU: few query rows against many keys, as two matrix products per KV head (kernels.md §2.6).

torch's own attention takes 8 to 36 times as long in bf16. The G query heads of a KV head and the L rows are folded into one operand of
(G · L, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from accel.kernels.block_sparse.cpu_common import Problem, finish_scores, softmax_with_lse, workspace
from accel.kernels.block_sparse.ragged import Rows

# with more rows than this the tiles of the prefill path waste less
MAX_ROWS = 16
# keys converted to fp32 at a time
CONVERTED_TOKENS = 1024


def is_decode(rows: Rows) -> bool:
    """Whether a sequence has so few query rows that its keys are read in place rather than packed."""
    return rows.q_len <= MAX_ROWS


def attend_decode(problem: Problem) -> None:
    """Writes the rows of one sequence. Heads with different lists read the union of them, masked."""
    rows, group = problem.rows, problem.group
    here = slice(rows.q_start, rows.q_start + rows.q_len)
    if problem.mask is not None and not problem.mask.any():
        problem.out[here] = 0
        if problem.lse is not None:
            problem.lse[:, here] = -torch.inf
        return
    if problem.mask is None:
        k, v = problem.keys.tokens(rows.index)
        token = None
    else:
        blocks = problem.mask.any(0).any(0).nonzero()[:, 0]
        k, v = problem.keys.gather(rows.index, blocks, problem.block_size)
        token = (blocks[:, None] * problem.block_size + torch.arange(problem.block_size, device="cpu")).flatten()
    # (L, Hkv · G, D) -> (Hkv, G · L, D)
    q = problem.q[here].transpose(0, 1).reshape(-1, group * rows.q_len, problem.q.shape[2])
    scores = products(q, k, problem).mul_(problem.scale)
    finish_scores(scores, problem.softcap)

    # (Hkv, G · L, keys) -> (Hq, L, keys)
    by_head = scores.view(-1, rows.q_len, scores.shape[2])
    visible = visible_tokens(problem, token)
    if not visible.all():
        by_head[..., -visible.shape[2] :].masked_fill_(~visible, -torch.inf)
    lse = softmax_with_lse(by_head, wants_lse=problem.lse is not None)
    is_empty = ~visible.any(-1)
    if is_empty.any():
        # a row without keys: softmax of nothing is NaN, its result is 0. A row that sees a NaN keeps it
        by_head.masked_fill_(is_empty[..., None], 0)
    problem.out[here] = weighted_values(scores, v, problem).view(-1, rows.q_len, v.shape[2]).transpose(0, 1)
    if problem.lse is not None and lse is not None:
        problem.lse[:, here] = lse.masked_fill_(is_empty, -torch.inf)


def visible_tokens(problem: Problem, token: Tensor | None) -> Tensor:
    """Which of the gathered tokens each row sees, (Hq or 1, L, keys) bool. Where None: which of the last L, for all before them are seen."""
    rows = problem.rows
    if token is None or problem.mask is None:
        return torch.ones(1, rows.q_len, rows.q_len, dtype=torch.bool, device="cpu").tril()
    position = torch.arange(rows.offset, rows.kv_len, device="cpu")
    own_block = position // problem.block_size - rows.first_block(problem.block_size)
    listed = problem.mask[:, own_block][:, :, token // problem.block_size]
    return listed & (token <= position[:, None])


def products(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """q·k for every pair, (Hkv, G · L, keys) fp32; rounded to bf16 where the route has scores in bf16."""
    if problem.route.score_dtype == torch.bfloat16:
        return torch.bmm(q, k.transpose(1, 2)).float()
    if problem.route.value_dtype == torch.bfloat16:
        # where bf16 is fast: the product rounded to bf16, and then what the rounding lost; twice reading the keys is less than converting them
        rounded = torch.bmm(q, k.transpose(1, 2))
        return torch.baddbmm(rounded, q, k.transpose(1, 2), beta=-1).float().add_(rounded)
    columns = q.float().transpose(1, 2)
    # keys first: with few rows on the left MKL takes five times as long
    scores = torch.cat([torch.bmm(part, columns) for part in in_fp32(k)], 1)
    return scores.transpose(1, 2).contiguous()


def weighted_values(probs: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """probs (Hkv, rows, keys) fp32 times v (Hkv, keys, Dv)."""
    if problem.route.value_dtype == torch.bfloat16:
        return torch.bmm(probs.bfloat16(), v)
    total = probs.new_zeros(*probs.shape[:2], v.shape[2])
    at = 0
    for part in in_fp32(v):
        total.baddbmm_(probs[..., at : at + part.shape[1]], part)
        at += part.shape[1]
    return total


def in_fp32(x: Tensor) -> Iterator[Tensor]:
    """Keys or values (Hkv, n, D) in fp32: themselves, or converted part by part in one buffer that stays in the caches."""
    if x.dtype == torch.float32:
        yield x
        return
    for lo in range(0, x.shape[1], CONVERTED_TOKENS):
        part = x[:, lo : lo + CONVERTED_TOKENS]
        buffer = workspace.take("converted", tuple(part.shape), torch.float32)
        yield buffer.copy_(part)
