"""Cache layers that hold fewer tokens than the sequence has, and know which (transformers-integration.md §2.2).

They report logical lengths, those of the whole sequence, so that everything that `generate` derives from them stays right: positions,
slices of the prompt, masks. Beside the keys stands the logical number of each entry, −1 for holes that nobody may see.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from accel.errors import UnsupportedError


class Survivors:
    """The tokens of one forward pass that reach a layer; layers between two cuts share the object.

    index: (B, m) int64, logical numbers, −1 for holes; advance: tokens of the whole pass. number: unlike that of any other.
    """

    _numbers = itertools.count()

    def __init__(self, index: Tensor, advance: int, *, has_holes: bool) -> None:
        self.index, self.advance, self.has_holes = index, advance, has_holes
        self.number = next(self._numbers)
        self._elsewhere: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if self.index.device == device:
            return self.index
        if device not in self._elsewhere:
            self._elsewhere[device] = self.index.to(device)
        return self._elsewhere[device]


class _Armed:
    """A pruned cache is right only under the hooks that shorten its masks: they announce every update.

    history: numbers of the survivors it took in; layers with equal ones hold the same tokens.
    """

    coming: Survivors | None = None
    is_announced = is_pruned = has_holes = False
    history: tuple[int, ...] = ()
    n_gone: Tensor | None = None        # (B,) int64, tokens that compact positions skip; on the first layer only

    def announce(self, survivors: Survivors | None) -> None:
        """What the next update brings; None for tokens that all stay."""
        self.coming, self.is_announced = survivors, True

    def _received(self) -> Survivors | None:
        if self.is_pruned and not self.is_announced:
            raise UnsupportedError("this cache was filled while visual tokens were pruned, and the model that goes on with it is not patched now")
        coming, self.coming, self.is_announced = self.coming, None, False
        if coming is not None:
            self.is_pruned = True
            self.has_holes |= coming.has_holes
            self.history = (*self.history, coming.number)
        return coming

    def _forget_all(self) -> None:
        self.is_pruned = self.has_holes = False
        self.history, self.n_gone = (), None


class LogicalLayer(_Armed, DynamicLayer):   # type: ignore[misc]
    """A growing layer. `index` numbers its first entries; those behind are the newest of the sequence, all of them, and need no list."""

    def __init__(self, stock: DynamicLayer) -> None:
        super().__init__()
        self.window: int | None = getattr(stock, "sliding_window", None)
        self.is_sliding = self.window is not None
        self.record_past = bool(getattr(stock, "record_past", False))
        self.seen: int = stock.get_seq_length()
        self.index: Tensor | None = None
        if stock.is_initialized:
            self.device, self.is_initialized = stock.device, True
            self.keys, self.values = stock.keys, stock.values

    @property
    def n_entries(self) -> int:
        # a stock layer that nothing was written to holds a tensor of one dimension
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None and self.keys.dim() == 4 else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        coming = self._received()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        if coming is not None:
            self.index = torch.cat([self.whole_index(key_states.shape[0]), coming.on(self.device)], 1)
        self.seen += key_states.shape[-2] if coming is None else coming.advance
        keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = keys, values
        if self.window is not None and not self.record_past:
            self._forget(self.window - 1)
        return keys, values

    def _forget(self, n: int) -> None:
        """Leaves the newest n entries: tokens of a window are among the newest survivors."""
        n_gone = self.n_entries - n
        if n_gone > 0:
            if self.index is not None:
                self.index = self.index[:, n_gone:]
            self.keys, self.values = self.keys[:, :, n_gone:], self.values[:, :, n_gone:]

    @property
    def n_tail(self) -> int:
        """Entries behind those that `index` numbers."""
        return self.n_entries - (0 if self.index is None else self.index.shape[1])

    def whole_index(self, batch: int) -> Tensor:
        """(B, entries) int64: the logical number of every entry, −1 for holes."""
        tail = torch.arange(self.seen - self.n_tail, self.seen, device=self.device).expand(batch, -1)
        return tail if self.index is None else torch.cat([self.index, tail], 1)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        # older releases pass the length that is to be left
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        n = min(n, self.seen)
        if self.is_initialized and n:
            n_entries = self.n_entries - n
            if self.index is not None and n > self.n_tail:
                self.index, n_entries = _before(self.whole_index(len(self.index)), self.seen - n)
                self.has_holes |= bool((self.index < 0).any())
            self.keys, self.values = self.keys[:, :, :n_entries], self.values[:, :, :n_entries]
            self.seen -= n
        if self.window is not None and self.is_initialized:
            self._forget(self.window - 1)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.keys = self.values = self.index = None
        self.is_initialized, self.seen = False, 0
        self._forget_all()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices.to(t.device)])

    def _rows(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.index, self.n_gone = (None if t is None else change(t) for t in (self.index, self.n_gone))


class StaticLogicalLayer(_Armed, StaticLayer):      # type: ignore[misc]
    """A layer of fixed size. index: (B, max_cache_len) int64, −1 for holes and for what is not written yet; `seen` counts the whole sequence."""

    is_sliding = False

    def __init__(self, stock: StaticLayer, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.seen = torch.zeros((), dtype=torch.int64, device="cpu")
        self.index: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.seen = self.seen.to(self.device)
        self.index = torch.full((key_states.shape[0], self.max_cache_len), -1, dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.seen)
            torch._dynamo.mark_static_address(self.index)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        coming = self._received()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.index is not None
        n = key_states.shape[-2]
        rows = torch.arange(n, device=self.device)
        numbers = (self.seen + rows).expand(self.index.shape[0], -1) if coming is None else coming.on(self.device)
        self.index.index_copy_(1, self.cumulative_length + rows, numbers.expand(self.index.shape[0], -1))
        self.seen.add_(n if coming is None else coming.advance)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return found

    def get_seq_length(self) -> Tensor:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen.zero_()
        self._forget_all()
        if self.index is not None:
            self.index.fill_(-1)

    def crop(self, tokens_to_remove: int) -> None:
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, int(self.seen) - tokens_to_remove)
        if self.index is None or not n:
            return
        left = max(0, int(self.seen) - n)
        _, n_entries = _before(self.index[:, : int(self.cumulative_length)], left)
        self.index.masked_fill_(self.index >= left, -1)
        self.index[:, n_entries:] = -1
        self.cumulative_length.fill_(n_entries)
        self.seen.fill_(left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.index is not None:
            self.index.copy_(self.index.index_select(0, beam_idx.to(self.index.device)))
        if self.n_gone is not None:
            self.n_gone = self.n_gone.index_select(0, beam_idx.to(self.n_gone.device))


def _before(index: Tensor, seen: int) -> tuple[Tensor, int]:
    """The entries of `index` (B, n) with numbers below `seen`, cut behind the last of any sequence, and how many are left; the others are holes."""
    is_left = (index >= 0) & (index < seen)
    places = torch.arange(1, index.shape[1] + 1, device=index.device)
    n = int((is_left * places).max()) if index.numel() else 0
    return index.masked_fill(~is_left, -1)[:, :n], n


_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def why_unsupported(cache: Any) -> str | None:
    """Why tokens cannot be dropped on this cache, or None."""
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    strangers = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _SUPPORTED and not isinstance(layer, _Armed)})
    return f"a cache with layers of type {', '.join(strangers)}" if strangers else None


def logical_layer(cache: Any, layer: int) -> LogicalLayer | StaticLogicalLayer:
    """The cache's layer as one of ours; a stock layer is replaced, its entries taken over."""
    while len(cache.layers) <= layer:
        cache.layers.append((getattr(cache, "layer_class_to_replicate", None) or DynamicLayer)())
    stock = cache.layers[layer]
    if isinstance(stock, (LogicalLayer, StaticLogicalLayer)):
        return stock
    if isinstance(stock, StaticLayer):
        if stock.is_initialized and bool(stock.cumulative_length > 0):
            raise UnsupportedError("a static cache that holds tokens already cannot take a pruned prompt; use the dynamic cache for further turns")
        longest = max(found.max_cache_len for found in cache.layers if isinstance(found, StaticLayer))
        ours: LogicalLayer | StaticLogicalLayer = StaticLogicalLayer(stock, longest)
    else:
        ours = LogicalLayer(stock)
    cache.layers[layer] = ours
    return ours
