"""Random key blocks at a given density: the control that shows whether a selection is worth more than its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import OptionError
from accel.patches._static import has_few_rows, is_whole, require_share, require_whole
from accel.protocols import AttentionContext, AttentionStep, SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import KeyView, ListPlan, Rows


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(SparseAttention):
    """Each head and block of queries reads its own block, the first one and random others. Prefill only.

    block_size: tokens.
    density: share of a head's causal tiles, own and first blocks included, met to the nearest tile; those two are the lower bound.
    seed: with the layer and the lengths of a sequence it fixes the choice. A prompt in chunks draws per chunk.
    """

    block_size: int = 128
    density: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "block_size", low=1)
        require_share(self, "density")
        if not is_whole(self.seed):
            raise OptionError(f"random_blocks: seed must be a whole number, got {self.seed!r}")

    @property
    def min_useful_len(self) -> int:
        """The shortest sequence with a hidden key: the first block and the own one are always read."""
        return 2 * self.block_size + 1

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None; also for few queries behind a cached prefix."""
        if reason := super().dense_reason(step):
            return reason
        if self.density == 1:
            return "density 1 keeps everything"
        return "few query rows" if has_few_rows(step, self.block_size) else None

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> ListPlan:
        """Lists per head. Sequences of equal lengths read the same blocks, whatever else is in the batch."""
        from accel.kernels.block_sparse import ListPlan

        masks = [self._mask(rows, layer=ctx.step.layer, n_heads=q.shape[1]) for rows in ctx.lens.rows()]
        return ListPlan.from_mask(masks, ctx.lens, self.block_size)

    def _mask(self, rows: Rows, *, layer: int, n_heads: int) -> Tensor:
        """(Hq, nq, nk) bool: the forced tiles, and as many random ones as the density asks for."""
        import torch

        from accel.kernels.block_sparse.plan import causal_blocks

        distance = causal_blocks(rows, self.block_size)
        causal = distance >= 0
        forced = distance == 0
        forced[:, 0] = True
        n_kept = max(round(self.density * int(causal.sum())), int(forced.sum()))
        generator = torch.Generator("cpu").manual_seed(self._seed_of(rows, layer))
        draw = torch.rand(n_heads, *distance.shape, dtype=torch.float32, generator=generator, device="cpu")
        # forced tiles win every draw, tiles above the diagonal none
        draw = draw.masked_fill_(forced, 2.0).masked_fill_(~causal, -1.0).flatten(1)
        kept = draw.topk(n_kept, sorted=False).indices
        return torch.zeros_like(draw, dtype=torch.bool).scatter_(1, kept, True).view(n_heads, *distance.shape)

    def _seed_of(self, rows: Rows, layer: int) -> int:
        """A seed that differs from layer to layer and length to length. torch's generator reads 32 bits of it, hence the hash."""
        text = f"{self.seed} {layer} {rows.q_len} {rows.kv_len}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
