"""Sink and sliding window: the control that every sparse method must beat on retrieval (the pattern of arXiv 2309.17453, in blocks)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from accel.patches._static import has_few_rows, require_share, require_whole
from accel.protocols import AttentionContext, AttentionStep, SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, KeyView


@dataclass(frozen=True, kw_only=True)
class Streaming(SparseAttention):
    """Each block of queries reads the first `sink_blocks` key blocks and the last `window_blocks`, its own included. Prefill only.

    block_size: tokens.
    density: instead of `window_blocks`, the share of the causal tiles to come closest to, for tables at equal cost. The smallest pattern,
        sinks and own block, is the lower bound; each sequence of a batch gets its own window.
    """

    trainable: ClassVar[bool] = True

    block_size: int = 128
    window_blocks: int = 8
    sink_blocks: int = 1
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low in (("block_size", 1), ("window_blocks", 1), ("sink_blocks", 0)):
            require_whole(self, option, low=low)
        if self.density is not None:
            require_share(self, "density")

    @property
    def min_useful_len(self) -> int:
        """The shortest sequence with a hidden key; with `density` the window follows the length, down to one block."""
        window = self.window_blocks if self.density is None else 1
        return (window + self.sink_blocks) * self.block_size + 1

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None; also for few queries behind a cached prefix."""
        if reason := super().dense_reason(step):
            return reason
        if self.density == 1:
            return "density 1 keeps everything"
        return "few query rows" if has_few_rows(step, self.block_size) else None

    def static_pattern(self, step: AttentionStep) -> BlockPlan | None:
        """Sink and window. None where `density` gives the sequences of a batch windows of their own: then `plan` answers."""
        from accel.kernels.block_sparse import ImplicitPlan

        if self.density is None:
            return ImplicitPlan(self.block_size, self.window_blocks, self.sink_blocks, powers=False)
        if step.batch == 1:
            return ImplicitPlan(self.block_size, self.window_at(step.q_len, step.kv_len), self.sink_blocks, powers=False)
        return None

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan:
        """Sink and window; with `density` one window per sequence, from its own length."""
        import torch

        from accel.kernels.block_sparse import ImplicitPlan, VerticalSlashPlan

        if self.density is None:
            return ImplicitPlan(self.block_size, self.window_blocks, self.sink_blocks, powers=False)
        block = torch.arange(-(-ctx.lens.max_kv // self.block_size), device="cpu")
        windows = torch.tensor([self.window_at(rows.q_len, rows.kv_len) for rows in ctx.lens.rows()], device="cpu")
        # (B, 1, nk): every head alike
        sinks = (block < self.sink_blocks).expand(len(windows), 1, -1)
        return VerticalSlashPlan(self.block_size, vertical=sinks, slash=(block < windows[:, None])[:, None])

    def window_at(self, q_len: int, kv_len: int) -> int:
        """Blocks of the window for the last `q_len` of `kv_len` tokens: `window_blocks`, or the width that comes closest to `density`."""
        if self.density is None:
            return self.window_blocks
        # query blocks first … last − 1; block i can list i + 1 blocks
        first, last = (kv_len - q_len) // self.block_size, -(-kv_len // self.block_size)

        def tiles(width: int) -> int:
            """Tiles of rows that list at most `width` blocks."""
            turn = min(max(width, first), last)
            return (turn - first) * (first + 1 + turn) // 2 + (last - turn) * width

        low = self.sink_blocks + 1
        wanted = self.density * tiles(last)
        at_least = low + bisect_left(range(low, max(last, low)), wanted, key=tiles)
        candidates = [width for width in (at_least - 1, at_least) if width >= low]
        return min(candidates, key=lambda width: abs(tiles(width) - wanted)) - self.sink_blocks
