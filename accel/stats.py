"""Counters that a host keeps while a method runs: calls, reasons, reached density, where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from accel.protocols import Stage, Unit


@dataclass
class LayerStats:
    """Counters of one attention layer."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)      # by reason
    active_tiles: int = 0
    causal_tiles: int = 0
    selection_s: float = 0.0        # host seconds spent planning, in sparse calls and in calls whose plan came out dense
    attention_s: float = 0.0        # host seconds spent in the sparse kernel
    # calls, active and causal tiles counted on a device that nobody has waited for yet, (3,) int64
    unread: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def density(self) -> float | None:
        """Share of the causal tiles that sparse calls computed; None before the first sparse call."""
        return self.active_tiles / self.causal_tiles if self.causal_tiles else None

    def count_sparse(self, tiles: Tensor, *, is_deferred: bool, calls: int = 1) -> None:
        """Adds sparse calls. tiles: their active and causal tiles, (2,) int64. is_deferred: they are read when somebody asks for the counters."""
        if not is_deferred:
            active, causal = tiles.tolist()
            self._add(calls, active, causal)
            return
        if self.unread is not None and self.unread.device != tiles.device:
            # the model has moved
            self.settle()
            self.unread = None
        if self.unread is None:
            self.unread = _three_zeros(tiles)
        self.unread[0] += calls
        self.unread[1:] += tiles

    def settle(self) -> None:
        """Reads what was counted on a device; waits for it."""
        if self.unread is not None:
            calls, active, causal = self.unread.tolist()
            # zeroed in place: a captured graph goes on counting in this tensor
            self.unread.zero_()
            self._add(calls, active, causal)

    def _add(self, calls: int, active: int, causal: int) -> None:
        self.sparse_calls += calls
        self.active_tiles += active
        self.causal_tiles += causal

    def add(self, other: LayerStats) -> None:
        self.sparse_calls += other.sparse_calls
        self.dense_calls.update(other.dense_calls)
        self.active_tiles += other.active_tiles
        self.causal_tiles += other.causal_tiles
        self.selection_s += other.selection_s
        self.attention_s += other.attention_s


@dataclass(frozen=True)
class PruningEvent:
    """What one stage of one prompt left of the visual tokens, told to `Handle.observe_pruning`. Tensors are on the CPU.

    B sequences, V the most visual tokens of one, in the order of the prompt; `units` and `place` as in `PruningContext`, −1 behind shorter rows.
    is_kept: (B, V) bool, what can still be seen after this stage and all earlier ones. anchor: (B, V) int64, the token into which this stage
    merged each token, −1 where it did not. scores: (B, V) fp32, what the stage ranked by, or None.
    """

    method: str
    stage: Stage
    units: Sequence[Unit]
    unit: Tensor
    place: Tensor
    is_structural: Tensor
    is_kept: Tensor
    anchor: Tensor
    scores: Tensor | None = None


@dataclass
class TokenStats:
    """Counters of visual tokens. prompts: sequences with visual tokens that were pruned; patches, structural: visual tokens they brought.

    kept_patches, kept_structural: what was left behind the last stage. layer_tokens: patch tokens summed over the decoder layers that saw them;
    of all_layer_tokens without pruning. skipped: sequences left whole, by reason.
    """

    prompts: int = 0
    patches: int = 0
    structural: int = 0
    kept_patches: int = 0
    kept_structural: int = 0
    layer_tokens: int = 0
    all_layer_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def kept_share(self) -> float | None:
        """Share of the patch tokens kept, as a mean over the decoder layers; None before the first prompt with a picture."""
        return self.layer_tokens / self.all_layer_tokens if self.all_layer_tokens else None


