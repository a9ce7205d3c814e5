"""What token-pruning methods share: budgets, stable selection, and which newlines stay."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches._options import require_choice, require_keep, require_whole
from accel.protocols import Keep, Merge, Method, ModelInfo, PruningContext, Stage, TokenPruning, Unit

Newline = Literal["nonempty", "all", "none"]
Scope = Literal["unit", "image", "sample"]
Recycled = tuple[Tensor, Tensor, Tensor]    # anchor, source, weight, (m,) each

_log = logging.getLogger(__name__)


def position_reasons(method: TokenPruning, model: ModelInfo) -> list[str]:
    """Why the survivors' positions cannot be made as `position_mode` says; empty when they can."""
    if method.position_mode == "compact" and model.has_multimodal_rope:
        return [f"position_mode='compact' would break the grid positions of {model.family}; use 'keep'"]
    return []


# --- budgets ------------------------------------------------------------------------------------------------------------------


def budget(n: int, keep: float, min_tokens: int = 1) -> int:
    """Tokens kept of n (visual-token-pruning.md §1.3). keep: a share as a float, or a count as an int; at least `min_tokens`, at most n."""
    # 1e-9: 25 · (1 − 0.9) is 2.4999…
    wanted = keep if isinstance(keep, int) else math.floor(n * keep + 0.5 + 1e-9)
    return min(n, max(min_tokens, wanted))


def groups(units: Sequence[Unit], scope: Scope) -> list[list[int]]:
    """The units that share a budget: each alone, those of one image or video, or those of one sequence."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for u, unit in enumerate(units):
        key = {"unit": (u,), "image": (unit.sequence, unit.modality, unit.picture), "sample": (unit.sequence,)}[scope]
        found.setdefault(key, []).append(u)
    return list(found.values())


def group_budget(lens: Sequence[int], keep: float, min_tokens: int) -> int:
    """Tokens kept of units that share a budget; none falls below `min_tokens`."""
    return max(budget(sum(lens), keep, min_tokens), sum(min(n, min_tokens) for n in lens))


def allotments(tokens: Sequence[Tensor], scores: Sequence[Tensor], units: Sequence[Unit], scope: Scope, keep: float, min_tokens: int) -> list[int]:
    """Tokens kept of each unit. Units that share a budget compete by their scores, which must be comparable (`mean_one`)."""
    found = [0] * len(units)
    for group in groups(units, scope):
        n_kept = group_budget([len(tokens[u]) for u in group], keep, min_tokens)
        if len(group) == 1:
            found[group[0]] = n_kept
            continue
        _, own, joined = joined_units(group, tokens, scores)
        kept = own[ranking(joined, own, min_tokens)[:n_kept]]
        for u, n in zip(group, torch.bincount(kept, minlength=len(group)).tolist(), strict=True):
            found[u] = n
    return found


def joined_units(group: Sequence[int], tokens: Sequence[Tensor], scores: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Place, number of the unit within `group`, and score of every token of the group, (N,) each, in the order of the prompt."""
    place = torch.cat([tokens[u] for u in group])
    own = torch.cat([torch.full_like(tokens[u], number) for number, u in enumerate(group)])
    order = place.argsort(stable=True)
    return place[order], own[order], torch.cat([scores[u] for u in group])[order]


# --- selection ----------------------------------------------------------------------------------------------------------------


def unit_tokens(ctx: PruningContext) -> list[Tensor]:
    """For each unit, the places (n,) int64 of its patch tokens that are still there, ascending."""
    if not ctx.units:
        return []
    sequence, place = ctx.is_visual.nonzero(as_tuple=True)
    unit = ctx.unit[sequence, place]
    return list(torch.split(place[unit.argsort(stable=True)], torch.bincount(unit, minlength=len(ctx.units)).tolist()))


