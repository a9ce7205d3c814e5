"""FastV: behind a few decoder layers, keeps the visual tokens that the newest token attends to (ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.patches._options import require_keep, require_whole
from accel.patches._tokens import answer, budget, largest, position_reasons, stride, usable
from accel.protocols import Keep, Method, ModelInfo, Observation, PruningContext, Stage, TokenPruning


@dataclass(frozen=True, kw_only=True)
class FastV(TokenPruning):
    """Keeps the visual tokens that the last token of the prompt attends to, from decoder layer `layer` on. No training.

    keep: share of the visual tokens of a sequence to keep, as a float, or how many, as an int; all its images compete. 1.0 changes nothing.
    layer: first layer that does without the others; the attention is that of the layer before it.
    """

    keep: float | int = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_keep(self)
        require_whole(self, "layer", 1)

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: too few layers, or one that does not see the whole prompt."""
        reasons = position_reasons(self, model)
        if self.layer >= model.n_layers:
            reasons.append(f"layer must be below the {model.n_layers} layers of {model.family}, got {self.layer}")
        elif model.layer_types[self.layer - 1 : self.layer] not in ((), ("full_attention",)):
            full = [i + 1 for i, kind in enumerate(model.layer_types[:-1]) if kind == "full_attention"]
            reasons.append(f"layer {self.layer - 1}, whose attention would rank, sees a part of the prompt only; layer can be one of {full}")
        return reasons

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [] if self.keep == 1 else [Stage("layer", self.layer)]

    def observe(self) -> Sequence[Observation]:
        return () if self.keep == 1 else (Observation("last_row", layer=self.layer - 1),)

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """The best visual tokens of each sequence and all structural ones; None where no sequence has an image."""
        tokens = [row.nonzero().flatten() for row in ctx.is_visual]
        if not any(len(own) for own in tokens):
            return None
        rows = ctx.observed["last_row"].detach().to(ctx.is_visual.device, torch.float32)
        scores, broken = usable(self, [row[own] for row, own in zip(rows, tokens, strict=True)])
        kept = ctx.is_structural.clone()
        for b, own in enumerate(tokens):
            n = budget(len(own), self.keep)
            kept[b, own[stride(len(own), n, own) if b in broken else largest(scores[b], n)]] = True
        return answer(kept)
