"""Sink and sliding window: the control that every sparse method must beat on retrieval (arXiv 2309.17453's pattern, in blocks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import OptionError
from accel.protocols import AttentionContext, AttentionStep, SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, KeyView


@dataclass(frozen=True, kw_only=True)
class Streaming(SparseAttention):
    """Each block of queries reads the first `sink_blocks` key blocks and the last `window_blocks`, its own included. Prefill only.

    density: instead of `window_blocks`, the share of the causal tiles to come closest to, for comparisons at equal cost.
    """

    block_size: int = 128
    window_blocks: int = 8
    sink_blocks: int = 1
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low in (("block_size", 1), ("window_blocks", 1), ("sink_blocks", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or value < low:
                raise OptionError(f"streaming: {option} must be a whole number of at least {low}, got {value!r}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise OptionError(f"streaming: density must lie in (0, 1], got {self.density!r}")

    def static_pattern(self, step: AttentionStep) -> BlockPlan:
        from accel.kernels.block_sparse import ImplicitPlan

        window = self.window_blocks if self.density is None else self._matching_window(step, self.density)
        return ImplicitPlan(self.block_size, window, self.sink_blocks, powers=False)

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan:
        return self.static_pattern(ctx.step)

    def _matching_window(self, step: AttentionStep, density: float) -> int:
        """The window whose share of the causal tiles is closest to `density`."""
        last = -(-step.kv_len // self.block_size)
        first = (step.kv_len - step.q_len) // self.block_size
        causal = sum(i + 1 for i in range(first, last))

        def distance(window: int) -> float:
            tiles = sum(min(window + min(self.sink_blocks, max(0, i + 1 - window)), i + 1) for i in range(first, last))
            return abs(tiles / causal - density)

        return min(range(1, last + 1), key=distance)
