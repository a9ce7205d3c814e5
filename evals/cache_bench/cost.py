"""What a next-scale generation costs by arithmetic: FLOPs of self-attention and of scoring, bytes of the cache (kv-compression.md §3, §5).

A multiply-add counts as two FLOPs. Left out: norms, softmax, selection, gathering and merging, everything that is no self-attention. Notation: n_k
tokens of scale k, T_k of all scales up to it; with a budget B a head enters scale k with min(T_{k−1}, B) entries and attends to min(T_k, B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.protocols import KVCompression, ModelInfo
    from accel.stats import CacheStats

# of an entry's place in the sequence, which is noted per head once entries have been dropped
POSITION_BYTES = 4


@dataclass(frozen=True)
class GenerationShape:
    """Sizes of one generation. tokens: of every scale. n_rows: in the transformer's batch; guidance doubles the pictures."""

    n_layers: int
    n_heads: int
    head_dim: int
    tokens: tuple[int, ...]
    n_rows: int

    @classmethod
    def of(cls, model: ModelInfo, n_rows: int) -> GenerationShape:
        """The shape of a next-scale model under its usual scales. OptionError for other models."""
        if model.scale_shapes is None:
            raise OptionError(f"a {model.family} model has no scales; this arithmetic is for next-scale models")
        return cls(model.n_layers, model.n_kv_heads, model.head_dim, tuple(height * width for height, width in model.scale_shapes), n_rows)

    @property
    def width(self) -> int:
        """C: channels of all heads."""
        return self.n_heads * self.head_dim

    @property
    def ends(self) -> tuple[int, ...]:
        """T_k: tokens up to each scale, its own included."""
        return tuple(accumulate(self.tokens))


@dataclass(frozen=True)
class HeadBudget:
    """Heads of one layer that keep as many entries each."""

    n_heads: int
    entries: int


# groups of every layer
Budgets = Sequence[Sequence[HeadBudget]]


def budgets_of(method: KVCompression, model: ModelInfo) -> list[list[HeadBudget]]:
    """Whole-number budgets of a bound method whose budgets are the same at every scale. OptionError where they change from scale to scale."""
    ends = GenerationShape.of(model, 1).ends
    found = []
    for layer in range(model.n_layers):
        by_scale = [
            [HeadBudget(len(group.heads), group.budget) for group in method.groups(model, layer, step=step, n_entries=end) if group.heads]
            for step, end in enumerate(ends)
        ]
        if any(one != by_scale[-1] for one in by_scale):
            raise OptionError(f"{method.method_name()}: budgets that change from scale to scale have no closed form; read the counters of a run")
        found.append(by_scale[-1])
    return found


def whole(shape: GenerationShape) -> list[list[HeadBudget]]:
    """The budgets of a cache without compression."""
    return [[HeadBudget(shape.n_heads, shape.ends[-1])]] * shape.n_layers


# --- FLOPs --------------------------------------------------------------------------------------------------------------------


def module_flops(tokens: Sequence[int], width: int, entries: float | None = None) -> float:
    """FLOPs of one layer's self-attention module for one row: four projections of all tokens, and both products (§3).

    entries: what every head keeps, a real number as published figures have it; None keeps everything.
    """
    ends = list(accumulate(tokens))
    read = sum(n * (end if entries is None else min(end, entries)) for n, end in zip(tokens, ends, strict=True))
    return 8 * width**2 * ends[-1] + 4 * width * read


def attention_flops(shape: GenerationShape, budgets: Budgets) -> int:
    """FLOPs of both products of attention, all layers and rows: 4 · d · b · Σ H_g · n_k · min(T_k, B_g) (§5.4)."""
    _require_all_heads(shape, budgets)
    read = sum(
        group.n_heads * n * min(end, group.entries) for layer in budgets for group in layer for n, end in zip(shape.tokens, shape.ends, strict=True)
    )
    return 4 * shape.head_dim * shape.n_rows * read


def scoring_flops(shape: GenerationShape, budgets: Budgets, scoring_rows: Sequence[int]) -> int:
    """FLOPs of the products that rank entries where a group has more than its budget: 2 · d · b · Σ H_g · rows_k · T̃_k (§5.4).

    scoring_rows: how many queries of each scale score; T̃ are the entries before selection, those of the scale included.
    """
    _require_all_heads(shape, budgets)
    found = 0
    for layer in budgets:
        for group in layer:
            for n, end, rows in zip(shape.tokens, shape.ends, scoring_rows, strict=True):
                before = min(end - n, group.entries) + n
                found += group.n_heads * rows * before if before > group.entries else 0
    return 2 * shape.head_dim * shape.n_rows * found


def counted_attention_flops(stats: CacheStats, shape: GenerationShape) -> int:
    """The same as `attention_flops`, from the counters of the generations of one run: all of them together."""
    return 4 * shape.head_dim * sum(n * stats.attended[scale] for scale, n in enumerate(shape.tokens))


# --- bytes --------------------------------------------------------------------------------------------------------------------


def whole_cache_bytes(shape: GenerationShape, *, key_bytes: int, value_bytes: int, has_last_scale: bool = True) -> int:
    """Bytes of keys and values of a whole cache. key_bytes, value_bytes: of one number; the published code holds keys in fp32 (§6.7).

    has_last_scale: whether the last scale is stored, which nothing reads later (§5.3).
    """
    n = shape.ends[-1] - (0 if has_last_scale else shape.tokens[-1])
    return shape.n_layers * shape.n_rows * shape.width * n * (key_bytes + value_bytes)


def cache_bytes(shape: GenerationShape, budgets: Budgets, scale: int, *, number_bytes: int, position_bytes: int = POSITION_BYTES) -> int:
    """Bytes that a compressed cache holds behind a scale, counted from 0; behind the last nothing stays (§5.1).

    A layer whose groups hold everything takes memory for all scales but the last at once. number_bytes: of one number of a key or a value.
    """
    _require_all_heads(shape, budgets)
    if scale == len(shape.tokens) - 1:
        return 0
    end, stored = shape.ends[scale], shape.ends[-1] - shape.tokens[-1]
    per_entry, found = 2 * shape.head_dim * number_bytes, 0
    for layer in budgets:
        if all(group.entries >= shape.ends[-1] for group in layer):
            found += shape.n_heads * stored * per_entry
            continue
        for group in layer:
            is_dropped = end > group.entries
            found += group.n_heads * min(end, group.entries) * (per_entry + (position_bytes if is_dropped else 0))
    return shape.n_rows * found


def _require_all_heads(shape: GenerationShape, budgets: Budgets) -> None:
    counts = [sum(group.n_heads for group in layer) for layer in budgets]
    if counts != [shape.n_heads] * shape.n_layers:
        raise OptionError(f"budgets must be of {shape.n_layers} layers of {shape.n_heads} heads, got layers of {counts} heads")
