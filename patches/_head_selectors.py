"""What contextual and structural heads keep, and how dropped entries are merged into kept ones (kv-compression.md §2.4, §2.5)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.patches._cache import evenly_spread, largest
from accel.protocols import CompressionContext, Merge

# rows of the similarity matrix that are held at once
CHUNK = 1024


def query_sample(ctx: CompressionContext, n: int | None) -> Tensor:
    """(rows,) int64: at most n queries of the scale, evenly spread over its map; None takes all."""
    assert ctx.scale_shapes is not None
    n_new, device = ctx.q.shape[2], ctx.q.device
    if n is None or n >= n_new:
        return torch.arange(n_new, device=device)
    height, width = ctx.scale_shapes[ctx.step]
    # a stride that shares a factor with the width would look at a few columns only
    if math.gcd(n_new // n, width) == 1:
        return evenly_spread(n_new, n, device)
    n_rows, n_columns = sub_grid(height, width, n)
    return (evenly_spread(height, n_rows, device)[:, None] * width + evenly_spread(width, n_columns, device)).flatten()


def sub_grid(height: int, width: int, n: int) -> tuple[int, int]:
    """Rows and columns of an even grid of at most n points, as many as fit in the proportion of a map."""
    # a map many times as high as wide must not be given more rows than points
    n_rows = min(height, n, max(1, math.isqrt(n * height // width)))
    return n_rows, min(width, n // n_rows)


def structural_index(
    ctx: CompressionContext, scores: Tensor, budget: int, *, n_protected: int, middle_share: float, recent_policy: Literal["grid", "score"]
) -> Tensor:
    """(B, H, budget) int64 ascending: the first entries, the whole scale being made, and the best of those between.

    scores: (B, H, N) fp32. n_protected: how many entries are the first, of those that exist. Where the budget has no room for the whole scale,
    `middle_share` of what is left goes to those between, and the scale keeps an even grid of its map, filled up by score; or its best by score.
    """
    n_entries, n_new = scores.shape[2], ctx.q.shape[2]
    n_first, n_old = min(n_protected, n_entries), n_entries - n_new
    places = torch.arange(n_entries, device=scores.device)
    is_first = places < n_first
    if budget >= n_first + n_entries - max(n_old, n_first):
        return largest(scores, budget, forced=is_first | (places >= n_old))
    room = max(0, budget - n_first)
    n_middle = min(math.floor(middle_share * room), max(0, n_old - n_first))
    middle = largest(scores[..., n_first:n_old], n_middle) + n_first
    on_grid = torch.zeros(n_entries, dtype=torch.bool, device=scores.device)
    if recent_policy == "grid":
        on_grid[grid_places(ctx, room - n_middle) + n_old] = True
    # the first entries may reach into the scale being made, where they are kept already
    n_begin = max(n_old, n_first)
    newest = largest(scores[..., n_begin:], room - n_middle, forced=on_grid[n_begin:]) + n_begin
    first = places[: budget - room].expand(*scores.shape[:2], -1)
    return torch.cat([first, middle, newest], -1)


def grid_places(ctx: CompressionContext, n: int) -> Tensor:
    """(points,) int64: at most n places of the map of this scale, on an even grid."""
    assert ctx.scale_shapes is not None
    height, width = ctx.scale_shapes[ctx.step]
    if n < 1:
        return torch.empty(0, dtype=torch.int64, device=ctx.q.device)
    n_rows, n_columns = sub_grid(height, width, n)
    # round(i · height / rows), ties up
    rows, columns = (
        (2 * torch.arange(count, device=ctx.q.device) * size + count) // (2 * count) for count, size in ((n_rows, height), (n_columns, width))
    )
    return (rows[:, None] * width + columns).flatten()


@torch.no_grad()
def merge_dropped(keys: Tensor, kept: Tensor, *, is_normalised: bool) -> Merge:
    """Every dropped entry into the kept one whose key is most similar, weighted by the cosine w (§2.5).

    keys: (B, H, N, D); kept: (B, H, n) int64 ascending. With m dropped entries in an anchor its row becomes (own + Σ w · dropped) / (1 + m), or
    with `is_normalised` (own + Σ w · dropped) / (1 + Σ w), w at least 0.
    """
    n_entries = keys.shape[2]
    is_kept = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device).scatter(2, kept, True)
    # (B, H, N − n): the places of the others, ascending
    dropped = is_kept.int().argsort(dim=-1, stable=True)[..., : n_entries - kept.shape[2]]
    units = F.normalize(keys.float(), dim=-1)

    def rows(index: Tensor) -> Tensor:
        return units.gather(2, index[..., None].expand(*index.shape, units.shape[3]))

    anchors = rows(kept).mT
    parts = [(rows(some) @ anchors).max(-1) for some in torch.split(dropped, CHUNK, -1)]
    weight = torch.cat([part.values for part in parts], -1)
    nearest = torch.cat([part.indices for part in parts], -1)
    if is_normalised:
        weight = weight.clamp_min(0)
    share = weight if is_normalised else torch.ones_like(weight)
    whole = torch.ones(kept.shape, dtype=torch.float32, device=keys.device).scatter_add(2, nearest, share)
    # entries into which nothing is merged are no anchors, and stay bit for bit: a weight of 0 names nobody
    is_anchor = torch.zeros_like(whole).scatter_add(2, nearest, (share != 0).float()) > 0
    own = torch.where(is_anchor, 1 / whole, 0.0)
    return Merge(
        anchor=torch.cat([kept, kept.gather(2, nearest)], -1), source=torch.cat([kept, dropped], -1),
        weight=torch.cat([own, weight / whole.gather(2, nearest)], -1),
    )  # fmt: skip
