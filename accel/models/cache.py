"""The keys and values of a next-scale generation, and the one place where its self-attention happens.

**The seam.** Every self-attention layer ends in `cache.attend(layer, q, k, v)`, at every scale and also in a teacher-forced pass. The model asks
`model.new_cache(schedule, teacher_forced=False)` once per generation and keeps the result in a local variable, so no state lives on modules and
two generations may be interleaved. A host (cache compression, statistics) replaces `new_cache` on the model and returns its own `ScaleCache`:

- override `update` to return fewer entries, which may differ from head to head as long as their count does not; or
- override `attend` where counts differ too (two groups of heads, two attention calls); it sees q before attention, so it can score with it.

q arrives normalised, temperature applied and rotated; keys are stored as they were rotated, so dropping entries needs no new rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import OptionError, PatchError


@dataclass(frozen=True)
class Schedule:
    """The token maps of an image, coarse to fine, as (height, width) pairs. Scales are counted from 0."""

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise OptionError(f"a schedule is a non-empty list of (height, width) pairs, each at least 1, got {self.sizes!r}")

    @classmethod
    def of(cls, sizes: Schedule | Sequence[int | Sequence[int]]) -> Schedule:
        """A schedule from side lengths (square maps) or (height, width) pairs."""
        if isinstance(sizes, Schedule):
            return sizes
        try:
            pairs = tuple(_pair(size) for size in sizes)
        # the published code of Infinity writes (frames, height, width), of which the first two must not pass for height and width
        except (TypeError, ValueError) as error:
            raise OptionError(f"a schedule is a list of side lengths or (height, width) pairs, whole numbers, got {sizes!r}") from error
        return cls(pairs)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """n_k: tokens of each scale."""
        return tuple(h * w for h, w in self.sizes)

    @property
    def total(self) -> int:
        """T_K: tokens of all scales."""
        return sum(self.tokens)

    @property
    def last(self) -> int:
        """Index of the finest scale."""
        return len(self.sizes) - 1

    def span(self, scale: int) -> tuple[int, int]:
        """First position of a scale, and the first after it."""
        start = sum(self.tokens[:scale])
        return start, start + self.tokens[scale]

    def scale_of_tokens(self, device: torch.device | str | None = None) -> Tensor:
        """(T_K,) int64: the scale each position belongs to."""
        counts = torch.tensor(self.tokens, device=device)
        return torch.repeat_interleave(torch.arange(len(self), device=device), counts)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return index(height), index(width)


class ScaleCache:
    """Keys and values of one generation, per layer, in the dtype that attention computes in.

    k, v, q: (b, H, tokens, d). Memory for all scales but the last is taken once per layer; the last scale is never stored, because nothing reads
    it later, and a layer's memory goes back as soon as it has attended at the last scale.
    """

    # queries carry a learned temperature and both sides are normalised: the product needs no 1/√d
    softmax_scale = 1.0

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.scale = -1
        self._held: dict[int, tuple[Tensor, Tensor, int]] = {}

    @property
    def is_last_scale(self) -> bool:
        """Whether the scale being generated is the finest."""
        return self.scale == self.schedule.last

    def begin(self, scale: int) -> None:
        """Called by the model before the first layer of every scale."""
        if scale != self.scale + 1 or scale > self.schedule.last:
            raise PatchError(f"scale {scale} was begun after scale {self.scale} of {len(self.schedule)}; a cache serves one generation, in order")
        self.scale = scale

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes the new entries of a layer and returns those to attend to: k, v, and a mask (True = visible) or None where all are visible.

        There is no mask here: within a scale attention is bidirectional, and later scales do not exist yet. `query` is for hosts that score.
        """
        if self.scale < 0:
            raise PatchError("no scale was begun; this cache serves generation, scale by scale, not a teacher-forced pass")
        stored_k, stored_v, filled = self._held.get(layer, (None, None, 0))
        if filled != self.schedule.span(self.scale)[0]:
            raise PatchError(f"layer {layer} holds {filled} of the {self.schedule.span(self.scale)[0]} tokens that come before scale {self.scale}")
        if self.is_last_scale:
            if stored_k is not None and stored_v is not None:
                k, v = torch.cat([stored_k[:, :, :filled], k], 2), torch.cat([stored_v[:, :, :filled], v], 2)
            self.release(layer)
            return k, v, None
        if stored_k is None or stored_v is None:
            capacity = self.schedule.span(self.schedule.last)[0]
            stored_k, stored_v = (t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (k, v))
        end = filled + k.shape[2]
        stored_k[:, :, filled:end], stored_v[:, :, filled:end] = k, v
        self._held[layer] = (stored_k, stored_v, end)
        return stored_k[:, :, :end], stored_v[:, :, :end], None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of one layer at the current scale: (b, H, n_k, d)."""
        k, v, mask = self.update(layer, k, v, query=q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Scale index and position in the whole sequence of the entries a layer holds, each (T,) int64; hosts may return (b, H, T)."""
        held = self._held[layer][2] if layer in self._held else 0
        return self.schedule.scale_of_tokens("cpu")[:held], torch.arange(held, device="cpu")

    def cache_bytes(self) -> int:
        """Bytes of the memory taken for keys and values now, filled or not yet."""
        return sum(t.untyped_storage().nbytes() for k, v, _ in self._held.values() for t in (k, v))

    def release(self, layer: int | None = None) -> None:
        """Gives back the memory of one layer, or of all."""
        if layer is None:
            self._held.clear()
        else:
            self._held.pop(layer, None)


class TeacherForced(ScaleCache):
    """All scales at once under the block mask: a token sees its own scale and the coarser ones. Stores nothing."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._masks: dict[torch.device, Tensor] = {}

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k and v as they are, with the (T_K, T_K) block mask."""
        if k.device not in self._masks:
            scale = self.schedule.scale_of_tokens(k.device)
            self._masks[k.device] = scale[None, :] <= scale[:, None]
        return k, v, self._masks[k.device]
