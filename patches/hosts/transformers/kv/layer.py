"""A growing cache layer whose head groups come to hold different numbers of entries, and which reports the length of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches.hosts.bound import outside_graph
from accel.patches.hosts.entries import Entries
from accel.patches.hosts.transformers.pruning.cache import LogicalLayer

_UNDONE = "this cache was compressed, and the model that goes on with it is not patched now, or paused"
_CROP = (
    "a compressed cache cannot be cut back to before its last eviction, which took other entries; assisted decoding and prompt lookup need that: "
    "generate without them, or pause the handle"
)


class CompressedLayer(LogicalLayer):
    """Whole, as any growing layer, until entries are dropped; from then on `groups` holds what is left, and `update` gives back what is new.

    heads: of each group, which never change. groups: what they hold; empty while the layer is whole. state: the method's own.
    queries, query_numbers: (B, Hq, n, D), the newest ones, post-RoPE, and (B, n), their numbers. mass: (B, Hkv, entries) fp32, attention received
    while the layer is whole, or None. protected: (B, tokens) bool, by number, text beside visual tokens; None where nobody told.
    n_taken: tokens that reached the layer so far, seen by the method or not; n_prompt: those up to the last pass of several; n_steps: passes of one
    token since; n_since: tokens since the last eviction. is_counted: whether the counters know of this cache.
    """

    def __init__(self, stock: Any) -> None:
        if isinstance(stock, LogicalLayer):
            # visual tokens were dropped in front of this layer: its numbers stay
            self.__dict__.update(stock.__dict__)
        else:
            super().__init__(stock)
        self.heads: list[tuple[int, ...]] = []
        self.groups: list[Entries] = []
        self.state: dict[str, Any] = {}
        self.queries: Tensor | None = None
        self.query_numbers: Tensor | None = None
        self.mass: Tensor | None = None
        self.protected: Tensor | None = None
        self.n_taken = self.n_entries
        self.n_prompt = self.n_steps = self.n_since = 0
        self.is_expected = self.is_counted = False
        self._new: tuple[Tensor, bool] | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether entries were dropped, so that only our attention can read what is left."""
        return bool(self.groups)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens. The whole layer's keys and values, or of a compressed one the new ones, for `take` to join."""
        # a compiler would make a new graph for every length and every count below
        found: tuple[Tensor, Tensor] = outside_graph(self._update, key_states, value_states)
        return found

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_compressed:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            self.n_taken += key_states.shape[-2]
            return found
        if not self.is_expected:
            raise UnsupportedError(_UNDONE)
        # once for each announced call, also where an interrupt keeps its end from being told
        self.is_expected = False
        coming, n = self._received(), key_states.shape[-2]
        if coming is None:
            self._new = torch.arange(self.seen, self.seen + n, device=key_states.device).expand(len(key_states), -1), False
        else:
            self._new = coming.on(key_states.device), coming.has_holes
        self.seen += n if coming is None else coming.advance
        self.n_since += n if coming is None else coming.advance
        self.n_taken += n
        return key_states, value_states

    def take(self) -> tuple[Tensor, bool]:
        """(B, L) int64, the numbers of the tokens that the last update brought, and whether some are −1, holes."""
        new, self._new = self._new, None
        if new is None:
            raise UnsupportedError("the attention of this layer was called without an update of its cache")
        return new

    def spare(self, is_text: Tensor) -> None:
        """Notes which of the tokens of the coming pass (B, L) are text; tokens that nobody told of count as text."""
        known = is_text.new_ones(len(is_text), 0) if self.protected is None or len(self.protected) != len(is_text) else self.protected
        missing = is_text.new_ones(len(is_text), max(0, self.seen - known.shape[1]))
        self.protected = torch.cat([known[:, : self.seen], missing, is_text], 1)

    def compress(self, heads: list[tuple[int, ...]], groups: list[Entries]) -> None:
        """Holds only these entries from now on."""
        self.heads, self.groups = heads, groups
        self.n_since = 0
        if self.is_initialized and self.keys is not None:
            # the memory of everything that was dropped goes back with these
            self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.index = self.mass = None

    # --- what transformers asks of a cache layer -------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens. UnsupportedError for more than came since the last eviction."""
        n = min(-tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove), self.seen)
        if not self.is_compressed:
            n_entries = self.n_entries
            super().crop(tokens_to_remove)
            self._forget_newest(n_entries - self.n_entries, n_steps=n)
            return
        if n > self.n_since:
            raise UnsupportedError(_CROP)
        n_entries = len(self.groups[0])
        self.seen, self.n_since = self.seen - n, self.n_since - n
        self.groups = [entries.before(self.seen) for entries in self.groups]
        self._forget_newest(n_entries - len(self.groups[0]), n_steps=n)

    def _forget_newest(self, n: int, *, n_steps: int) -> None:
        """What was recorded of the newest n entries and their queries goes with them."""
        self.n_taken -= n
        self.n_prompt, self.n_steps = min(self.n_prompt, self.n_taken), max(0, self.n_steps - n_steps)
        if self.mass is not None:
            self.mass = self.mass[:, :, : self.n_entries]
        if self.protected is not None:
            self.protected = self.protected[:, : self.seen]
        if self.queries is not None and self.query_numbers is not None:
            n_left = int((self.query_numbers < self.seen).all(0).sum())
            self.queries, self.query_numbers = (self.queries[:, :, :n_left], self.query_numbers[:, :n_left]) if n_left else (None, None)

    def reset(self) -> None:
        """Forgets everything, as a new cache."""
        super().reset()
        self.heads, self.groups, self.state = [], [], {}
        self.queries = self.query_numbers = self.mass = self.protected = self._new = None
        self.n_taken = self.n_prompt = self.n_steps = self.n_since = 0
        self.is_counted = False

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._rows(change)
        self.groups = [entries.rows(change) for entries in self.groups]
        for name in ("queries", "query_numbers", "mass", "protected"):
            if (found := getattr(self, name)) is not None:
                setattr(self, name, change(found))
        self.state = {name: change(value) if isinstance(value, Tensor) else value for name, value in self.state.items()}

    # --- accounts -------------------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory between two passes."""
        if self.is_compressed:
            for entries in self.groups:
                yield from entries.tensors()
        elif self.n_entries:
            yield from (self.keys, self.values)
        yield from (t for t in (self.index, self.queries, self.query_numbers, self.mass, self.protected) if t is not None)
        yield from (value for value in self.state.values() if isinstance(value, Tensor))

    def held_bytes(self) -> int:
        """Bytes of these tensors' memory, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())
