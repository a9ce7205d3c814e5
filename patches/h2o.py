"""Heavy hitters (H2O, NeurIPS 2023, arXiv 2306.14048): the entries with the most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.patches._cache import attention_received, evenly_spread, newest
from accel.patches._head_budgets import ScoredCache
from accel.patches._options import require_number, require_whole
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, Retain


@dataclass(frozen=True, kw_only=True)
class H2O(ScoredCache):
    """Keeps the entries that have received the most attention, and the newest ones (NeurIPS 2023, arXiv 2306.14048).

    recent_share: how much of `keep` the newest entries take unasked; 0 leaves all to the ranking, as an ablation does.
    n_queries: how many queries of a scale, evenly spread, stand for all of them when its own entries are ranked, since compression comes before
        attention; None takes all. Attention of earlier scales, and all of a decoder's, is counted whole.
    """

    recent_share: float = 0.5
    n_queries: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "recent_share", 0, 1)
        require_whole(self, "n_queries", 1, or_none=True)

    def needs(self) -> CacheNeeds:
        return CacheNeeds(attention_mass=True)

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The newest entries, and those with the most attention of earlier scales and this one."""
        assert ctx.attention_mass is not None   # asked for in `needs`
        mass = ctx.attention_mass
        if ctx.scale_shapes is not None:
            n_new = ctx.q.shape[2]
            rows = evenly_spread(n_new, self.n_queries or n_new, ctx.q.device)
            # a few rows stand for all of the scale: earlier scales were summed over all of theirs
            mass = mass + attention_received(ctx, rows) * (n_new / len(rows))
        recent = newest(ctx, int(group.budget * self.recent_share + 1e-9))
        return Retain(self.best(ctx, self.over_pairs(mass, ctx), group.budget, forced=recent))