def observed_scores(method: TokenPruning, ctx: PruningContext, what: str, tokens: Sequence[Tensor]) -> list[Tensor]:
    """For each unit, what was observed of its tokens, (n,) fp32 on the device of the masks."""
    rows = ctx.observed[what].detach().to(ctx.unit.device, torch.float32)
    for unit, own in zip(ctx.units, tokens, strict=True):
        if len(own) != unit.n_tokens:
            have = f"{len(own)} of {unit.n_tokens} tokens of an image are left"
            raise UnsupportedError(f"{method.method_name()} ranks whole images, but {have}: put it in front of the method that dropped the others")
    return [row[: unit.n_tokens] for row, unit in zip(rows, ctx.units, strict=True)]


def usable(method: TokenPruning, scores: Sequence[Tensor]) -> tuple[list[Tensor], set[int]]:
    """The scores with evenly spread ones in place of those that are not finite, and which units these are.

    Warns once of these, and of units that are all one score: both point to a wrong hook.
    """
    if not scores:
        return [], set()
    name = method.method_name()
    is_finite, is_flat = torch.stack([torch.stack([s.isfinite().all(), (s == s[:1]).all()]) for s in scores]).T.tolist()
    broken = {u for u, fine in enumerate(is_finite) if not fine}
    if broken:
        _warn_once(f"{name}: scores are not finite; evenly spaced tokens are kept instead")
    if any(flat and len(s) > 1 for flat, s in zip(is_flat, scores, strict=True)):
        _warn_once(f"{name}: all tokens of an image have the same score; the first ones are kept")
    return [spread(s) if u in broken else s for u, s in enumerate(scores)], broken


def spread(like: Tensor) -> Tensor:
    """(n,) fp32 of mean 1 whose largest T lie evenly apart for every T: the van der Corput sequence, backwards."""
    n = len(like)
    index, value = torch.arange(n, device=like.device), torch.zeros(n, dtype=torch.float32, device=like.device)
    for bit in range(n.bit_length()):
        value += (index >> bit & 1) * 0.5 ** (bit + 1)
    return mean_one(1 - value)


def mean_one(scores: Tensor) -> Tensor:
    """Scores brought to mean 1, so that units of different sizes compare; ones where all are 0."""
    mean = scores.mean()
    return torch.where(mean > 0, scores / mean, torch.ones_like(scores))


def ranking(scores: Tensor, unit: Tensor, min_tokens: int) -> Tensor:
    """(N,) int64, places from the most important on, ties to the lower: first the best `min_tokens` of every unit, then all others."""
    order = scores.argsort(descending=True, stable=True)
    by_unit = order[unit[order].argsort(stable=True)]
    n = torch.bincount(unit)
    within = torch.arange(len(order), device=order.device) - (n.cumsum(0) - n).repeat_interleave(n)
    is_other = torch.ones_like(unit)
    is_other[by_unit[within < min_tokens]] = 0
    return order[is_other[order].argsort(stable=True)]


def largest(scores: Tensor, n: int) -> Tensor:
    """(n,) int64 ascending: the places of the n largest of (N,) scores, ties to the lower. `topk` is neither stable nor alike on all devices."""
    return scores.float().argsort(descending=True, stable=True)[:n].sort().values


def stride(n: int, n_kept: int, like: Tensor) -> Tensor:
    """(n_kept,) int64: ⌊(i + ½) · n / n_kept⌋, on the device of `like`."""
    return (2 * torch.arange(n_kept, device=like.device) + 1) * n // max(2 * n_kept, 1)


def structural_kept(ctx: PruningContext, kept: Tensor, newline: Newline) -> Tensor:
    """(B, tokens) bool: the structural tokens that stay beside the `kept` patch tokens. Those that end no row always do."""
    ends_row = ctx.is_structural & (ctx.place[..., 2] >= 0)
    if newline == "all":
        return ctx.is_structural
    others = ctx.is_structural & ~ends_row
    if newline == "none":
        return others
    sequence = torch.arange(len(kept), device=kept.device)[:, None]
    # one number per row of a map; a row of a mosaic of tiles may hold tokens of several units
    row = (sequence << 42) + ((ctx.place[..., 0] + 1) << 21) + ctx.place[..., 1] + 1
    return others | (ends_row & torch.isin(row, row[kept]))


