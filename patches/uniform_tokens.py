"""Evenly spaced visual tokens: the control that knows nothing of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.patches._tokens import ProjectorPruning, budget, stride, unit_tokens
from accel.protocols import Keep, PruningContext


@dataclass(frozen=True, kw_only=True)
class UniformTokens(ProjectorPruning):
    """Keeps every so many-th visual token of each unit, row after row, in front of the language model.

    Of N tokens of a unit, T stay: those at ⌊(i + ½) · N / T⌋.
    """

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """Evenly spaced tokens of each unit and their newlines; None where no sequence has an image."""
        if not ctx.units:
            return None
        tokens = unit_tokens(ctx)
        return self.chosen(ctx, [stride(len(own), budget(len(own), self.keep, self.min_tokens), own) for own in tokens], tokens)
