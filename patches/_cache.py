"""What cache methods share: a budget, scores from a few queries, and stable selection (kv-compression.md §2, §10.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.patches._options import require_flag, require_keep, require_whole
from accel.protocols import CompressionContext, KVCompression, ModelInfo, When


@dataclass(frozen=True, kw_only=True)
class CacheBudget(KVCompression):
    """Base of the methods that keep a share of the cache: of a next-scale model before attention at every scale, nothing behind the last; of a
    decoder behind the prompt, and again while it decodes.

    keep: share of all tokens of all scales, or of the prompt, that a head keeps, as a float, of which 1.0 changes nothing; or how many entries, as
        an int.
    min_entries: of a decoder, how many a head keeps at least, so that short prompts stay whole.
    every: of a decoder, how many decoding steps lie between two evictions.
    protect_text: in a prompt with pictures, text stays before visual tokens do.
    """

    keep: float | int = 0.5
    min_entries: int = 64
    every: int = 32
    protect_text: bool = True

    def __post_init__(self) -> None:
        require_keep(self)
        require_whole(self, "min_entries", 1)
        require_whole(self, "every", 1)
        require_flag(self, "protect_text")

    @property
    def when(self) -> tuple[When, ...]:
        return When("before_attention"), When("after_prefill"), When("every_n_steps", self.every)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped."""
        return isinstance(self.keep, float) and self.keep == 1

    def release(self, model: ModelInfo, layer: int, *, step: int) -> bool:
        return model.scale_shapes is not None and step == len(model.scale_shapes) - 1

    def best(self, ctx: CompressionContext, scores: Tensor, n: int, *, forced: Tensor | None = None) -> Tensor:
        """(B, H, n) int64 ascending: the forced entries first, then protected text, then those with the largest scores; padding last.

        forced: (B, H, N) bool, none of padding.
        """
        text = text_entries(ctx) if self.protect_text else None
        there = ctx.valid if text is None else ctx.valid & text
        lowest = torch.finfo(scores.dtype).min if scores.dtype.is_floating_point else torch.iinfo(scores.dtype).min
        scores = scores.masked_fill(~ctx.valid, lowest)
        return largest(scores, n, forced=forced, preferred=None if text is None else there)


def text_entries(ctx: CompressionContext) -> Tensor | None:
    """(B, H, N) bool: the entries that are text beside visual tokens; None where no prompt told them apart. Newer tokens are text."""
    if ctx.protected is None:
        return None
    batch, heads, _ = ctx.position.shape
    width = ctx.protected.shape[1]
    place = ctx.position.clamp(0, width - 1)
    return ctx.protected[:, None].expand(batch, heads, width).gather(2, place) | (ctx.position >= width)


def mean_of_pairs(scores: Tensor, ctx: CompressionContext) -> Tensor:
    """The scores (B, …) with the mean of each guidance pair in both of its rows; the same where there are no pairs."""
    if not ctx.has_guidance_pairs:
        return scores
    # (B, …) -> (2, B/2, …): rows b and b + B/2 are one image
    mean = scores.view(2, -1, *scores.shape[1:]).mean(0)
    return torch.cat([mean, mean])


def n_tokens(model: ModelInfo, n_entries: int) -> int:
    """Tokens of which a share is kept: of all scales of a next-scale model, else of the prompt so far."""
    return n_entries if model.scale_shapes is None else sum(height * width for height, width in model.scale_shapes)


def scales_needed(model: ModelInfo) -> list[str]:
    """Why a method made for next-scale models cannot run on this one."""
    return [] if model.scale_shapes is not None else ["needs a next-scale model (VAR, Infinity): it works from scale to scale"]


def budget(n: int, keep: float | int) -> int:
    """Entries kept per head of n, at least one. keep: a share as a float, of which the floor is taken (§2.3); or a count as an int."""
    # 1e-9: 100 · 0.29 is 28.99…
    return min(n, keep) if isinstance(keep, int) else max(1, math.floor(n * keep + 1e-9))


def largest(scores: Tensor, n: int, *, forced: Tensor | None = None, preferred: Tensor | None = None) -> Tensor:
    """(…, n) int64 ascending: places of the n largest of (…, N), ties to the lower.

    forced, preferred: (…, N) bool; those come first, and these next, whatever their scores.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    for ahead in (preferred, forced):
        if ahead is not None:
            # by index, not by a huge score, which ties and infinities would defeat (§8.3)
            is_other = ~ahead.expand(scores.shape).gather(-1, order)
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

    In a next-scale model all entries are visible to all queries, in a decoder those up to the query's own. Padding gets none, and gives none.
    """
    batch, heads, _, width = ctx.k.shape
    # (B, H·G, n, D) -> (B, H, G·n, D): the query heads of one KV head score together
    q = ctx.q[:, :, rows].float().reshape(batch, heads, -1, width)
    logits = q @ ctx.k.float().mT * ctx.scale
    if ctx.softcap is not None:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    seen = ctx.valid[:, :, None]
    if ctx.scale_shapes is None:
        # (B, H, n, N), the same for the query heads of one KV head
        causal = ctx.position[:, :, None] <= ctx.q_position[:, rows][:, None, :, None]
        seen = (seen & causal).repeat(1, 1, q.shape[2] // len(rows), 1)
    weights: Tensor = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights if ctx.scale_shapes is not None else weights.nan_to_num(0.0)


def attention_received(ctx: CompressionContext, rows: Tensor) -> Tensor:
    """(B, H, N) fp32: the attention that each entry gets from the queries `rows` (n,), summed over them and the heads' queries."""
    return attention_of(ctx, rows).sum(2)


def evenly_spread(n: int, n_rows: int, device: torch.device) -> Tensor:
    """(rows,) int64: at most `n_rows` of n places, in the middle of equal parts (§2.4)."""
    n_rows = min(n, n_rows)
    # round((i + ½) · n / rows − ½), ties up
    return (2 * torch.arange(n_rows, device=device) + 1) * n // (2 * n_rows)


def newest(ctx: CompressionContext, n: int) -> Tensor:
    """(B, H, N) bool: of each row the last n entries that are there; they stand in the order of their positions."""
    return ctx.valid & (ctx.valid.flip(-1).cumsum(-1).flip(-1) <= n)
