"""The mark on an attention module whose cache layer is compressed, and what runs there: attention over what is left, and the method behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accel.errors import PatchError, UnsupportedError
from accel.kernels.head_grouped import KVGroup, grouped_attention
from accel.kernels.probe import mean_attention
from accel.patches.hosts.entries import Entries, check_answer
from accel.patches.hosts.transformers.applicability import why_dense
from accel.patches.hosts.transformers.kv.layer import CompressedLayer
from accel.patches.hosts.transformers.masks import LazyMask
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, KVCompression, ModelInfo, Retain

if TYPE_CHECKING:
    from accel.handle import Handle
    from accel.stats import CacheStats

KV_SLOT = "_accel_kv"
NOT_CAUSAL = "mask is not plain causal"
EVICTED = "entries were evicted per head"


@dataclass
class Runtime:
    """One method in one model. handle: kept alive by the model, whoever throws it away. first: the first layer that is compressed."""

    method: KVCompression
    info: ModelInfo
    handle: Handle
    first: int | None = None
    is_on: bool = True
    _local: threading.local = field(default_factory=threading.local)

    @property
    def pass_text(self) -> Tensor | None:
        """(B, L) bool: which tokens of the pass that this thread is in are text; None in a model without pictures, and decoding."""
        found: Tensor | None = getattr(self._local, "text", None)
        return found

    @pass_text.setter
    def pass_text(self, is_text: Tensor | None) -> None:
        self._local.text = is_text

    @property
    def stats(self) -> CacheStats:
        """Looked up at every call: `stats.reset()` starts new counters."""
        return self.handle.stats.cache

    def count_beside(self, layer: int) -> None:
        """Counts a call that a sparse method beside this one could not plan."""
        if any(m.kind == "sparse_attention" for m in self.handle.methods):
            self.handle.stats.layer(layer).dense_calls[EVICTED] += 1


class KVSlot:
    """On an attention module. Copies of the model get one without a runtime, hence run as they did before."""

    def __init__(self, runtime: Runtime | None, layer: int = -1) -> None:
        self.runtime, self.layer = runtime, layer
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVSlot:
        return KVSlot(None)

    def __reduce__(self) -> tuple[type[KVSlot], tuple[None]]:
        return KVSlot, (None,)

    @property
    def cache_layer(self) -> CompressedLayer | None:
        """The cache layer of the call that this thread is in; None outside one, and where the call has no cache."""
        found: CompressedLayer | None = getattr(self._local, "layer", None)
        return found

    def bind(self, cache_layer: CompressedLayer | None, shared: dict[str, Any] | None) -> None:
        """Names the cache layer of the call that begins, or with None that it has ended."""
        if (old := self.cache_layer) is not None:
            old.is_expected = False
        self._local.layer, self._local.shared = cache_layer, shared
        if cache_layer is not None:
            cache_layer.is_expected = True

    def attend(
        self, dense: Callable[[], tuple[Tensor, Tensor | None]], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any,
        scaling: float | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention of one layer. `dense` runs what would run without this method, on everything. q (B, Hq, L, D), k and v (B, Hkv, n, D)."""
        layer = self.cache_layer
        if self.runtime is None or layer is None:
            return dense()
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        call = KVCall(self.runtime, self.layer, layer, self._local.shared, q, k, v, scale, kwargs.get("softcap"))
        if layer.is_compressed:
            self.runtime.count_beside(self.layer)
            return call.read_groups(module, mask, kwargs), None
        found = dense()
        call.behind_whole(module, mask, kwargs)
        return found


