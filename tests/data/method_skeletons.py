"""Six methods on the three protocols, with dummy mathematics and their real flow of data.

They show that `accel.protocols` carries what each of the planned methods must see and return (visual-token-pruning.md §2–4,
kv-compression.md §2 and §10); `test_skeletons.py` type-checks and runs them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import BlockPlan, ImplicitPlan, KeyView, VerticalSlashPlan
from accel.protocols import (
    AttentionContext,
    AttentionStep,
    CacheNeeds,
    CompressionContext,
    HeadGroup,
    Keep,
    KVCompression,
    Merge,
    ModelInfo,
    Observation,
    PruningContext,
    Retain,
    RunDense,
    SparseAttention,
    Stage,
    TokenPruning,
    Unit,
    When,
)


def budget(n: int, keep: float) -> int:
    """Tokens kept of n (visual-token-pruning.md §1.3)."""
    return min(n, max(1, int(n * keep + 0.5 + 1e-9)))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Index rows of different lengths as (B, n) int64 and which entries count, (B, n) bool."""
    width = max(len(row) for row in rows)
    index = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    return index, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def largest(scores: Tensor, n: int) -> Tensor:
    """Ascending places of the n largest along the last dimension, ties to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :n].sort(dim=-1).values


# --- token pruning ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FasterVLM(TokenPruning):
    """Ranks the patches of each unit by the attention of the CLS query, behind the projector."""

    keep: float = 0.25
    score: Literal["cls_row", "mean_received"] = "cls_row"
    newline: Literal["all", "nonempty", "none"] = "nonempty"
    scoring_layer: int | None = None

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [Stage("projector")]

    def observe(self) -> Sequence[Observation]:
        return (Observation(self.score, layer=self.scoring_layer, max_queries=2048),)

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        # how many rows keep a patch is known only when the patches are
        if self.newline == "nonempty" and any(unit.n_structural for unit in units):
            return None
        return [budget(unit.n_tokens, self.keep) + (unit.n_structural if self.newline == "all" else 0) for unit in units]

    def select(self, ctx: PruningContext) -> Keep | None:
        observed = ctx.observed[self.score]
        kept = torch.zeros_like(ctx.is_visual)
        for u, unit in enumerate(ctx.units):
            tokens = (ctx.is_visual[unit.sequence] & (ctx.unit[unit.sequence] == u)).nonzero().flatten()
            kept[unit.sequence, tokens[largest(observed[u, : len(tokens)], budget(unit.n_tokens, self.keep))]] = True
        return Keep(*padded([row.nonzero().flatten() for row in kept | self._newlines(ctx, kept)]))

    def _newlines(self, ctx: PruningContext, kept: Tensor) -> Tensor:
        """(B, tokens) bool: a newline stays with the patches of its row of its map."""
        if self.newline != "nonempty":
            return ctx.is_structural if self.newline == "all" else torch.zeros_like(kept)
        same_row = (ctx.place[:, :, None, :2] == ctx.place[:, None, :, :2]).all(-1) & (ctx.unit[:, :, None] == ctx.unit[:, None])
        return ctx.is_structural & (same_row & kept[:, None]).any(-1)


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(TokenPruning):
    """Three stages on one importance map; what the first drops is merged into one token per cell."""

    shares: tuple[float, float, float] = (0.5, 0.8, 0.5)
    hub_factor: float = 30.0
    cell: float = 2.0
    alpha: float = 0.0
    _n_layers: int = field(default=0, init=False, repr=False, compare=False)

    def bind(self, model: ModelInfo) -> Self:
        bound = copy.copy(self)
        object.__setattr__(bound, "_n_layers", model.n_layers)
        return bound

    def stages(self, model: ModelInfo) -> list[Stage]:
        third = model.n_layers // 3
        return [Stage("projector"), *(Stage("layer", n * third, is_known_ahead=True) for n in (1, 2))]

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        left = [unit.n_tokens for unit in units]
        for share in self.shares[: self._number(stage) + 1]:
            left = [budget(n, share) for n in left]
        return [n + unit.n_structural for n, unit in zip(left, units, strict=True)]

    def _number(self, stage: Stage) -> int:
        """0, 1 or 2. Layer 0 may be a boundary of a shallow model, hence the comparison with None."""
        return 0 if stage.layer is None else 1 + (stage.layer == 2 * (self._n_layers // 3))

    def observe(self) -> Sequence[Observation]:
        pixels = (Observation("pixel_map"),) if self.alpha else ()
        return (Observation("mean_received"), Observation("mean_selected_rows"), *pixels)

    def select_rows(self, mean_received: Tensor) -> Tensor:
        hubs = mean_received > self.hub_factor * mean_received.mean(-1, keepdim=True)
        best = torch.nn.functional.one_hot(mean_received.argmax(-1), mean_received.shape[-1]).bool()
        return torch.where(hubs.any(-1, keepdim=True), hubs, best)

    def map_pixels(self, pixels: Tensor) -> Tensor:
        return pixels.float().var(-1).softmax(-1)

    def select(self, ctx: PruningContext) -> Keep | None:
        number = self._number(ctx.stage)
        importance = self._importance(ctx) if number == 0 else ctx.scores
        assert importance is not None  # the first stage gave it, and hosts hand it on
        kept = ctx.is_structural.clone()
        merges: list[list[Tensor]] = [[] for _ in kept]
        for u, unit in enumerate(ctx.units):
            b = unit.sequence
            tokens = (ctx.is_visual[b] & (ctx.unit[b] == u)).nonzero().flatten()
            ranked = tokens[importance[b, tokens].argsort(descending=True, stable=True)]
            n = budget(len(tokens), self.shares[number])
            direct, merge = self._recycled(ranked, n, ctx.place[b], importance[b]) if number == 0 else (ranked[:n], None)
            kept[b, direct] = True
            if merge is not None:
                kept[b, merge[0].long()] = True
                merges[b].append(merge)
        index, ok = padded([row.nonzero().flatten() for row in kept])
        return Keep(index, ok, merge=self._merge(merges), scores=importance.gather(1, index))

    def _importance(self, ctx: PruningContext) -> Tensor:
        """(B, tokens) fp32 of patch tokens."""
        observed = ctx.observed["mean_selected_rows"]
        if self.alpha:
            observed = observed + self.alpha * ctx.observed["pixel_map"]
        importance = torch.zeros(ctx.is_visual.shape)
        for u, unit in enumerate(ctx.units):
            own = ctx.is_visual[unit.sequence] & (ctx.unit[unit.sequence] == u)
            importance[unit.sequence, own] = observed[u, : int(own.sum())]
        return importance

    def _recycled(self, ranked: Tensor, n: int, place: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens kept as they are, and (3, m) anchor, source, weight of the rest: n tokens together, by the exact-budget rule (§4.5)."""
        for n_direct in reversed(range(n)):
            dropped = ranked[n_direct:]
            grid = torch.cat([place[dropped, :1], (place[dropped, 1:] / self.cell).long()], 1)
            cells, cell = torch.unique(grid, dim=0, return_inverse=True)
            if n_direct + len(cells) == n:
                weight = importance[dropped].clamp_min(1e-12)
                # ranked: the first of a cell is its most important token
                anchor = torch.stack([dropped[cell == c][0] for c in range(len(cells))])[cell]
                total = torch.zeros(len(cells)).index_add(0, cell, weight)
                return ranked[:n_direct], torch.stack([anchor.float(), dropped.float(), weight / total[cell]])
        return ranked[:n], None

    def _merge(self, merges: list[list[Tensor]]) -> Merge | None:
        rows = [torch.cat(found, 1) if found else torch.zeros(3, 0) for found in merges]
        width = max(row.shape[1] for row in rows)
        if not width:
            return None
        anchor, source, weight = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows], 1)
        return Merge(anchor.long(), source.long(), weight)


