"""What cache methods share: one budget for all heads, scores from a few queries, and stable selection (kv-compression.md §2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.patches._options import require_flag, require_keep
from accel.protocols import CompressionContext, HeadGroup, KVCompression, Method, ModelInfo, When


@dataclass(frozen=True, kw_only=True)
class ScaleBudget(KVCompression):
    """Base of the methods that compress a next-scale model's cache before attention, at every scale, and leave nothing behind the last.

    keep: share of all tokens of all scales that a head keeps, as a float, of which 1.0 changes nothing; or how many entries, as an int.
    """

    keep: float | int = 0.5

    def __post_init__(self) -> None:
        require_keep(self)

    @property
    def when(self) -> tuple[When, ...]:
        return (When("before_attention"),)

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        return [] if model.scale_shapes is not None else ["needs a next-scale model (VAR, Infinity): its budget is a share of all scales"]

    def release(self, model: ModelInfo, layer: int, *, step: int) -> bool:
        return model.scale_shapes is not None and step == len(model.scale_shapes) - 1


@dataclass(frozen=True, kw_only=True)
class UniformBudget(ScaleBudget):
    """Base of the methods that give every head of every layer the same budget."""

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        return [HeadGroup(tuple(range(model.n_kv_heads)), budget(n_tokens(model), self.keep))]


@dataclass(frozen=True, kw_only=True)
class ScoredCache(UniformBudget):
    """Base of the methods that rank entries by attention.

    share_cfg_selection: the conditional and the unconditional row of one image keep the same entries, by the mean of their scores.
    """

    share_cfg_selection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag(self, "share_cfg_selection")

    def over_pairs(self, scores: Tensor, ctx: CompressionContext) -> Tensor:
        """The scores (B, …), where the option says so with the mean of each guidance pair in both of its rows."""
        return mean_of_pairs(scores, ctx) if self.share_cfg_selection else scores


def mean_of_pairs(scores: Tensor, ctx: CompressionContext) -> Tensor:
    """The scores (B, …) with the mean of each guidance pair in both of its rows; the same where there are no pairs."""
    if not ctx.has_guidance_pairs:
        return scores
    # (B, …) -> (2, B/2, …): rows b and b + B/2 are one image
    mean = scores.view(2, -1, *scores.shape[1:]).mean(0)
    return torch.cat([mean, mean])


def n_tokens(model: ModelInfo) -> int:
    """Tokens of all scales of a next-scale model."""
    assert model.scale_shapes is not None   # `supports` refuses other models
    return sum(height * width for height, width in model.scale_shapes)


def budget(n: int, keep: float | int) -> int:
    """Entries kept per head of n, at least one. keep: a share as a float, of which the floor is taken (§2.3); or a count as an int."""
    # 1e-9: 100 · 0.29 is 28.99…
    return min(n, keep) if isinstance(keep, int) else max(1, math.floor(n * keep + 1e-9))


def largest(scores: Tensor, n: int, *, forced: Tensor | None = None) -> Tensor:
    """(…, n) int64 ascending: places of the n largest of (…, N), ties to the lower. `forced` (…, N) bool come first, whatever their scores."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if forced is not None:
        # by index, not by a huge score, which ties and infinities would defeat (§8.3)
        is_other = ~forced.expand(scores.shape).gather(-1, order)
        order = order.gather(-1, is_other.int().argsort(dim=-1, stable=True))
    return order[..., :n].sort(-1).values


def divided(total: int, weights: Sequence[float], *, most: int, least_share: float, sizes: Sequence[int] | None = None) -> list[int]:
    """Whole parts of `total` in proportion to `weights`, none above `most`, none below `least_share` of an equal part or below 1.

    They sum to `total`, or to all that fits under `most`. What does not fit is divided among the others in the same proportion; where all weights
    are 0 the parts are equal. sizes: how many get each part, so that they sum with these factors, to `total` or less by under the largest.
    """
    sizes = sizes or [1] * len(weights)
    total = min(total, sum(sizes) * most)
    least = min(most, max(1, math.floor(least_share * total / sum(sizes))))
    # a weight of 0 gets more than its least part only where all others are full
    lightest = max(weights) * 1e-9 or 1.0
    weights = [max(weight, lightest) for weight in weights]

    def parts_at(level: float) -> list[float]:
        return [min(max(level * weight, least), most) for weight in weights]

    def spent(parts: Sequence[float]) -> float:
        return sum(part * size for part, size in zip(parts, sizes, strict=True))

    low, high = 0.0, most / min(weights)
    # the sum grows with the level: halved until the doubles end
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if spent(parts_at(middle)) <= total else (low, middle)
    parts = parts_at(high if spent(parts_at(high)) <= total else low)
    found = [math.floor(part + 1e-9) for part in parts]
    left = total - int(spent(found))
    # the rounded-off rest goes to the largest remainders, ties to the lower place
    for i in sorted(range(len(found)), key=lambda i: (found[i] - parts[i], i)):
        if found[i] < most and sizes[i] <= left:
            found[i] += 1
            left -= sizes[i]
    return found


def attention_of(ctx: CompressionContext, rows: Tensor) -> Tensor:
    """(B, H, G·n, N) fp32: the attention of the queries `rows` (n,) of this step, query heads of one KV head one behind the other.

    All entries are visible to all queries, as within a scale; padding gets none.
    """
    batch, heads, _, width = ctx.k.shape
    # (B, H·G, n, D) -> (B, H, G·n, D): the query heads of one KV head score together
    q = ctx.q[:, :, rows].float().reshape(batch, heads, -1, width)
    logits = q @ ctx.k.float().mT * ctx.scale
    if ctx.softcap is not None:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    return logits.masked_fill(~ctx.valid[:, :, None], -torch.inf).softmax(-1)


def attention_received(ctx: CompressionContext, rows: Tensor) -> Tensor:
    """(B, H, N) fp32: the attention that each entry gets from the queries `rows` (n,), summed over them and the heads' queries."""
    return attention_of(ctx, rows).sum(2)


def evenly_spread(n: int, n_rows: int, device: torch.device) -> Tensor:
    """(rows,) int64: at most `n_rows` of n places, in the middle of equal parts (§2.4)."""
    n_rows = min(n, n_rows)
    # round((i + ½) · n / rows − ½), ties up
    return (2 * torch.arange(n_rows, device=device) + 1) * n // (2 * n_rows)


def newest(ctx: CompressionContext, n: int) -> Tensor:
    """(N,) bool: the last n entries; they stand in the order of their positions."""
    n_entries = ctx.k.shape[2]
    return torch.arange(n_entries, device=ctx.k.device) >= n_entries - n
