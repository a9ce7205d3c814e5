"""What the selection returns: of one sequence, and of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from accel.kernels.block_sparse import VerticalSlashPlan


@dataclass(frozen=True)
class HeadDiagnostics:
    """Why the heads of one sequence got their blocks. Floating point fields are fp32, or fp64 from the naive path.

    vertical_mass (u_v), slash_mass (u_s): (Hq, nk), each sums to 1. tile_mass: (Hq, p, nk), probe mass by query block, of the last p = 1
    or 2 query blocks of the call; sums to 1. probe_coverage: (Hq,), the dense mass of the probe rows inside the final plan.
    """

    is_query_aware: Tensor      # (Hq,) bool
    distance: Tensor            # (Hq,), Jensen–Shannon, 0 … √ln 2
    vertical_tokens: Tensor     # (Hq,) int64, K_v: most-attended keys that together hold gamma
    slash_tokens: Tensor        # (Hq,) int64, K_s: the same for distances
    vertical_blocks: Tensor     # (Hq,) int64, n_v after budgets
    slash_blocks: Tensor        # (Hq,) int64, n_s after budgets
    vertical_mass: Tensor
    slash_mass: Tensor
    tile_mass: Tensor
    probe_coverage: Tensor | None = None


@dataclass(frozen=True)
class SequenceSelection:
    """The blocks of one sequence.

    vertical, slash: (Hq, nk) bool. heads: (n,) int64, the query-aware heads; extra: (n, nq, nk) bool, their own tiles; None where n = 0.
    is_finite: (Hq,) bool, False where NaN or infinities spoilt the attention that was looked at.
    """

    vertical: Tensor
    slash: Tensor
    heads: Tensor
    extra: Tensor | None
    is_finite: Tensor
    diagnostics: HeadDiagnostics


@dataclass(frozen=True)
class FlexIndex:
    """The plan of a batch.

    is_finite: (B, Hq) bool; a head that saw NaN keeps every tile, so the plan is right for it too.
    diagnostics: one entry per sequence, None for a sequence that was kept whole without a look; None unless asked for.
    """

    plan: VerticalSlashPlan
    is_finite: Tensor
    diagnostics: tuple[HeadDiagnostics | None, ...] | None = None
