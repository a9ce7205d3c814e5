"""FasterVLM: keeps the visual tokens that the vision encoder itself attends to (arXiv 2412.01818), and its successor VisPruner."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches._options import require_choice, require_number, require_whole
from accel.patches._tokens import ScopedPruning, allotments, largest, mean_one, observed_scores, stride, unit_tokens, usable
from accel.protocols import Choice, Keep, Method, ModelInfo, Observation, PruningContext, Uniform

_OBSERVED: dict[str, Literal["cls_row", "mean_received"]] = {"cls": "cls_row", "received": "mean_received"}

# Units up to this size thin out in the published steps of 8; larger ones in steps that grow with what is left to drop (§2.9).
_LARGE_UNIT = 1024


@dataclass(frozen=True, kw_only=True)
class FasterVLM(ScopedPruning):
    """Keeps the visual tokens with the most attention from [CLS], or from all patches, in front of the language model. No training.

    score: attention of the [CLS] query ("cls") or received from all patches ("received"); "auto" takes "cls" where the encoder has it.
    head_reduce: how the heads of the scoring layer are joined.
    scoring_layer: encoder layer; None for the one whose output is the feature.
    max_queries: for "received", the rows that the mean is taken over, evenly spread; None for all. Encoders with fewer patches use all.
    important_ratio: share of the kept tokens that is chosen by score; the rest are, of the others, those that resemble each other least.
        1 is FasterVLM, 0.5 VisPruner.
    """

    score: Literal["auto", "cls", "received"] = "auto"
    head_reduce: Literal["mean", "max"] = "mean"
    scoring_layer: int | None = None
    max_queries: int | None = 2048
    important_ratio: float = 1.0
    _has_cls: bool = field(default=False, init=False, repr=False, compare=False)

    @classmethod
    def reference(cls, **overrides: Any) -> Self:
        """The published code: survivors numbered without gaps, every newline kept."""
        return cls(**{"position_mode": "compact", "newline": "all", **overrides})

    @classmethod
    def vispruner(cls, keep: float = 0.25, **overrides: Any) -> Self:
        """VisPruner (ICCV 2025): half of the tokens by score, half for diversity. keep: a share, or a number of tokens as an int."""
        return cls(**{"important_ratio": 0.5, "keep": keep, **overrides})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "score", ("auto", "cls", "received"))
        require_choice(self, "head_reduce", ("mean", "max"))
        require_whole(self, "scoring_layer", 0, or_none=True)
        require_whole(self, "max_queries", 1, or_none=True)
        require_number(self, "important_ratio", 0, 1)

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: a [CLS] that is not there, positions that cannot be made compact."""
        reasons = super().supports(model, host, others)
        if self.score == "cls" and not model.has_cls:
            reasons.append(f"score='cls' needs an encoder with a [CLS] token, which {model.family} has not; use 'received' or 'auto'")
        return reasons

    def bind(self, model: ModelInfo) -> Self:
        bound = copy.copy(self)
        object.__setattr__(bound, "_has_cls", model.has_cls)
        return bound

    @property
    def _what(self) -> Literal["cls_row", "mean_received"]:
        # unbound, "auto" asks for what every encoder can give
        return _OBSERVED[("cls" if self._has_cls else "received") if self.score == "auto" else self.score]

    def observe(self) -> Sequence[Observation]:
        if self.keeps_all:
            return ()
        max_queries = self.max_queries if self._what == "mean_received" else None
        return (Observation(self._what, layer=self.scoring_layer, head_reduce=self.head_reduce, max_queries=max_queries),)

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """The best tokens of each unit and their newlines; None where no sequence has an image."""
        if not ctx.units:
            return None
        tokens = unit_tokens(ctx)
        scores, broken = usable(self, observed_scores(self, ctx, self._what, tokens))
        counts = allotments(tokens, [mean_one(s) for s in scores], ctx.units, self.budget_scope, self.keep, self.min_tokens)
        found = []
        for u, (unit, n) in enumerate(zip(ctx.units, counts, strict=True)):
            if u in broken:
                found.append(stride(unit.n_tokens, n, scores[u]))
            elif self.important_ratio >= 1:
                found.append(largest(scores[u], n))
            else:
                found.append(_important_and_diverse(scores[u], ctx.features[unit.sequence, tokens[u]], n, self.important_ratio))
        return self.chosen(ctx, found, tokens)

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        return {"important_ratio": Uniform(0.0, 1.0), "head_reduce": Choice(("mean", "max"))}


def _important_and_diverse(scores: Tensor, features: Tensor, n: int, important_ratio: float) -> Tensor:
    """(n,) int64 ascending (§2.9): the best ⌊n · ratio⌋ by score, and the others' most diverse. scores: (N,); features: (N, D)."""
    if not features.shape[-1]:
        raise UnsupportedError("fastervlm with important_ratio below 1 compares features, which this host does not hand over")
    order = scores.argsort(descending=True, stable=True)
    n_important = math.floor(n * important_ratio + 1e-9)
    return torch.cat([order[:n_important], diverse(features, order[n_important:], n - n_important)]).sort().values


def diverse(features: Tensor, rest: Tensor, n: int) -> Tensor:
    """(n,) int64: what is left of `rest` (most important first) after dropping, round by round, what another token resembles most.

    features: (N, D). A round compares every second token with those between them by cosine, and drops a few of the former. Holds the
    similarities of all pairs, (len(rest), len(rest)) fp32.
    """
    if n == 0:
        return rest[:0]
    rows = torch.nn.functional.normalize(features[rest].float(), dim=-1)
    similar = rows @ rows.T
    left = torch.arange(len(rest), device=rest.device)
    is_large = len(features) > _LARGE_UNIT
    while len(left) > n:
        # one `even` more than `odd` where an odd number is left
        even, odd = left[::2], left[1::2]
        surplus = len(left) - n
        step = max(8, -(-surplus // 16)) if is_large else 8
        nearest = similar[even[:, None], odd].max(-1).values
        dropped = nearest.argsort(descending=True, stable=True)[: min(step, surplus)]
        stays = torch.ones_like(even, dtype=torch.bool)
        stays[dropped] = False
        left = torch.cat([even[stays], odd])
    return rest[left]
