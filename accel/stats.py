"""Counters that a host keeps while a method runs: calls, reasons, reached density, where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LayerStats:
    """Counters of one attention layer."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)      # by reason
    active_tiles: int = 0
    causal_tiles: int = 0
    selection_s: float = 0.0        # host seconds spent planning, in sparse calls and in calls whose plan came out dense
    attention_s: float = 0.0        # host seconds spent in the sparse kernel

    def add(self, other: LayerStats) -> None:
        self.sparse_calls += other.sparse_calls
        self.dense_calls.update(other.dense_calls)
        self.active_tiles += other.active_tiles
        self.causal_tiles += other.causal_tiles
        self.selection_s += other.selection_s
        self.attention_s += other.attention_s


class Stats:
    """All layers of a patched model. Read `total`, `density`, or `layers[i]`; `reset()` starts over."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerStats] = {}

    def layer(self, index: int) -> LayerStats:
        return self.layers.setdefault(index, LayerStats())

    @property
    def total(self) -> LayerStats:
        total = LayerStats()
        for layer in self.layers.values():
            total.add(layer)
        return total

    @property
    def density(self) -> float | None:
        """Share of the causal tiles that sparse calls computed; None before the first sparse call."""
        total = self.total
        return total.active_tiles / total.causal_tiles if total.causal_tiles else None

    def reset(self) -> None:
        self.layers.clear()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        total = self.total
        return {
            "sparse_calls": total.sparse_calls,
            "dense_calls": dict(total.dense_calls),
            "density": self.density,
            "selection_s": total.selection_s,
            "attention_s": total.attention_s,
            "density_by_layer": {i: s.active_tiles / s.causal_tiles for i, s in sorted(self.layers.items()) if s.causal_tiles},
        }
