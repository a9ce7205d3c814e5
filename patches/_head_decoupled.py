"""What the decoupled variant keeps for later scales, and how structural heads choose without a product (kv-compression.md §2.8).

The paper's power and pooling are not known to us, nor whether its prior counts by scale or by token: what is chosen here is said beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.patches._cache import divided
from accel.patches._head_plan import HeadPlan
from accel.protocols import CompressionContext

# of an equal part, which every group of heads gets: a prior that says 0 was measured on some pictures, not on all
LEAST_SHARE = 0.1


def cache_budgets(scale_use: Tensor, plan: HeadPlan, *, step: int, n_entries: int, mean: float, power: float) -> list[tuple[int, int]]:
    """Entries that stay behind a scale, by layer: of one contextual head and of one structural head, `mean` over all heads.

    scale_use: (L, H, K, K), how much of its attention a query of one scale (third axis) gives to each. Layers and kinds of heads get parts in
    proportion to the attention that later scales give to what exists, to this power; none more than attention reads by the plan, so that it never
    reads more, and what that leaves goes to the others.
    """
    # (L, H): what all later scales of this picture give to this one and those before
    reliance = scale_use[:, :, step + 1 : len(plan.scale_shapes), : step + 1].sum((2, 3))
    places, weights, sizes, limits = [], [], [], []
    for layer in range(len(plan.is_contextual)):
        for number, is_contextual in enumerate((True, False)):
            if heads := plan.heads(layer, contextual=is_contextual):
                places.append((layer, number))
                weights.append(float(reliance[layer, list(heads)].mean()) ** power)
                sizes.append(len(heads))
                limits.append(min(n_entries, (plan.contextual if is_contextual else plan.structural)[layer]))
    found = dict(zip(places, _within(limits, int(mean * sum(sizes) + 1e-9), weights, sizes), strict=True))
    return [(found.get((layer, 0), 1), found.get((layer, 1), 1)) for layer in range(len(plan.is_contextual))]


def _within(limits: list[int], total: int, weights: list[float], sizes: list[int]) -> list[int]:
    """Parts as of `divided`, none above its own limit: those that would be are held there, and the others share the rest."""
    found = list(limits)
    free = set(range(len(limits)))
    while free:
        order = sorted(free)
        left = total - sum(found[i] * sizes[i] for i in range(len(limits)) if i not in free)
        parts = divided(left, [weights[i] for i in order], most=max(limits), least_share=LEAST_SHARE, sizes=[sizes[i] for i in order])
        over = {i for i, part in zip(order, parts, strict=True) if part > limits[i]}
        if not over:
            found = [dict(zip(order, parts, strict=True)).get(i, found[i]) for i in range(len(limits))]
        free = free - over if over else set()
    return found


def prior_scores(ctx: CompressionContext, scale_use: Tensor) -> Tensor:
    """(B, H, N) fp32: how much a head reads of the scale of an entry, for each of its tokens, times the length of the entry's value.

    scale_use: (H, K, K) of these heads. Counted by token, as attention is: counted by scale, the many tokens of a large one would each pass for all.
    """
    assert ctx.scale_shapes is not None
    assert ctx.entry_scale is not None
    sizes = torch.tensor([height * width for height, width in ctx.scale_shapes[: ctx.step + 1]], device="cpu")
    # (H, step + 1) -> (B, H, N)
    by_scale = (scale_use[:, ctx.step, : ctx.step + 1] / sizes).to(ctx.v.device)
    length: Tensor = torch.linalg.vector_norm(ctx.v.float(), dim=-1)
    return length * by_scale.expand(len(ctx.v), -1, -1).gather(2, ctx.entry_scale)
