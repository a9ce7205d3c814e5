"""Pruning methods that keep a given choice: whatever differs from hiding the same columns is the host's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.protocols import Keep, Merge, ModelInfo, PruningContext, Stage, TokenPruning, Unit


def padded(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) int64 and (B, n) bool from a mask (B, tokens)."""
    rows = [row.nonzero().flatten() for row in kept]
    index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return index, torch.arange(index.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


@dataclass(frozen=True, kw_only=True)
class Chosen(TokenPruning):
    """Keeps, at each given layer (None: in front of the model), about the given share of the visual tokens left, drawn by seed.

    ragged: so many tokens fewer for each further sequence. hides: instead of dropping, tokens are hidden from all others. merges: dropped
    tokens go into the first kept one of their sequence, with equal weights.
    """

    at: tuple[tuple[int | None, float], ...] = ((None, 0.5),)
    seed: int = 0
    is_known_ahead: bool = False
    merges: bool = False
    ragged: int = 0
    hides: bool = False

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [
            Stage("projector", is_known_ahead=True) if layer is None else Stage("layer", layer, is_known_ahead=self.is_known_ahead)
            for layer, _ in self.at
        ]

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        return None

    def select(self, ctx: PruningContext) -> Keep | None:
        share = dict(self.at)[ctx.stage.layer]
        token = ctx.is_visual | ctx.is_structural
        kept = torch.zeros_like(token)
        for b, row in enumerate(token):
            places = row.nonzero().flatten()
            # the same number for the same token at every stage: drawn for all, then thinned out
            draw = torch.rand(len(places), generator=torch.Generator().manual_seed(self.seed + 7 * len(places)))
            n = max(0, int(len(places) * share + 0.5) - self.ragged * b)
            kept[b, places[draw.argsort()[:n]]] = True
        if self.hides:
            return Keep(*padded(token), hidden=token & ~kept)
        index, ok = padded(kept)
        return Keep(index, ok, merge=_into_first(token, kept) if self.merges else None)


def _into_first(token: Tensor, kept: Tensor) -> Merge:
    rows = []
    for own, left in zip(token, kept, strict=True):
        if not left.any():
            rows.append(torch.zeros(0, 3))
            continue
        anchor = int(left.nonzero()[0])
        sources = torch.cat([torch.tensor([anchor]), (own & ~left).nonzero().flatten()])
        rows.append(torch.stack([torch.full(sources.shape, float(anchor)), sources.float(), torch.full(sources.shape, 1 / len(sources))], 1))
    merged = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Merge(merged[..., 0].long(), merged[..., 1].long(), merged[..., 2])
