"""VFlowOpt: one importance map prunes visual tokens in three stages, and recycles what the first drops (ICCV 2025, arXiv 2508.05211)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches._options import is_number, require, require_flag, require_number, require_share, require_whole
from accel.patches._tokens import (
    Recycled,
    answer,
    budget,
    group_budget,
    groups,
    joined_units,
    observed_scores,
    position_reasons,
    ranking,
    unit_tokens,
    usable,
)
from accel.protocols import Choice, Keep, Method, ModelInfo, Observation, PruningContext, Stage, TokenPruning, Uniform, Unit

# Tuned by the authors for LLaVA-OneVision-Qwen2-7B (§4.8): average retention → options. The entropy term is off in all of them.
_RELEASED: dict[float, dict[str, float]] = {
    0.5: {"r1": 0.7233201448753168, "r2": 0.748747637472693, "r3": 0.487, "hub_factor": 28.683047941520474, "cell": 11.756787150848968},
    0.25: {
        "r1": 0.2651026358526424, "r2": 0.9833433139039235, "r3": 0.8773258179532721, "hub_factor": 34.759552803070484, "cell": 15.580797034937687,
    },
    0.1: {"r1": 0.11661529508161146, "r2": 1.0, "r3": 0.6011, "hub_factor": 39.26492840997221, "cell": 17.386981849158786},
}  # fmt: skip

# Merging fewer than this into cells would leave a mean of half the picture: plain pruning instead, where cells do not fit (§4.5).
_FEWEST_FOR_CELLS = 4


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(TokenPruning):
    """Ranks visual tokens by the attention of the encoder's hub patches; drops some in front of the language model and some at a third of it each.

    keep: average share of the visual tokens over the decoder layers.
    r1, r2, r3: shares kept at each stage, of what the stage before left. r1: None is `r1_factor` · keep, at most 1. r3: None is what meets
        keep; given, keep has no say. All at their defaults: everything goes at the first stage, uncalibrated.
    hub_factor: patches that receive more than this many times the average attention are hubs; where none does, the one that receives most.
    cell: side in tokens of the squares in which dropped tokens are merged into one. None: sqrt(N / 8) for a grid of N tokens.
    alpha: weight of the entropy of a patch's grey levels beside the attention of the hubs; 0 leaves pixels alone.
    recycle: merge what the first stage drops into one token per cell, within the budget. recycle_multi: also in prompts with several pictures
        or a video, where cells stay within an image or frame.
    min_tokens: of every tile or frame. scoring_layer: encoder layer; None for the one whose output is the feature.
    max_queries: rows that means are taken over, evenly spread; None for all.
    pixel_mean, pixel_std: of the processor's normalisation, for the entropy; None for the family's own.

    All tiles of an image compete for one budget, and all frames of a video. Structural tokens stay.
    """

    keep: float = 0.25
    r1: float | None = None
    r1_factor: float = 1.0
    r2: float = 1.0
    r3: float | None = None
    hub_factor: float = 30.0
    cell: float | None = None
    alpha: float = 0.0
    recycle: bool = True
    recycle_multi: bool = False
    min_tokens: int = 1
    scoring_layer: int | None = None
    max_queries: int | None = None
    pixel_mean: float | tuple[float, ...] | None = None
    pixel_std: float | tuple[float, ...] | None = None
    _n_layers: int | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def released(cls, keep: float = 0.25, **overrides: Any) -> Self:
        """The authors' strategy for LLaVA-OneVision-Qwen2-7B at an average retention of 0.5, 0.25 or 0.1."""
        if keep not in _RELEASED:
            raise OptionError(f"vflowopt: strategies are released for {', '.join(map(str, _RELEASED))}, got {keep!r}")
        return cls(**{"keep": keep, **_RELEASED[keep], **overrides})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("keep", "r2", *(name for name in ("r1", "r3") if getattr(self, name) is not None)):
            require_share(self, option)
        require_number(self, "r1_factor", 0, 100, above=True)
        require(self, self.r1 is None or self.r1_factor == 1, f"r1 ({self.r1!r}) and r1_factor ({self.r1_factor!r}) say the same thing; give one")
        require_number(self, "hub_factor", 0, math.inf)
        if self.cell is not None:
            require_number(self, "cell", 0, math.inf, above=True)
        require_number(self, "alpha", -1, 1)
        require_flag(self, "recycle")
        require_flag(self, "recycle_multi")
        require_whole(self, "min_tokens", 0)
        require_whole(self, "scoring_layer", 0, or_none=True)
        require_whole(self, "max_queries", 1, or_none=True)
        for option in ("pixel_mean", "pixel_std"):
            self._check_pixels(option)

    def _check_pixels(self, option: str) -> None:
        value = getattr(self, option)
        numbers = value if isinstance(value, list | tuple) else [value]
        fits = value is None or (len(numbers) > 0 and all(is_number(x) and (option == "pixel_mean" or x > 0) for x in numbers))
        kind = "a number" if option == "pixel_mean" else "a positive number"
        require(self, fits, f"{option} must be None, {kind}, or one per colour, got {value!r}")
        if isinstance(value, list):
            # a recipe's list; tuples keep the method hashable
            object.__setattr__(self, option, tuple(value))

    # --- strategy -------------------------------------------------------------------------------------------------------------

    @property
    def is_calibrated(self) -> bool:
        """Whether any share of a stage was given."""
        return self.r1 is not None or self.r3 is not None or self.r1_factor != 1 or self.r2 != 1

    @property
    def keeps_all(self) -> bool:
        """Whether the options keep everything, whatever the model."""
        return self._first_share == 1 and self.r2 == 1 and (self.keep if self.r3 is None else self.r3) == 1

    @property
    def _first_share(self) -> float:
        return min(1.0, self.r1_factor * self.keep) if self.r1 is None else self.r1

    def shares(self, n_layers: int) -> tuple[float, float, float]:
        """The shares kept at the three stages of a model of `n_layers`. OptionError where the first two leave nothing for the third (§4.7)."""
        r1 = self._first_share
        if self.r3 is not None:
            return r1, self.r2, self.r3
        third = n_layers // 3
        left = n_layers * self.keep - third * r1 * (1 + self.r2)
        r3 = left / (n_layers - 2 * third) / (r1 * self.r2)
        if r3 <= 0:
            raise OptionError(
                f"vflowopt: r1={r1:g} and r2={self.r2:g} keep more over {2 * third} of {n_layers} layers than keep={self.keep:g} "
                "allows over all; lower them, or give r3"
            )
        # where nothing is left to drop, rounding must not make a stage of it
        return r1, self.r2, r3 if r3 < 1 - 1e-9 else 1.0

    def average_share(self, n_layers: int) -> float:
        """The share of the visual tokens that a decoder layer of a model of `n_layers` sees on average."""
        third = n_layers // 3
        r1, r2, r3 = self.shares(n_layers)
        return r1 * (third * (1 + r2) + (n_layers - 2 * third) * r2 * r3) / n_layers

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: too few layers for the later stages."""
        reasons = position_reasons(self, model)
        if self.is_calibrated and model.n_layers < 3:
            reasons.append(f"three stages need at least 3 layers, {model.family} has {model.n_layers}")
        return reasons

    def notice(self, model: ModelInfo) -> str | None:
        """A line where no strategy was given, or one that was tuned for another model."""
        if not self.is_calibrated and not self.keeps_all:
            return "uncalibrated, so all tokens go at the first stage; tune r1_factor, r2, hub_factor and cell for this model"
        is_released = any({**self.options(), **strategy} == self.options() for strategy in _RELEASED.values())
        if is_released and not model.family.startswith("llava_onevision"):
            return f"this strategy was tuned for LLaVA-OneVision-Qwen2-7B, not for {model.family}"
        return None

    def bind(self, model: ModelInfo) -> Self:
        self.shares(model.n_layers)
        bound = copy.copy(self)
        object.__setattr__(bound, "_n_layers", model.n_layers)
        return bound

    def stages(self, model: ModelInfo) -> list[Stage]:
        """Behind the projector and before the second and third third of the layers, without those layers at which all stay."""
        shares = self.shares(model.n_layers)
        if min(shares) == 1:
            return []
        third = model.n_layers // 3
        later = [Stage("layer", n * third, is_known_ahead=True) for n in (1, 2) if shares[n] < 1]
        return [Stage("projector", is_known_ahead=True), *later]

    def _bound_layers(self) -> int:
        if self._n_layers is None:
            raise UnsupportedError("vflowopt must be bound to a model before it is asked")
        return self._n_layers

    def _number(self, stage: Stage) -> int:
        """0, 1 or 2."""
        return 0 if stage.layer is None else 1 + (stage.layer == 2 * (self._bound_layers() // 3))

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens left of each unit; None where tiles or frames compete."""
        if any(len(group) > 1 for group in groups(units, "image")):
            return None
        left = [unit.n_tokens for unit in units]
        for share in self.shares(self._bound_layers())[: self._number(stage) + 1]:
            left = [budget(n, float(share), self.min_tokens) for n in left]
        return [n + unit.n_structural for n, unit in zip(left, units, strict=True)]

    def picture_count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens left of each picture, whichever of its tiles or frames they are of."""
        found = []
        for group in groups(units, "image"):
            lens = [units[u].n_tokens for u in group]
            left = sum(lens)
            for share in self.shares(self._bound_layers())[: self._number(stage) + 1]:
                # a unit that has lost tokens still holds its least
                left = max(budget(left, float(share), self.min_tokens), sum(min(n, self.min_tokens) for n in lens))
            found.append(left + sum(units[u].n_structural for u in group))
        return found

    # --- importance -----------------------------------------------------------------------------------------------------------

    def observe(self) -> Sequence[Observation]:
        if self.keeps_all:
            return ()
        rows = Observation("mean_selected_rows", layer=self.scoring_layer, max_queries=self.max_queries)
        pixels = Observation("pixel_map", pixel_mean=self.pixel_mean, pixel_std=self.pixel_std)
        return (rows, pixels) if self.alpha else (rows,)

    def select_rows(self, mean_received: Tensor) -> Tensor:
        """The hubs: (segments, P) fp32 -> (segments, P) bool."""
        hubs = mean_received > self.hub_factor * mean_received.mean(-1, keepdim=True)
        best = torch.zeros_like(hubs).scatter_(-1, mean_received.argmax(-1, keepdim=True), True)
        return torch.where(hubs.any(-1, keepdim=True), hubs, best)

    def map_pixels(self, pixels: Tensor) -> Tensor:
        """Softmax over the patches of a segment of their grey levels' entropy: (P, pixels of a patch) uint8 -> (P,) fp32."""
        return grey_entropy(pixels).softmax(-1)

    def _importance(self, ctx: PruningContext, tokens: Sequence[Tensor]) -> Tensor:
        """(B, tokens) fp32, 0 for all but patch tokens."""
        scores = observed_scores(self, ctx, "mean_selected_rows", tokens)
        if self.alpha:
            scores = [s + self.alpha * pixels for s, pixels in zip(scores, observed_scores(self, ctx, "pixel_map", tokens), strict=True)]
        scores, broken = usable(self, scores)
        found = torch.zeros(ctx.is_visual.shape, dtype=torch.float32, device=ctx.is_visual.device)
        for u, (unit, own) in enumerate(zip(ctx.units, tokens, strict=True)):
            # evenly spread scores have mean 1, attention sums to 1
            found[unit.sequence, own] = scores[u] / len(own) if u in broken else scores[u]
        return found

    # --- selection ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """The tokens that stay at one of the three stages, with the map for the next; None where no sequence has an image."""
        if not ctx.units:
            return None
        number = self._number(ctx.stage)
        tokens = unit_tokens(ctx)
        importance = self._importance(ctx, tokens) if number == 0 else ctx.scores
        assert importance is not None  # the first stage gave it, and hosts hand it on
        share = float(self.shares(self._bound_layers())[number])
        kept = ctx.is_structural.clone()
        merges: list[list[Recycled]] = [[] for _ in kept]
        for group in groups(ctx.units, "image"):
            b = ctx.units[group[0]].sequence
            place, own, scores = joined_units(group, tokens, [importance[b, t] for t in tokens])
            order = ranking(scores, own, self.min_tokens)
            n_kept = group_budget([len(tokens[u]) for u in group], share, self.min_tokens)
            found = None
            if number == 0 and self._recycles(ctx.units, b):
                found = self._recycled(order, ctx.place[b, place], scores, n_kept)
            if found is None:
                kept[b, place[order[:n_kept]]] = True
            else:
                anchor, source, weight = found
                is_direct = torch.ones_like(own, dtype=torch.bool)
                is_direct[source] = False
                kept[b, place[is_direct]] = True
                kept[b, place[anchor]] = True
                merges[b].append((place[anchor], place[source], weight))
        return answer(kept, merges=merges, scores=importance)

    def _recycles(self, units: Sequence[Unit], sequence: int) -> bool:
        """Whether the sequence's dropped tokens are merged: it holds one image, or several pictures and the option says so."""
        pictures = {(unit.modality, unit.picture) for unit in units if unit.sequence == sequence}
        return self.recycle and (self.recycle_multi or (len(pictures) == 1 and next(iter(pictures))[0] == "image"))

    def _recycled(self, order: Tensor, place: Tensor, importance: Tensor, n_kept: int) -> Recycled | None:
        """`recycled` with the smallest cells that fit, from the asked side on in steps of a quarter; None where none do."""
        if not len(order):
            return None
        maps, own = torch.unique(place[:, 0], return_inverse=True)
        # fp64: the same cells on every device
        if self.cell is None:
            side = torch.bincount(own).double().div(8).sqrt()
        else:
            side = torch.full(maps.shape, float(self.cell), dtype=torch.float64, device=place.device)
        while True:
            cells = cells_of(place, side[own])
            found = recycled(order, cells, importance, n_kept)
            if found is not None:
                return found
            if n_kept < _FEWEST_FOR_CELLS or int(cells.max()) + 1 == len(maps):
                return None
            side = side * 1.25

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        """The paper's ranges (§4.7); r1_factor is r1 over keep. The side of a cell is bounded for grids of up to 24 × 24.

        The paper's box holds points at which even r3 = 1 falls short of `keep`. They are cut off: every point spends the same budget.
        hub_factor is a ratio, so its range is logarithmic: in most models a few times the average already leaves a single hub, and 0.1 takes
        nearly all patches.
        """
        return {
            "r1_factor": Uniform(1.0, 1.5),
            "r2": Uniform(0.533, 1.0, floor=_lowest_r2),
            "hub_factor": Uniform(0.1, 50.0, is_log=True),
            "cell": Uniform(2.0, 24.0),
            "alpha": Uniform(-1.0, 1.0),
        }


