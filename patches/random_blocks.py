"""Random key blocks at a given density: the control that shows whether a selection is worth more than its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import OptionError
from accel.protocols import AttentionContext, SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, KeyView, Rows


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(SparseAttention):
    """Each head and block of queries reads its own block, the first one and random others. Prefill only.

    density: share of the causal tiles per head, reached exactly up to one tile unless first and own blocks alone exceed it.
    seed: with the layer and the shape it fixes the choice.
    """

    block_size: int = 128
    density: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise OptionError(f"random_blocks: block_size must be a positive whole number, got {self.block_size!r}")
        if not 0.0 < self.density <= 1.0:
            raise OptionError(f"random_blocks: density must lie in (0, 1], got {self.density!r}")

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan:
        import torch

        from accel.kernels.block_sparse import ListPlan

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ctx.step.layer)
        masks = [self._mask(rows, ctx.step.n_heads, generator) for rows in ctx.lens.rows()]
        return ListPlan.from_mask(masks, ctx.lens, self.block_size)

    def _mask(self, rows: Rows, n_heads: int, generator: object) -> Tensor:
        """(Hq, nq, nk) bool: forced tiles first, then as many random ones as the density asks for."""
        import torch

        from accel.kernels.block_sparse.plan import causal_blocks

        distance = causal_blocks(rows, self.block_size)
        forced = (distance == 0) | (distance > 0) & (torch.arange(distance.shape[1]) == 0)
        # forced tiles win every draw, tiles above the diagonal none
        draw = torch.rand(n_heads, *distance.shape, generator=generator).masked_fill(forced, 2.0).masked_fill(distance < 0, -1.0)  # type: ignore[call-overload]
        wanted = max(round(self.density * int((distance >= 0).sum())), int(forced.sum()))
        kept = draw.flatten(1).topk(wanted).indices
        return torch.zeros_like(draw, dtype=torch.bool).flatten(1).scatter(1, kept, True).view_as(draw)
