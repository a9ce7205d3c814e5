"""From the probe's masses to columns, diagonals and query-aware tiles, batched over heads (sparse-attention.md §2.5–2.7)."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.block_sparse import Rows
from accel.kernels.block_sparse.plan import causal_blocks
from accel.kernels.flex_index.counts import count_to_reach
from accel.kernels.flex_index.probe import grid_means, split_blocks, sum_blocks
from accel.kernels.flex_index.rule import PUBLISHED_DIVISOR, SelectionRule

# Elements of the pooled maps held at a time; heads beyond are done in a second step.
_MAP_ELEMENTS = 2**23


def slash_block_mass(distance_mass: Tensor, rule: SelectionRule) -> Tensor:
    """u_s, mass by block diagonal: (Hq, N) by token distance → (Hq, nk). Each row still sums to 1. §2.5.4

    "split": the keys at distance Δb + t lie on diagonal Δ for b − t of b query positions, and on Δ + 1 for the other t. That is the
    share a = |r − c|/b of design.md §4, for r and c counted inside their grid blocks wherever the probe rows lie on the grid.
    """
    b = rule.block_size
    if rule.slash_pooling == "reference":
        # runs of b are cut from the largest distance down: their bounds move with the tail when b does not divide N
        return sum_blocks(distance_mass.flip(-1), b).flip(-1)
    beyond = torch.arange(b, dtype=distance_mass.dtype, device=distance_mass.device) / b
    runs = split_blocks(distance_mass, b)
    mass, spill = runs @ (1 - beyond), runs @ beyond
    mass[:, 1:] += spill[:, :-1]
    mass[:, -1] += spill[:, -1]
    return mass


def rank_blocks(mass: Tensor, n_forced: int) -> Tensor:
    """Indices (Hq, nk) by falling mass, ties by index, after the first `n_forced`, which lead. §2.5.7"""
    score = mass.clone()
    score[:, :n_forced] = torch.inf
    return score.sort(dim=-1, descending=True, stable=True).indices


def keep_best(order: Tensor, count: Tensor) -> Tensor:
    """Mask (Hq, nk) of the first `count` (Hq,) blocks of each ranking."""
    is_kept = torch.arange(order.shape[-1], device=order.device) < count[:, None]
    return torch.zeros_like(is_kept).scatter_(-1, order, is_kept)


def prefix_to_reach(mass: Tensor, share: float | Tensor, *, is_published: bool = False) -> Tensor:
    """Length of the shortest prefix of each row whose sum is at least `share`; the whole row where none is. (…, n) → (…,) int64.

    is_published: the longest prefix whose sum is at most `share`, which stops one entry short (§2.7).
    """
    total = mass.cumsum(-1, dtype=torch.float64)
    if is_published:
        return (total <= share).sum(-1)
    return ((total < share).sum(-1) + 1).clamp_max(mass.shape[-1])


def count_blocks(tokens: Tensor, block_mass: Tensor, order: Tensor, rule: SelectionRule) -> Tensor:
    """Blocks to keep before budgets, (Hq,) int64. §2.5.2, §2.5.3

    tokens: (Hq,), K_v or K_s. The repair counts along `order`, where the forced blocks stand first: a plain top n would come out short.
    """
    blocks = tokens // PUBLISHED_DIVISOR + 1 if rule.is_published else (tokens + rule.block_size - 1) // rule.block_size
    if rule.coverage == "block":
        blocks = blocks.maximum(prefix_to_reach(block_mass.gather(-1, order), rule.gamma))
    return blocks


def select_lines(
    token_mass: Tensor, block_mass: Tensor, is_query_aware: Tensor, n_forced: int, rule: SelectionRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (or diagonals) to keep (Hq, nk) bool, with K (Hq,) and n (Hq,). §2.5

    token_mass: (Hq, N); block_mass: (Hq, nk). A query-aware head keeps the minimum budget, its skeleton.
    """
    low, high = rule.budget(block_mass.shape[-1], n_forced)
    tokens = count_to_reach(token_mass, rule.gamma, is_published=rule.is_published)
    order = rank_blocks(block_mass, n_forced)
    count = count_blocks(tokens, block_mass, order, rule).clamp(low, high).masked_fill(is_query_aware, low)
    return keep_best(order, count), tokens, count