def _lowest_r2(options: Mapping[str, Any]) -> float:
    """The lowest r2 from which r3 ≤ 1 can meet `keep`, whatever the number of layers."""
    if options["r3"] is not None:
        return 0.0
    first = min(1.0, options["r1_factor"] * options["keep"]) if options["r1"] is None else options["r1"]
    # the least part of the layers in front of the second stage: one of five
    front = 0.2
    return float((options["keep"] / first - front) / (1 - front))


def grey_entropy(pixels: Tensor) -> Tensor:
    """Entropy in bits of each patch's grey levels: (P, pixels of a patch) uint8 -> (P,) fp32."""
    levels = torch.zeros(len(pixels), 256, dtype=torch.float32, device=pixels.device)
    levels.scatter_add_(1, pixels.long(), torch.ones(pixels.shape, dtype=torch.float32, device=pixels.device))
    bits: Tensor = torch.special.entr(levels / pixels.shape[1]).sum(-1) / math.log(2)
    return bits


def cells_of(place: Tensor, side: Tensor) -> Tensor:
    """The square of its map that each token lies in, (N,) int64 numbered from 0. place: (N, 3) map, row, column; side: (N,) fp64, tokens."""
    grid = torch.cat([place[:, :1], (place[:, 1:] / side[:, None]).floor().long()], 1)
    cell: Tensor = torch.unique(grid, dim=0, return_inverse=True)[1]
    return cell


