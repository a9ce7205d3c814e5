"""Cascading and adaptive eviction (CAKE, ICLR 2025, arXiv 2503.12491): layers whose attention is spread and restless get more of one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.patches._cache import CacheBudget, attention_of, budget, divided, mean_of_pairs, n_tokens, newest, scales_needed
from accel.patches._options import is_whole, require, require_flag, require_number, require_whole
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, Method, ModelInfo, Retain

LEAST_SHARE = 0.1       # of an equal part, which every layer gets: a layer left with nothing could never show that it needs more


@dataclass(frozen=True, kw_only=True)
class CAKE(CacheBudget):
    """One budget for all layers, divided by how spread and how restless their attention is; kept is what is read much or unevenly (arXiv 2503.12491).

    keep: how many entries a head keeps as a mean over layers. window: the last queries of a scale, which vote, and whose own entries stay; small
    budgets give these at most half. kernel: how many neighbouring entries are pooled, by their mean; an odd number, 1 does not pool. gamma: weight of
    the variance of an entry's attention beside its mean. tau_spread, tau_shift: the larger, the less entropy and variance of a layer's attention
    count in its part of the budget. share_cfg_selection: both rows of a guided picture keep the same entries.

    A next-scale model attends in a layer before the layers behind it have run, so a scale is divided by what the scale before showed; all layers
    are equal at the first. Rows drawn together share one division, as in the published code: pictures differ from those drawn alone.
    """

    window: int = 32
    kernel: int = 5
    gamma: float = 200.0
    tau_spread: float = 1.6
    tau_shift: float = 0.6
    share_cfg_selection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag(self, "share_cfg_selection")
        require_whole(self, "window", 1)
        require(self, is_whole(self.kernel) and self.kernel > 0 and self.kernel % 2 == 1, f"kernel must be an odd number, got {self.kernel!r}")
        require_number(self, "gamma", 0, math.inf)
        for name in ("tau_spread", "tau_shift"):
            require_number(self, name, 0.1, math.inf)

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        return scales_needed(model)

    def needs(self) -> CacheNeeds:
        """Every step counts for the division, those too that fit; where all is kept there is nothing to divide."""
        return CacheNeeds(every_step=not self.keeps_all)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        total = model.n_layers * budget(n_tokens(model, n_entries), self.keep)
        seen: Mapping[int, float] = (shared or {}).get(f"cake {step - 1}", {})
        # layers that were not looked at, and all before the first scale, are taken for average ones
        mean = sum(seen.values()) / len(seen) if seen else 1.0
        parts = divided(total, [seen.get(i, mean) for i in range(model.n_layers)], most=n_entries, least_share=LEAST_SHARE)
        return [HeadGroup(tuple(range(model.n_kv_heads)), parts[layer])]

    def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
        """Notes how spread and how restless the attention of a layer is."""
        self._look(ctx)

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The window's own entries, and of the others those with the largest pooled mean and variance of attention."""
        attention = self._look(ctx)
        own = newest(ctx, min(attention.shape[2], group.budget // 2))
        worth = attention.mean(2) + self.gamma * attention.var(2, correction=0)
        scores = self._over_pairs(worth, ctx).masked_fill(own, 0.0)
        pooled = F.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        return Retain(self.best(ctx, pooled, group.budget, forced=own))

    def _over_pairs(self, scores: Tensor, ctx: CompressionContext) -> Tensor:
        return mean_of_pairs(scores, ctx) if self.share_cfg_selection else scores

    def _look(self, ctx: CompressionContext) -> Tensor:
        """(B, H, rows, N): the attention of the window; what it says of the layer is noted for the next scale."""
        n_new = ctx.q.shape[2]
        attention = attention_of(ctx, torch.arange(max(0, n_new - self.window), n_new, device=ctx.q.device))
        spread = -torch.special.xlogy(attention, attention).sum((2, 3)).mean()
        shift = attention.var(2, correction=0).sum(2).mean()
        # one wait for the device per layer and scale: budgets are plain numbers
        both = torch.stack([spread, shift]).tolist()
        seen = ctx.shared.setdefault(f"cake {ctx.step}", {})
        seen[ctx.layer] = both[0] ** (1 / self.tau_spread) * both[1] ** (1 / self.tau_shift)
        return attention
