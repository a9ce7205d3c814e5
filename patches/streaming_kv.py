"""Sinks and a window of the newest entries (StreamingLLM, ICLR 2024, arXiv 2309.17453), the control that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.patches._cache import newest
from accel.patches._head_budgets import HeadBudgets
from accel.patches._options import require_whole
from accel.protocols import CompressionContext, HeadGroup, Retain


@dataclass(frozen=True, kw_only=True)
class StreamingKV(HeadBudgets):
    """Keeps the first entries and the newest of each head (StreamingLLM, arXiv 2309.17453).

    sinks: how many of `keep` are the first; where the budget is smaller, all but one. Entries count in the order they were made:
    scale by scale, row by row, so a window smaller than the last scale holds its lower rows.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "sinks", 0)

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The first entries and the newest, alike for all rows and heads."""
        n_sinks = min(self.sinks, group.budget - 1)
        places = torch.arange(ctx.k.shape[2], device=ctx.k.device)
        # the first that are there: padding stands in front of them
        is_sink = ctx.valid & (ctx.valid.cumsum(-1) <= n_sinks)
        stays = is_sink | newest(ctx, group.budget - n_sinks)
        return Retain(self.best(ctx, places.expand(ctx.valid.shape), group.budget, forced=stays))