@dataclass
class CacheStats:
    """Counters of compressed caches. Entries are those of all rows, KV heads and layers of a next-scale model, by scale, summed over generations.

    total: entries that a whole cache would have had, those of the scale included. attended: entries that attention read. cached: entries left behind.
    bytes_by_scale: the most that one cache held at a scale, between attention calls: keys, values, positions, and what a method has recorded.
    held_by_layer: what the layers of a decoder's cache hold behind the newest pass; most_held: the most that they held together, the layers that
    a prompt has not reached yet counted as empty. whole_bytes: what one cache holds without compression, keys and values, in a next-scale model
    of all scales but the last. These are the largest over generations, and none is the process's peak, to which weights, activations and the
    operands of one attention call are added. skipped: calls of layers whose cache had to stay whole, by reason.
    """

    generations: int = 0
    total: Counter[int] = field(default_factory=Counter)
    attended: Counter[int] = field(default_factory=Counter)
    cached: Counter[int] = field(default_factory=Counter)
    bytes_by_scale: dict[int, int] = field(default_factory=dict)
    whole_bytes_by_layer: dict[int, int] = field(default_factory=dict)
    held_by_layer: dict[int, int] = field(default_factory=dict)
    most_held: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def peak_bytes(self) -> int:
        """The most that one cache held."""
        return max([self.most_held, *self.bytes_by_scale.values()])

    @property
    def whole_bytes(self) -> int:
        """What one cache holds without compression."""
        return sum(self.whole_bytes_by_layer.values())

    @property
    def kept_share(self) -> float | None:
        """Share of the entries of the last scale's step that its attention read; None before the first generation has come so far."""
        last = max(self.total, default=None)
        return None if last is None else self.attended[last] / self.total[last]

    def add_entries(self, scale: int, *, total: int, attended: int, cached: int) -> None:
        """Adds one layer at one scale."""
        self.total[scale] += total
        self.attended[scale] += attended
        self.cached[scale] += cached

    def add_bytes(self, scale: int, held: int) -> None:
        """Notes what a cache holds now."""
        self.bytes_by_scale[scale] = max(held, self.bytes_by_scale.get(scale, 0))

    def begin(self) -> None:
        """A new cache, still empty."""
        self.generations += 1
        self.held_by_layer.clear()

    def add_layer(self, layer: int, *, held: int, whole: int) -> None:
        """Notes what a layer of a decoder's cache holds now, and would hold without compression."""
        self.held_by_layer[layer] = held
        self.most_held = max(self.most_held, sum(self.held_by_layer.values()))
        self.add_whole_bytes(layer, whole)

    def add_whole_bytes(self, layer: int, held: int) -> None:
        """Notes what a layer of a whole cache would hold."""
        self.whole_bytes_by_layer[layer] = max(held, self.whole_bytes_by_layer.get(layer, 0))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "generations": self.generations,
            "entries_by_scale": dict(sorted(self.total.items())),
            "attended_by_scale": dict(sorted(self.attended.items())),
            "cached_by_scale": dict(sorted(self.cached.items())),
            "kept_share": self.kept_share,
            "bytes_by_scale": dict(sorted(self.bytes_by_scale.items())),
            "peak_cache_bytes": self.peak_bytes,
            "whole_cache_bytes": self.whole_bytes,
            "held_bytes": sum(self.held_by_layer.values()),
            "not_compressed": dict(self.skipped),
        }


class Stats:
    """All layers of a patched model. Read `total`, `density`, `tokens`, `cache` or `layers[i]`, of layers that ran; `reset()` starts over.

    Reading waits for a GPU, counting does not.
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerStats] = {}
        self.tokens = TokenStats()
        self.cache = CacheStats()

    def layer(self, index: int) -> LayerStats:
        """The counters of a layer, to write to."""
        return self._layers.setdefault(index, LayerStats())

    @property
    def layers(self) -> dict[int, LayerStats]:
        """The counters by layer, to read; without the layers of which nothing has been counted yet."""
        for layer in self._layers.values():
            layer.settle()
        return {index: layer for index, layer in self._layers.items() if layer != LayerStats()}

    @property
    def total(self) -> LayerStats:
        total = LayerStats()
        for layer in self.layers.values():
            total.add(layer)
        return total

    @property
    def density(self) -> float | None:
        """Share of the causal tiles that sparse calls computed; None before the first sparse call."""
        return self.total.density

    def reset(self) -> None:
        """Starts over. Tensors on a device live on: a captured graph goes on counting in them, and would write into freed memory."""
        self.tokens, self.cache = TokenStats(), CacheStats()
        for index, layer in list(self._layers.items()):
            unread, layer.unread = layer.unread, None
            if unread is None:
                del self._layers[index]
            else:
                self._layers[index] = LayerStats(unread=unread.zero_())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        total = self.total
        return {
            "sparse_calls": total.sparse_calls,
            "dense_calls": dict(total.dense_calls),
            "density": self.density,
            "selection_s": total.selection_s,
            "attention_s": total.attention_s,
            "visual_tokens": self.tokens.patches,
            "kept_tokens": self.tokens.kept_patches,
            "kept_share": self.tokens.kept_share,
            "density_by_layer": {i: s.density for i, s in sorted(self.layers.items()) if s.density is not None},
            **({"cache": self.cache.as_dict()} if self.cache.generations else {}),
        }


def _three_zeros(tiles: Tensor) -> Tensor:
    import torch

    # a tensor born in inference mode could not be written outside it, where somebody reads and zeroes it
    with torch.inference_mode(False):
        return tiles.new_zeros(3)
