"""Observation window (SnapKV, NeurIPS 2024, arXiv 2404.14469): the entries, and their neighbours, that the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from accel.patches._cache import attention_received, newest
from accel.patches._head_budgets import ScoredCache
from accel.patches._options import is_whole, require, require_choice, require_whole
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, Retain


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredCache):
    """Keeps what the last queries attend to, pooled over neighbouring entries, and these queries' own entries (arXiv 2404.14469).

    window: the last queries of the scale, or of a decoder, which vote and whose own entries stay; small budgets give these entries at most half.
    kernel: how many neighbours are pooled, an odd number; 1 does not pool.
    pooling: "max" or "avg" of them.
    """

    window: int = 32
    kernel: int = 5
    pooling: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "window", 1)
        require(self, is_whole(self.kernel) and self.kernel > 0 and self.kernel % 2 == 1, f"kernel must be an odd number, got {self.kernel!r}")
        require_choice(self, "pooling", ("max", "avg"))

    def needs(self) -> CacheNeeds:
        return CacheNeeds(n_queries=self.window)

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The window's own entries, and the best of the others by pooled votes."""
        n_new = ctx.q.shape[2]
        window = min(self.window, n_new)
        votes = attention_received(ctx, torch.arange(n_new - window, n_new, device=ctx.q.device))
        votes = self.over_pairs(votes, ctx)
        own = newest(ctx, min(window, group.budget // 2))
        # the window ranks nobody by its own entries: they neither compete nor lend their votes to neighbours
        votes = votes.masked_fill(own, 0.0)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return Retain(self.best(ctx, pooled, group.budget, forced=own))