def recycled(order: Tensor, cell: Tensor, importance: Tensor, n_kept: int) -> Recycled | None:
    """Anchor, source and weight, (m,) each, of the tokens that are merged, so that exactly `n_kept` rows are left (§4.5).

    order: (N,) int64, tokens from the most important on; cell: (N,) int64; importance: (N,) fp32. Tokens that are no source stay as they are.
    The m least important are merged, those of a cell into the best of them. None where the cells alone are more than `n_kept`.
    """
    n = len(order)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n, device=order.device)
    n_cells = int(cell.max()) + 1
    worst = torch.zeros(n_cells, dtype=torch.int64, device=order.device).scatter_reduce(0, cell, rank, "amax")
    # if the first k stay as they are, the cells with a token behind them give one row each; k = 0 … N
    total = torch.bincount(worst, minlength=n + 1).flip(0).cumsum(0).flip(0) + torch.arange(n + 1, device=order.device)
    n_direct = int((total <= n_kept).sum()) - 1
    if n_direct < 0:
        return None
    source = order[n_direct:]
    own = cell[source]
    best = torch.full((n_cells,), n, dtype=torch.int64, device=order.device).scatter_reduce(0, own, rank[source], "amin")
    # negative importance (alpha < 0) must not turn a mean around
    weight = importance[source].float().clamp_min(1e-12)
    whole = torch.zeros(n_cells, dtype=torch.float32, device=order.device).index_add(0, own, weight)
    return order[best[own]], source, weight / whole[own]