@dataclass(frozen=True, kw_only=True)
class DyVTE(TokenPruning):
    """At the first layer whose router says so, all visual tokens leave; rows that exit early are hidden until the last one does."""

    routers: str = ""
    threshold: float = 0.5
    _weights: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bind(self, model: ModelInfo) -> Self:
        if model.hidden_size is None:
            raise UnsupportedError("dyvte cannot check its routers", ["the host does not know the model's hidden size"])
        width = model.hidden_size
        # every second layer from a quarter of the depth on; weights stand for those of the file
        layers = range(model.n_layers // 4, model.n_layers - 1, 2)
        bound = copy.copy(self)
        object.__setattr__(bound, "_weights", {i: (torch.ones(8, 2 * width), torch.ones(2, 8)) for i in layers})
        return bound

    def stages(self, model: ModelInfo) -> list[Stage]:
        # a router reads the output of its layer, which is the input of the next
        return [Stage("layer", layer + 1, needs_learned_choice=True) for layer in self._weights]

    def select(self, ctx: PruningContext) -> Keep | None:
        assert ctx.stage.layer is not None
        w1, w2 = self._weights[ctx.stage.layer - 1]
        logits = torch.nn.functional.gelu(self._summary(ctx) @ w1.T) @ w2.T
        has_image = ctx.is_visual.any(1)
        fired = ctx.state.get("fired", torch.zeros_like(has_image)) | (logits.softmax(-1)[:, 1] > self.threshold) & has_image
        ctx.state["fired"] = fired
        image = ctx.is_visual | ctx.is_structural
        if not fired.any():
            return None
        if (fired | ~has_image).all():
            return Keep(torch.zeros(len(fired), 0, dtype=torch.int64), torch.zeros(len(fired), 0, dtype=torch.bool))
        everything = padded([row.nonzero().flatten() for row in image])
        return Keep(*everything, hidden=image & fired[:, None])

    def _summary(self, ctx: PruningContext) -> Tensor:
        """(B, 2D): mean and last of the text behind the last visual token, or of all text where that is too short."""
        found = []
        for hidden, text, visual in zip(ctx.features.float(), ctx.is_text, ctx.is_visual, strict=True):
            behind = text & (torch.arange(len(text)) > visual.nonzero().max()) if visual.any() else text
            rows = hidden[behind if behind.sum() >= 2 else text]
            found.append(torch.cat([rows[:-1].mean(0) if len(rows) > 1 else rows[-1], rows[-1]]))
        return torch.stack(found)


# --- KV compression -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HACK(KVCompression):
    """Contextual heads keep few entries, structural heads the newest scale and more; compressed before attention at every scale."""

    keep: float = 0.3
    n_observed: int = 32
    renorm_keys: bool = False
    _is_contextual: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool), init=False, repr=False, compare=False)

    @property
    def when(self) -> tuple[When, ...]:
        return (When("before_attention"),)

    def bind(self, model: ModelInfo) -> Self:
        if model.scale_shapes is None:
            raise UnsupportedError("hack needs a next-scale model", [f"{model.family} has no list of scales"])
        bound = copy.copy(self)
        # the profile's file holds one type per head; every other head stands for it
        types = torch.arange(model.n_layers * model.n_kv_heads).view(model.n_layers, model.n_kv_heads) % 2 == 0
        object.__setattr__(bound, "_is_contextual", types)
        return bound

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        assert model.scale_shapes is not None
        whole = sum(height * width for height, width in model.scale_shapes)
        types = self._is_contextual[layer]
        found = []
        for is_contextual, label, share in ((True, "contextual", 1 / 3), (False, "structural", 5 / 3)):
            heads = tuple((types == is_contextual).nonzero().flatten().tolist())
            if heads:
                found.append(HeadGroup(heads, int(whole * self.keep * share), label))
        return found

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        assert ctx.scale_shapes is not None
        scores = self._scores(ctx)
        if group.label == "structural":
            height, width = ctx.scale_shapes[ctx.step]
            scores = scores.masked_fill(torch.arange(scores.shape[-1]) >= scores.shape[-1] - height * width, torch.inf)
        kept = largest(scores, group.budget)
        is_last = ctx.step == len(ctx.scale_shapes) - 1
        merge = self._merge(ctx, kept) if is_last and group.label == "contextual" else None
        return Retain(kept, merge=merge, renorm_keys=self.renorm_keys and merge is not None)

    def _scores(self, ctx: CompressionContext) -> Tensor:
        """(B, H, N): what a few evenly spread queries of this scale attend to."""
        batch, n_heads = ctx.k.shape[:2]
        rows = torch.linspace(0, ctx.q.shape[2] - 1, min(self.n_observed, ctx.q.shape[2])).round().long()
        q = ctx.q[:, :, rows].float().view(batch, n_heads, -1, len(rows), ctx.q.shape[3])
        probs = (q @ ctx.k.float().mT[:, :, None] * ctx.scale).softmax(-1).sum((2, 3))
        if ctx.has_guidance_pairs:
            probs = probs.view(2, batch // 2, *probs.shape[1:]).mean(0).repeat(2, 1, 1)
        return probs

    def _merge(self, ctx: CompressionContext, kept: Tensor) -> Merge:
        """Every dropped entry into the kept one with the most similar key; a kept entry is one of its own sources."""
        keys = torch.nn.functional.normalize(ctx.k.float(), dim=-1)
        own = kept[..., None].expand(*kept.shape, keys.shape[-1])
        similar = keys @ keys.gather(2, own).mT
        weight, nearest = similar.max(-1)
        entry = torch.arange(keys.shape[2]).expand(*keys.shape[:3])
        count = torch.zeros_like(weight).scatter_add(2, kept.gather(2, nearest), torch.ones_like(weight))
        anchor = kept.gather(2, nearest)
        return Merge(anchor, entry, torch.where(anchor == entry, 1.0, weight) / count.gather(2, anchor).clamp_min(1))

    def release(self, model: ModelInfo, layer: int, *, step: int) -> bool:
        return model.scale_shapes is not None and step == len(model.scale_shapes) - 1


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(KVCompression):
    """H2O and SnapKV in one: sinks, a recent window and the entries with the most attention, after prefill and while decoding."""

    keep: int = 64
    every: int = 16
    window: int = 8
    score: Literal["mass", "last_queries"] = "last_queries"

    def __post_init__(self) -> None:
        if self.window >= self.keep:
            raise OptionError(f"heavyhitters: window must be smaller than keep, got {self.window} and {self.keep}")

    @property
    def when(self) -> tuple[When, ...]:
        return (When("after_prefill"), When("every_n_steps", self.every))

    def needs(self) -> CacheNeeds:
        return CacheNeeds(attention_mass=True) if self.score == "mass" else CacheNeeds(n_queries=32)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        # deeper layers get less, as in pyramid budgets
        share = 1.5 - layer / max(model.n_layers - 1, 1)
        return [HeadGroup(tuple(range(model.n_kv_heads)), max(self.window + 1, int(self.keep * share)))]

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        mass = ctx.attention_mass if self.score == "mass" else self._mass_of_last_queries(ctx)
        assert mass is not None  # asked for in `needs`
        newest = ctx.q_position[:, -1, None, None]
        must_stay = (ctx.position < 4) | (ctx.position > newest - self.window)
        if ctx.protected is not None:
            is_prompt = ctx.position < ctx.protected.shape[1]
            named = ctx.protected.gather(1, ctx.position.flatten(1).clamp_max(ctx.protected.shape[1] - 1)).view_as(ctx.position)
            must_stay = must_stay | (named & is_prompt)
        scores = mass.masked_fill(must_stay, torch.inf).masked_fill(~ctx.valid, -torch.inf)
        kept = largest(scores, group.budget)
        return Retain(kept, ok=ctx.valid.gather(2, kept))

    def _mass_of_last_queries(self, ctx: CompressionContext) -> Tensor:
        """(B, H, N), causal among the observed queries."""
        q = ctx.q.float().view(len(ctx.k), ctx.k.shape[1], -1, *ctx.q.shape[2:])
        scores = q @ ctx.k.float().mT[:, :, None] * ctx.scale
        if ctx.softcap is not None:
            scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
        future = ctx.position[:, :, None, None] > ctx.q_position[:, None, None, :, None]
        probs = scores.masked_fill(future | ~ctx.valid[:, :, None, None], -torch.inf).softmax(-1)
        return probs.sum((2, 3))


# --- sparse attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlexLike(SparseAttention):
    """Key blocks by their pooled score with the last queries, per head; a fixed pattern in the layers named as static."""

    block_size: int = 16
    n_blocks: int = 2
    static_layers: tuple[int, ...] = ()

    @property
    def min_useful_len(self) -> int:
        return 2 * self.block_size + 1

    def static_pattern(self, step: AttentionStep) -> BlockPlan | None:
        return ImplicitPlan(self.block_size, self.n_blocks) if step.layer in self.static_layers else None

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan | RunDense:
        nk = -(-ctx.lens.max_kv // self.block_size)
        group = q.shape[1] // keys.n_kv_heads
        vertical = torch.zeros(ctx.lens.batch, q.shape[1], nk, dtype=torch.bool)
        slash = torch.zeros_like(vertical)
        slash[..., 0] = True
        for rows in ctx.lens.rows():
            means = keys.block_mean(rows.index, self.block_size).repeat_interleave(group, 0)
            probe = q[rows.q_start : rows.q_start + rows.q_len][-self.block_size :].float().mean(0)
            scores = torch.einsum("hd,hjd->hj", probe, means) * ctx.scale
            if not scores.isfinite().all():
                return RunDense("NaN in the probe")
            vertical[rows.index].scatter_(1, largest(scores, min(self.n_blocks, scores.shape[1])), True)
        if ctx.state is not None:
            ctx.state["density of the last call"] = float(vertical.float().mean())
        return VerticalSlashPlan(self.block_size, vertical, slash)