@dataclass
class KVCall:
    """One attention call of a layer whose cache a method compresses."""

    runtime: Runtime
    number: int
    layer: CompressedLayer
    shared: dict[str, Any]
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    needs: CacheNeeds = field(init=False)
    queries: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.needs = self.runtime.method.needs()

    # --- a layer that is whole ------------------------------------------------------------------------------------------------

    def behind_whole(self, module: nn.Module, mask: Any, kwargs: dict[str, Any]) -> None:
        """Behind attention over everything: what the method has seen, and perhaps its first eviction."""
        layer, stats = self.layer, self.runtime.stats
        reason = why_dense(module, self.q, self.k, self.v, mask, kwargs)
        if reason is not None and not (reason == NOT_CAUSAL and isinstance(mask, LazyMask)):
            stats.skipped[reason] += 1
            return
        n_entries = layer.n_entries
        valid = mask.valid_keys(n_entries) if isinstance(mask, LazyMask) else None
        if valid is not None:
            # masks are built on one device, layers may lie on others
            valid = valid.to(self.k.device)
        with torch.no_grad():
            length = self.q.shape[2]
            self._note(layer.whole_index(len(self.k))[:, -length:], None if valid is None else valid[:, -length:])
            if self.needs.attention_mass:
                received = _over_group(self._received(valid), self.k.shape[1])
                # entries that came in passes the method did not see have got nothing so far
                layer.mass = received if layer.mass is None else received + nn.functional.pad(layer.mass, (0, n_entries - layer.mass.shape[2]))
            if self._is_asked():
                self._first_eviction(valid)
        stats.add_layer(self.number, held=layer.held_bytes(), whole=self._whole_bytes())

    def _received(self, valid: Tensor | None) -> Tensor:
        """(B, Hq, N) fp32: the attention that each entry receives from the queries of this pass together. valid: (B, N) bool."""
        length = self.q.shape[2]
        # rows on padding are not in the mean
        n_rows: int | Tensor = length if valid is None else valid[:, -length:].sum(1)[:, None, None]
        return mean_attention(self.q, self.k, scale=self.scale, is_causal=True, key_mask=valid, softcap=self.softcap) * n_rows

    def _first_eviction(self, valid: Tensor | None) -> None:
        layer = self.layer
        groups = self._groups()
        if all(group.budget >= layer.n_entries for group in groups) and not self.needs.every_step:
            return
        numbers = layer.whole_index(len(self.k))
        is_there = numbers >= 0 if layer.has_holes else None
        if valid is not None:
            is_there = valid if is_there is None else valid & is_there
        found, has_dropped = [], False
        for group in groups:
            heads = list(group.heads)
            shape = (len(self.k), len(heads), layer.n_entries)
            mass = None if layer.mass is None else layer.mass[:, heads]
            entries = Entries(
                self.k[:, heads], self.v[:, heads], position=numbers[:, None].expand(shape).int(),
                valid=None if is_there is None else is_there[:, None].expand(shape), mass=mass,
            )  # fmt: skip
            kept = self._evicted(group, entries)
            has_dropped |= kept is not None
            found.append(entries if kept is None else kept)
        if has_dropped:
            layer.compress([group.heads for group in groups], [entries.owned() for entries in found])

    # --- a layer that has lost entries ----------------------------------------------------------------------------------------

    def read_groups(self, module: nn.Module, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Attention over what is left and the new tokens, causal among themselves: (B, L, Hq, D). Then perhaps another eviction."""
        layer, n_new = self.layer, self.q.shape[2]
        self._refuse(module, mask, kwargs)
        numbers, has_holes = layer.take()
        valid = _new_valid(mask, numbers, has_holes=has_holes)
        each = self.q.shape[1] // self.k.shape[1]
        groups = [
            entries.followed_by(self.k[:, list(heads)], self.v[:, list(heads)], numbers, valid)
            for heads, entries in zip(layer.heads, layer.groups, strict=True)
        ]
        seen = [self._seen(entries, mask) for entries in groups]
        if all(entries.valid is None for entries in seen):
            parts = [KVGroup(heads, entries.k, entries.v) for heads, entries in zip(layer.heads, seen, strict=True)]
            out = grouped_attention(self.q, parts, scale=self.scale, softcap=self.softcap, n_causal=n_new)
        else:
            out = torch.empty_like(self.q)
            for heads, entries in zip(layer.heads, seen, strict=True):
                own = _query_heads(heads, each, self.q.device)
                out[:, own] = entries.attention(self.q[:, own], self.scale, softcap=self.softcap, n_causal=n_new)
        if self.needs.attention_mass:
            received = [self._given_to(entries, heads, valid) for heads, entries in zip(layer.heads, seen, strict=True)]
            # another method may have dropped the others, without a look at what these received
            groups = [replace(old, mass=new if old.mass is None else old.mass + new) for old, new in zip(groups, received, strict=True)]
        layer.groups = groups
        self._note(numbers, valid)
        if self._is_asked():
            self._evict_again()
        self.runtime.stats.add_layer(self.number, held=layer.held_bytes(), whole=self._whole_bytes())
        return out.transpose(1, 2)

    def _evict_again(self) -> None:
        layer = self.layer
        found = list(zip(self._groups(), layer.groups, strict=True))
        kept = [self._evicted(group, entries) for group, entries in found]
        if any(entries is not None for entries in kept):
            layer.compress(layer.heads, [(old if new is None else new).owned() for new, (_, old) in zip(kept, found, strict=True)])

    def _seen(self, entries: Entries, mask: Any) -> Entries:
        """The entries without those that the mask of this pass hides, though an earlier one did not."""
        # where visual tokens are gone a mask is about those that are left
        known = mask.valid_keys(self.layer.seen) if isinstance(mask, LazyMask) and not self.layer.is_pruned else None
        if known is None:
            return entries
        places = entries.positions()
        shown = known.to(places.device)[:, None].expand(*places.shape[:2], -1).gather(2, places)
        return replace(entries, valid=shown & entries.validity())

    def _given_to(self, entries: Entries, heads: Sequence[int], valid: Tensor | None) -> Tensor:
        """(B, H, N) fp32: the attention that entries of these KV heads receive. valid: (B, L) bool, which of the new tokens are there."""
        q = self.q[:, _query_heads(heads, self.q.shape[1] // self.k.shape[1], self.q.device)]
        if valid is not None:
            # what is no number gives no attention where entries are masked, and padding among the new ones is
            q = q.masked_fill(~valid[:, None, :, None], torch.nan)
        return entries.received(q, self.scale, softcap=self.softcap, n_causal=q.shape[2])

    def _refuse(self, module: nn.Module, mask: Any, kwargs: dict[str, Any]) -> None:
        """Raises where attention over what is left would not be what the call asks for."""
        reasons = []
        # of the new tokens alone, without a mask: what a whole layer's attention would be denied for
        if (reason := why_dense(module, self.q, self.k, self.v, None, kwargs)) is not None:
            reasons.append(reason)
        if mask is not None and not isinstance(mask, LazyMask):
            reasons.append("a mask was given explicitly, over entries of which some are gone")
        elif isinstance(mask, LazyMask):
            n_new, n_before = self.q.shape[2], self.layer.seen - self.q.shape[2]
            if not mask.is_plain_causal and n_new > 1:
                reasons.append("several new tokens with a mask that is not plain causal")
            # where visual tokens are gone the mask counts those that are left
            if not self.layer.is_pruned and isinstance(mask.q_offset, int) and mask.q_offset != n_before:
                reasons.append(f"it has seen {n_before} tokens and the first layer {mask.q_offset}: a pass was broken off; begin a new cache")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v)):
            reasons.append("gradients are asked for, and what was dropped would have none; call the model under torch.no_grad()")
        if reasons:
            raise UnsupportedError(f"layer {self.number} has lost cache entries to {self.runtime.method.method_name()}", reasons)

    # --- the method -----------------------------------------------------------------------------------------------------------

    def _note(self, numbers: Tensor, valid: Tensor | None) -> None:
        """Counts the pass, and keeps its newest queries where the method will want to see them.

        numbers: (B, L) of its tokens. valid: (B, L) bool, which of them are there; None where all are.
        """
        layer, length, wanted = self.layer, self.q.shape[2], self.needs.n_queries
        if length > 1 or layer.n_prompt == 0:
            layer.n_prompt, layer.n_steps = layer.n_taken, 0
        else:
            layer.n_steps += 1
        # padding sees no entry, hence has no say
        queries, query_numbers = self.q.detach(), numbers if valid is None else numbers.masked_fill(~valid, -1)
        if 0 < length < wanted and layer.queries is not None and layer.query_numbers is not None:
            queries, query_numbers = torch.cat([layer.queries, queries], 2), torch.cat([layer.query_numbers, query_numbers], 1)
        if valid is not None and wanted:
            queries, query_numbers = _padding_first(queries, query_numbers, wanted)
        self.queries = queries[:, :, -wanted:], query_numbers[:, -wanted:]
        # a pass that brings enough of its own needs none of those before, and the next one brings none of it
        layer.queries, layer.query_numbers = (t.clone() for t in self.queries) if length < wanted else (None, None)

    def _is_asked(self) -> bool:
        """Whether the method is asked behind this pass."""
        is_prompt = self.layer.n_steps == 0
        for when in self.runtime.method.when:
            if when.moment == "after_prefill" and is_prompt:
                return True
            if when.moment == "every_n_steps" and not is_prompt and self.layer.n_steps % (when.every or 1) == 0:
                return True
        return False

    def _groups(self) -> list[HeadGroup]:
        layer, method = self.layer, self.runtime.method
        found = method.groups(self.runtime.info, self.number, step=layer.n_steps, n_entries=layer.n_prompt, shared=self.shared)
        groups = [group for group in found if group.heads]
        name, n_heads = method.method_name(), self.k.shape[1]
        if sorted(head for group in groups for head in group.heads) != list(range(n_heads)):
            raise PatchError(f"{name}: the groups of layer {self.number} must hold each of its {n_heads} KV heads once, got {groups}")
        if any(group.budget < 1 for group in groups):
            raise PatchError(f"{name}: a budget of layer {self.number} is below one entry: {[group.budget for group in groups]}")
        if layer.heads and layer.heads != [group.heads for group in groups]:
            raise PatchError(f"{name}: the groups of layer {self.number} changed within a request")
        return groups

    def _evicted(self, group: HeadGroup, entries: Entries) -> Entries | None:
        """What the method keeps of a group; None where it fits."""
        is_full = len(entries) > group.budget
        if not is_full and not self.needs.every_step:
            return None
        ctx = self._context(group, entries)
        with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
            if not is_full:
                self.runtime.method.observe(ctx, group)
                return None
            retain: Retain = self.runtime.method.select(ctx, group)
        name = self.runtime.method.method_name()
        check_answer(retain, group, entries, name)
        if retain.attend_index is not None:
            raise PatchError(f"{name}: attend_index says what attention reads, but it is asked behind attention")
        return entries.merged(retain).at(retain.cache_index, retain.ok)

    def _context(self, group: HeadGroup, entries: Entries) -> CompressionContext:
        assert self.queries is not None     # `_note` has set them
        queries, numbers = self.queries
        own = _query_heads(group.heads, queries.shape[1] // self.k.shape[1], queries.device)
        return CompressionContext(
            layer=self.number, step=self.layer.n_steps, q=queries[:, own], k=entries.k, v=entries.v, scale=self.scale, position=entries.positions(),
            valid=entries.validity(), q_position=numbers, softcap=self.softcap, attention_mass=entries.mass, protected=self.layer.protected,
            state=self.layer.state, shared=self.shared,
        )  # fmt: skip

    def _whole_bytes(self) -> int:
        """What keys and values of all tokens so far would take."""
        return 2 * self.k.shape[0] * self.k.shape[1] * self.layer.n_taken * self.k.shape[3] * self.k.element_size()


def _query_heads(heads: Sequence[int], each: int, device: torch.device) -> Tensor:
    """The query heads that read these KV heads."""
    return torch.tensor([head * each + i for head in heads for i in range(each)], device=device)


def _over_group(received: Tensor, n_kv_heads: int) -> Tensor:
    """(B, Hq, N) -> (B, Hkv, N): summed over the query heads of each KV head."""
    batch, n_heads, n = received.shape
    return received.view(batch, n_kv_heads, n_heads // n_kv_heads, n).sum(2)


def _padding_first(queries: Tensor, numbers: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The newest n of each row that are there, behind as much padding as a row lacks. queries: (B, Hq, L, D); numbers: (B, L), −1 for padding."""
    order = (numbers >= 0).int().argsort(dim=1, stable=True)[:, -n:]
    places = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, places), numbers.gather(1, order)


def _new_valid(mask: Any, numbers: Tensor, *, has_holes: bool) -> Tensor | None:
    """(B, L) bool: which of the new tokens are there; None where all are. numbers: (B, L), −1 for holes."""
    found = numbers >= 0 if has_holes else None
    padding = mask.new_padding(numbers.shape[1]) if isinstance(mask, LazyMask) else None
    if padding is None:
        return found
    padding = padding.to(numbers.device)
    return padding if found is None else found & padding
