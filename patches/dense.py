"""The dense control: sparsifies nothing, counts every call. With `dense_kernel="accel"` it is the best dense baseline of a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from accel.protocols import AttentionContext, AttentionStep, RunDense, SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import KeyView

_REASON = "dense control"


@dataclass(frozen=True, kw_only=True)
class Dense(SparseAttention):
    """Leaves every call dense: the model's own attention, or our own kernel with `dense_kernel="accel"`."""

    trainable: ClassVar[bool] = True

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Always the same: nothing is ever sparse."""
        return _REASON

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> RunDense:
        """Never a plan of blocks."""
        return RunDense(_REASON)