def estimate_probe(
    mean_query: Tensor, mean_keys: Tensor, rows: Rows, rule: SelectionRule, *, scale: float, softcap: float | None
) -> Tensor:
    """ā, the probe's block distribution as mean vectors predict it, (Hq, nk). §2.6

    mean_query: (Hq, D); mean_keys: (Hkv, nk, D). The soft-cap of the layer applies to the estimate as it does to the truth.
    """
    # (Hq, D) -> (Hkv, G, D): the heads of a group share their keys
    grouped = mean_query.reshape(mean_keys.shape[0], -1, mean_query.shape[-1]) * scale
    logits = soft_capped(grouped @ mean_keys.transpose(1, 2), softcap).flatten(0, 1)
    if rule.size_corrected_estimate:
        length = min(rule.block_size, rows.q_len)
        position = torch.arange(rows.kv_len - length, rows.kv_len, device=logits.device)
        start = torch.arange(logits.shape[-1], device=logits.device) * rule.block_size
        visible = (position[:, None] + 1 - start).clamp(0, rule.block_size)
        logits = logits + visible.float().mean(0).log()
    return logits.softmax(-1)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def js_distance(p: Tensor, q: Tensor, *, is_guarded: bool = True) -> Tensor:
    """Jensen–Shannon distance of distributions along the last dimension, 0 … √ln 2; 0 exactly for equal ones. §2.6

    is_guarded=False leaves 0·ln 0 and the root of a rounding error as NaN, like the published code.
    """
    if not is_guarded:
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(-1) / 2 + (q * (q / m).log()).sum(-1) / 2).sqrt()
    p, q = p.double(), q.double()
    m = (p + q) / 2
    # a zero contributes nothing, although its logarithm is infinite
    terms = (part * torch.where(part > 0, part / m, 1.0).log() for part in (p, q))
    return (sum(terms, torch.zeros_like(m)).sum(-1) / 2).clamp_min(0).sqrt().float()


def query_aware_tiles(
    q: Tensor, mean_keys: Tensor, heads: Tensor, rows: Rows, rule: SelectionRule, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Tiles of the heads listed in `heads` (n,), as (n, nq, nk) bool, and whether their maps are finite, (n,) bool. §2.7

    q: (L, Hq, D), all query rows of the sequence; mean_keys: (Hkv, nk, D).
    """
    group = q.shape[1] // mean_keys.shape[0]
    distance = causal_blocks(rows, rule.block_size, q.device)
    step = max(1, _MAP_ELEMENTS // distance.numel())
    tiles, is_finite = [], []
    for part in torch.split(heads, step):
        # one head at a time: the fp32 copy of its queries stays in cache
        mean_queries = torch.stack([grid_means(q[:, h].float(), rows.offset, rule.block_size) for h in part.tolist()])
        logits = soft_capped(mean_queries * scale @ mean_keys[part // group].transpose(1, 2), softcap)
        share = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
        is_finite.append(~share.isnan().any(-1).any(-1))
        tiles.append(keep_mass(share, rule) & (distance >= 0))
    return torch.cat(tiles), torch.cat(is_finite)


def keep_mass(share: Tensor, rule: SelectionRule) -> Tensor:
    """The fewest tiles that hold gamma of the map (scope "global") or of each row ("row"), (n, nq, nk) bool; ties by index.

    share: (n, nq, nk), each row sums to 1.
    """
    flat = share.flatten(1) if rule.qa_scope == "global" else share
    rows_each = share.shape[1] if rule.qa_scope == "global" else 1
    ranked = flat.sort(dim=-1, descending=True, stable=True)
    count = prefix_to_reach(ranked.values, rule.gamma * rows_each, is_published=rule.is_published)
    is_kept = torch.arange(flat.shape[-1], device=flat.device) < count[..., None]
    return torch.zeros_like(is_kept).scatter_(-1, ranked.indices, is_kept).view_as(share)
