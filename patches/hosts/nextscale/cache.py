"""The cache of one generation that asks a KV-compression method at every scale, and really drops what the method does not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accel.errors import PatchError
from accel.kernels.head_grouped import KVGroup, grouped_attention
from accel.models.cache import ScaleCache, Schedule
from accel.patches.hosts.bound import outside_graph
from accel.patches.hosts.entries import Entries, check_answer
from accel.protocols import CompressionContext, HeadGroup, KVCompression, ModelInfo, Retain
from accel.stats import CacheStats


@dataclass
class Layer:
    """What one layer holds between scales: the entries of each head group, and the method's own state.

    n_seen: positions that have passed, whatever was kept of them. heads: the groups' heads, which never change within a generation.
    """

    heads: list[tuple[int, ...]] = field(default_factory=list)
    entries: list[Entries | None] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    n_seen: int = 0


@dataclass(frozen=True)
class Chosen:
    """One group at one scale: all its entries, those that stay, those that attention reads, and the method's answer where it was asked."""

    group: HeadGroup
    every: Entries
    kept: Entries
    attended: Entries
    retain: Retain | None


class CompressedCache(ScaleCache):
    """Entries per layer and head group, so many of each head as its group's budget allows.

    A layer whose budgets hold every entry at every scale is left to `ScaleCache`, bit for bit. The others keep exactly the entries that stay, which
    attention reads without a mask. Moments behind attention: "after_prefill" after every scale, which is prefilled at once, and
    "every_n_steps" after every n-th; nothing is kept behind the last scale.
    """

    def __init__(self, schedule: Schedule, method: KVCompression, info: ModelInfo, *, counters: Callable[[], CacheStats], is_guided: bool) -> None:
        super().__init__(schedule)
        self.method, self.is_guided, self.counters = method, is_guided, counters
        self.info = replace(info, scale_shapes=schedule.sizes)
        self._needs = method.needs()
        self._shared: dict[str, Any] = {}
        self._layers: dict[int, Layer] = {}
        self._whole: dict[int, bool] = {}
        # by device: the scale of every position, and the numbers of heads that are no neighbours
        self._scale_of: dict[torch.device, Tensor] = {}
        self._indexes: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def begin(self, scale: int) -> None:
        """Called by the model before the first layer of every scale."""
        super().begin(scale)
        if scale == 0:
            self.counters().generations += 1
        self._count_bytes()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of one layer at the current scale over what is kept of it and of all before: (b, H, n_k, d).

        A compiler leaves it out of its graphs: methods read values, and lengths change at every scale.
        """
        return outside_graph(self._attend, layer, q, k, v)  # type: ignore[no-any-return]

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.scale < 0:
            raise PatchError("no scale was begun; this cache serves generation, scale by scale, not a teacher-forced pass")
        per_entry = 2 * k.shape[0] * k.shape[1] * k.shape[3] * k.element_size()
        self.counters().add_whole_bytes(layer, per_entry * self.schedule.span(self.schedule.last)[0])
        if self._keeps_whole(layer):
            n = k.shape[0] * k.shape[1] * self.schedule.span(self.scale)[1]
            self.counters().add_entries(self.scale, total=n, attended=n, cached=0 if self.is_last_scale else n)
            out = super().attend(layer, q, k, v)
        else:
            out = self._attend_groups(layer, q, k, v)
            if self.is_last_scale or self.method.release(self.info, layer, step=self.scale):
                self.release(layer)
        self._count_bytes()
        return out

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Scale index and position of what a layer holds, (b, H, T) int64 where something was dropped; −1 behind the entries of shorter heads."""
        held = self._layers.get(layer)
        if held is None or any(entries is None for entries in held.entries):
            return super().entries(layer)
        rows: dict[int, Tensor] = {}
        for heads, entries in zip(held.heads, held.entries, strict=True):
            assert entries is not None
            rows.update(zip(heads, entries.positions().masked_fill(~entries.validity(), -1).unbind(1), strict=True))
        longest = max(row.shape[1] for row in rows.values())
        padded = [torch.nn.functional.pad(rows[head], (0, longest - rows[head].shape[1]), value=-1) for head in sorted(rows)]
        position = torch.stack(padded, 1)
        return self._scales(position.clamp_min(0)).masked_fill(position < 0, -1), position

    def cache_bytes(self) -> int:
        """Bytes of the memory taken for keys, values and what is known of them, tensors in a method's own state included."""
        return super().cache_bytes() + sum(t.untyped_storage().nbytes() for held in self._layers.values() for t in _tensors(held))

    def release(self, layer: int | None = None) -> None:
        """Gives back the memory of one layer, or of all."""
        super().release(layer)
        if layer is None:
            self._layers.clear()
        elif layer in self._layers:
            # what has passed is not forgotten: a later scale must not be taken for the first
            self._layers[layer] = Layer(heads=self._layers[layer].heads, n_seen=self._layers[layer].n_seen)

    # --- one layer at one scale -----------------------------------------------------------------------------------------------

    def _keeps_whole(self, layer: int) -> bool:
        """Whether no scale brings more entries to this layer than its budgets hold, and the method does not want to look at them."""
        if layer not in self._whole:
            ends = [self.schedule.span(scale)[1] for scale in range(len(self.schedule))]
            self._whole[layer] = not self._needs.every_step and all(
                group.budget >= end for scale, end in enumerate(ends) for group in self.method.groups(self.info, layer, step=scale, n_entries=end)
            )
        return self._whole[layer]

    def _attend_groups(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] != k.shape[1]:
            raise PatchError(f"next-scale models have as many query heads as KV heads; layer {layer} brings {q.shape[1]} and {k.shape[1]}")
        held = self._layers.setdefault(layer, Layer())
        start, end = self.schedule.span(self.scale)
        if held.n_seen != start:
            raise PatchError(f"layer {layer} has seen {held.n_seen} of the {start} tokens that come before scale {self.scale}")
        held.n_seen = end
        groups = self._groups(layer, held, n_heads=k.shape[1])
        chosen = [
            self._choose(layer, group, held, number, self._of_heads(k, group.heads), self._of_heads(v, group.heads), q)
            for number, group in enumerate(groups)
        ]
        out = self._attention(q, chosen)
        if not self.is_last_scale:
            for number, one in enumerate(chosen):
                held.entries[number] = self._kept_behind(layer, held, one, q).owned()
        rows = k.shape[0]
        self.counters().add_entries(
            self.scale, total=rows * k.shape[1] * end, attended=rows * sum(len(one.attended) * len(one.group.heads) for one in chosen),
            cached=rows * sum(len(entries) * entries.k.shape[1] for entries in held.entries if entries is not None) if not self.is_last_scale else 0,
        )  # fmt: skip
        return out

    def _choose(self, layer: int, group: HeadGroup, held: Layer, number: int, k: Tensor, v: Tensor, queries: Tensor) -> Chosen:
        """What attention reads of a group, and what stays of it as far as that is decided before attention."""
        every = self._with_new(held, number, k, v)
        retain = self._answer(layer, group, held, every, queries) if self._is_asked("before_attention") else None
        if retain is None:
            return Chosen(group, every, every, every, None)
        merged = every.merged(retain)
        kept = merged.at(retain.cache_index, retain.ok)
        return Chosen(group, every, kept, kept if retain.attend_index is None else merged.at(retain.attend_index), retain)

    def _attention(self, q: Tensor, chosen: Sequence[Chosen]) -> Tensor:
        """Attention of all heads, each to what its group reads: (b, H, n, d). One launch on CUDA, one call per group on a CPU."""
        wants_gradients = torch.is_grad_enabled() and q.requires_grad
        if wants_gradients or any(one.attended.valid is not None for one in chosen):
            parts = [one.attended.attention(self._of_heads(q, one.group.heads), self.softmax_scale) for one in chosen]
            # the groups' outputs lie one behind the other: back into the layer's order
            heads = [head for one in chosen for head in one.group.heads]
            return self._of_heads(torch.cat(parts, 1), tuple(sorted(range(len(heads)), key=heads.__getitem__)))
        groups = [KVGroup(one.group.heads, one.attended.k, one.attended.v) for one in chosen]
        return grouped_attention(q, groups, scale=self.softmax_scale)

    def _kept_behind(self, layer: int, held: Layer, one: Chosen, q: Tensor) -> Entries:
        """What stays of a group for later scales."""
        kept = one.kept
        if one.every.mass is not None:
            received = one.attended.received(self._of_heads(q, one.group.heads), self.softmax_scale)
            kept = replace(kept, mass=_mass_of_kept(one.every.mass, one.retain, received))
        if not (self._is_asked("after_prefill") or self._is_asked("every_n_steps")):
            return kept
        retain = self._answer(layer, one.group, held, kept, q)
        if retain is None:
            return kept
        if retain.attend_index is not None:
            raise PatchError(f"{self.method.method_name()}: attend_index says what attention reads, but it is asked behind attention")
        return kept.merged(retain).at(retain.cache_index, retain.ok)

    def _with_new(self, held: Layer, number: int, k: Tensor, v: Tensor) -> Entries:
        """What a group holds, and the entries of this scale."""
        start = held.n_seen - k.shape[2]
        old = held.entries[number]
        if old is not None:
            return old.followed_by(k, v, start)
        mass = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device) if self._needs.attention_mass else None
        # a layer that was released early starts anew in the middle of the sequence
        position = None if start == 0 else torch.arange(start, held.n_seen, device=k.device, dtype=torch.int32).expand(k.shape[:3])
        return Entries(k, v, position=position, mass=mass)

    def _answer(self, layer: int, group: HeadGroup, held: Layer, every: Entries, queries: Tensor) -> Retain | None:
        """What the method keeps of a group; None where the group fits its budget, at which the method may only look."""
        is_full = len(every) > group.budget
        if not is_full and not self._needs.every_step:
            return None
        queries, position = self._of_heads(queries, group.heads), every.positions()
        ctx = CompressionContext(
            layer=layer, step=self.scale, q=queries, k=every.k, v=every.v, scale=self.softmax_scale, position=position, valid=every.validity(),
            q_position=torch.arange(held.n_seen - queries.shape[2], held.n_seen, device=queries.device).expand(queries.shape[0], -1),
            attention_mass=every.mass, scale_shapes=self.schedule.sizes, entry_scale=self._scales(position), has_guidance_pairs=self.is_guided,
            state=held.state, shared=self._shared,
        )  # fmt: skip
        # under autocast the products of a method's scores would lose the digits that tell entries apart
        with torch.autocast(queries.device.type, enabled=False):
            if not is_full:
                self.method.observe(ctx, group)
                return None
            retain = self.method.select(ctx, group)
        check_answer(retain, group, every, self.method.method_name())
        return retain

    def _groups(self, layer: int, held: Layer, *, n_heads: int) -> list[HeadGroup]:
        """The layer's groups at this scale, without empty ones."""
        name = self.method.method_name()
        found = self.method.groups(self.info, layer, step=self.scale, n_entries=held.n_seen, shared=self._shared)
        groups = [group for group in found if group.heads]
        heads = [group.heads for group in groups]
        if sorted(head for group in heads for head in group) != list(range(n_heads)):
            raise PatchError(f"{name}: the groups of layer {layer} must hold each of its {n_heads} heads once, got {heads}")
        if any(group.budget < 1 for group in groups):
            raise PatchError(f"{name}: a budget of layer {layer} is below one entry: {[group.budget for group in groups]}")
        if held.heads and held.heads != heads:
            raise PatchError(f"{name}: the groups of layer {layer} changed within a generation, from {held.heads} to {heads}")
        if not held.entries:
            held.heads, held.entries = heads, [None] * len(heads)
        return groups

    def _is_asked(self, moment: str) -> bool:
        """Whether the method is asked at this moment of this scale: before attention, where it can be, and then at no other."""
        moments = [when.moment for when in self.method.when]
        if moment != "before_attention" and "before_attention" in moments:
            return False
        return any(when.moment == moment and (moment != "every_n_steps" or (self.scale + 1) % (when.every or 1) == 0) for when in self.method.when)

    def _of_heads(self, t: Tensor, heads: tuple[int, ...]) -> Tensor:
        """(b, H, …) -> (b, heads, …), without a copy where they are neighbours."""
        first = heads[0]
        if heads == tuple(range(first, first + len(heads))):
            return t[:, first : first + len(heads)]
        key = (heads, t.device)
        if key not in self._indexes:
            # made once: a list would be sent to the device at every layer of every scale
            self._indexes[key] = torch.tensor(heads, device=t.device)
        return t.index_select(1, self._indexes[key])

    def _scales(self, position: Tensor) -> Tensor:
        """The scale of each position."""
        if position.device not in self._scale_of:
            self._scale_of[position.device] = self.schedule.scale_of_tokens(position.device)
        return self._scale_of[position.device][position]

    def _count_bytes(self) -> None:
        self.counters().add_bytes(self.scale, self.cache_bytes())


def _tensors(held: Layer) -> Iterator[Tensor]:
    for entries in held.entries:
        yield from () if entries is None else entries.tensors()
    yield from (value for value in held.state.values() if isinstance(value, Tensor))


def _mass_of_kept(mass: Tensor, retain: Retain | None, received: Tensor) -> Tensor:
    """The mass of the entries that stay, with what those that attention read have received now. mass: of all; received: of those read."""
    if retain is None:
        return mass + received
    read = retain.cache_index if retain.attend_index is None else retain.attend_index
    return mass.scatter_add(2, read, received).gather(2, retain.cache_index)
