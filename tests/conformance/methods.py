"""Every registered sparse-attention method, with options that make it sparse on a hundred tokens, or keep everything."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, ImplicitPlan, KeyView
from accel.protocols import AttentionContext, AttentionStep, SparseAttention
from accel.registry import method_class, method_names

# By option name, for whichever method has the option: a new method needs no entry of its own unless it brings new words.
SPARSE: dict[str, Any] = {
    "min_seq_len": 0,
    "block_size": 16,
    "window_blocks": 1,
    "sink_blocks": 1,
    "min_budget": 16,
    "min_q": 1,
    "gamma": 0.4,
    "full_layers": "none",
}
KEEP_ALL: dict[str, Any] = {"gamma": 1.0, "density": 1.0, "window_blocks": 64}

# Settings that change which calls are sparse, tried beside the defaults.
VARIANTS: dict[str, dict[str, Any]] = {"is_adapted": {"is_adapted": True}, "gqa_mode": {"gqa_mode": "group_union"}, "density": {"density": 0.6}}

NEVER_SPARSE = {"dense"}


@dataclass(frozen=True)
class MethodCase:
    """A method class with the options of one column of the matrix."""

    cls: type[SparseAttention]
    variant: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.cls.method_name(), *(f"{name}={value}" for name, value in self.variant.items())])

    @property
    def is_ever_sparse(self) -> bool:
        return self.cls.method_name() not in NEVER_SPARSE

    def options(self, **changes: Any) -> dict[str, Any]:
        """Options that make it sparse on tiny models, then the variant, then `changes`."""
        known = {f.name for f in fields(self.cls)}
        return {name: value for name, value in {**SPARSE, **self.variant, **changes}.items() if name in known}

    def sparse(self, **changes: Any) -> SparseAttention:
        return self.cls(**self.options(**changes))

    def keep_all(self) -> SparseAttention:
        """The method asked to keep everything."""
        return self.cls(**self.options(**KEEP_ALL))


def method_cases() -> list[MethodCase]:
    """One case per registered sparse-attention method, and one per variant of it."""
    cases = []
    for name in method_names():
        cls = method_class(name)
        if issubclass(cls, SparseAttention):
            known = {f.name for f in fields(cls)}
            cases += [MethodCase(cls), *(MethodCase(cls, options) for option, options in VARIANTS.items() if option in known)]
    return cases


METHODS = method_cases()
SPARSE_METHODS = [case for case in METHODS if case.is_ever_sparse]


@dataclass(frozen=True, kw_only=True)
class EveryBlock(SparseAttention):
    """Runs the sparse kernel over all blocks, in prefill and decode: whatever differs from the plain model is the host's or the kernel's."""

    block_size: int = 16

    def dense_reason(self, step: AttentionStep) -> str | None:
        return None

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan:
        return ImplicitPlan.dense(self.block_size)