def answer(kept: Tensor, *, merges: Sequence[Sequence[Recycled]] = (), scores: Tensor | None = None) -> Keep:
    """The tokens that stay. kept: (B, tokens) bool. merges: what each sequence recycles. scores: (B, tokens)."""
    index, ok = padded([row.nonzero().flatten() for row in kept])
    return Keep(index, ok, merge=_merge(merges, kept.device), scores=None if scores is None else scores.gather(1, index))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Index rows of different lengths as (B, n) int64 and which entries count, (B, n) bool; False pads at the end."""
    lens = torch.tensor([len(row) for row in rows], device=rows[0].device)
    index = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return index, torch.arange(index.shape[1], device=index.device) < lens[:, None]


def _merge(merges: Sequence[Sequence[Recycled]], device: torch.device) -> Merge | None:
    if not any(merges):
        return None
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    rows = [[torch.cat([empty, *parts]) for parts in zip(*found, strict=True)] if found else [empty, empty, empty.float()] for found in merges]
    anchor, source, weight = (torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    return Merge(anchor, source, weight)


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


# --- methods with one stage in front of the language model --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProjectorPruning(TokenPruning):
    """Base of the methods that drop visual tokens once, behind the projector, so many of each unit (tile, image or frame).

    keep: share of the patch tokens to keep, as a float, of which 1.0 changes nothing; or how many, as an int.
    newline: row-end tokens stay with the "nonempty" rows, or "all" or "none" do; other structural tokens always stay.
    min_tokens: of every unit; 0 lets a unit lose its last one.
    """

    keep: float | int = 0.25
    newline: Newline = "nonempty"
    min_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_keep(self)
        require_whole(self, "min_tokens", 0)
        require_choice(self, "newline", ("nonempty", "all", "none"))

    @property
    def keeps_all(self) -> bool:
        """Whether the options keep everything, whatever the sizes."""
        return self.keep == 1

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [] if self.keeps_all else [Stage("projector", is_known_ahead=True)]

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        return position_reasons(self, model)

    def unit_count(self, unit: Unit) -> int:
        """Patch tokens kept of a unit that has a budget of its own."""
        return budget(unit.n_tokens, self.keep, self.min_tokens)

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens left of each unit; None where that depends on which rows keep a patch."""
        if self.newline != "all" and any(unit.n_structural for unit in units):
            return None
        return [self.unit_count(unit) + unit.n_structural for unit in units]

    def chosen(self, ctx: PruningContext, chosen: Sequence[Tensor], tokens: Sequence[Tensor]) -> Keep:
        """The answer that keeps, of each unit's `tokens`, the entries `chosen`, and the newlines that belong to them."""
        kept = torch.zeros_like(ctx.is_visual)
        for unit, own, places in zip(ctx.units, tokens, chosen, strict=True):
            kept[unit.sequence, own[places]] = True
        return answer(kept | structural_kept(ctx, kept, self.newline))


@dataclass(frozen=True, kw_only=True)
class ScopedPruning(ProjectorPruning):
    """Base of those whose units may compete for one budget.

    budget_scope: what shares a budget: each "unit" alone (a tile, an image, or a frame, as the family cuts it), all tiles of one "image" or
    all frames of one video, or the whole "sample" (sequence). a `keep` that counts tokens is per scope, min_tokens per unit.
    """

    budget_scope: Scope = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "budget_scope", ("unit", "image", "sample"))

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens left of each unit; None where units compete, or where that depends on which rows keep a patch."""
        if any(len(group) > 1 for group in groups(units, self.budget_scope)):
            return None
        return super().count(stage, units)

    def picture_count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens left of each picture; None where pictures compete, or where that depends on which rows keep a patch."""
        if self.budget_scope != "image" or (self.newline != "all" and any(unit.n_structural for unit in units)):
            return super().picture_count(stage, units)
        return [
            group_budget([units[u].n_tokens for u in group], self.keep, self.min_tokens) + sum(units[u].n_structural for u in group)
            for group in groups(units, "image")
        ]
