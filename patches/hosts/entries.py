"""The cache entries of one head group, for every host: b rows, H heads of the group, N entries, d channels, G query heads per head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import PatchError
from accel.protocols import HeadGroup, Merge, Retain

# of one chunk of the attention matrix while its columns are summed
MAX_MATRIX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Entries:
    """Keys and values with the place each has in the whole sequence.

    k, v: (b, H, N, d). position: (b, H, N) int32, or None while nothing was dropped and entry i stands at position i.
    valid: (b, H, N) bool, or None where all are. mass: (b, H, N) fp32, the attention received so far; None where nobody asks.
    """

    k: Tensor
    v: Tensor
    position: Tensor | None = None
    valid: Tensor | None = None
    mass: Tensor | None = None

    def __len__(self) -> int:
        return self.k.shape[2]

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [t for t in (self.k, self.v, self.position, self.valid, self.mass) if t is not None]

    def positions(self) -> Tensor:
        """(b, H, N) int64."""
        if self.position is None:
            return torch.arange(len(self), device=self.k.device).expand(self.k.shape[:3])
        return self.position.long()

    def validity(self) -> Tensor:
        """(b, H, N) bool."""
        return torch.ones(self.k.shape[:3], dtype=torch.bool, device=self.k.device) if self.valid is None else self.valid

    def followed_by(self, k: Tensor, v: Tensor, position: int | Tensor, valid: Tensor | None = None) -> Entries:
        """These entries and the new ones, which have received no attention yet.

        position: of the first new one, the others following it, or (b, n) of all. valid: (b, n) bool; None where all of them are.
        """

        def joined(old: Tensor | None, new: Tensor) -> Tensor | None:
            # (b, n) or (n,) -> (b, H, n)
            return None if old is None else torch.cat([old, (new[:, None] if new.dim() == 2 else new).expand(k.shape[:3])], 2)

        n_new = k.shape[2]
        new = torch.arange(position, position + n_new, device=k.device) if isinstance(position, int) else position.to(k.device)
        old_valid = self.validity() if self.valid is None and valid is not None else self.valid
        is_there = torch.ones(n_new, dtype=torch.bool, device=k.device) if valid is None else valid.to(k.device)
        return Entries(
            torch.cat([self.k, k], 2), torch.cat([self.v, v], 2), joined(self.position, new.int()), joined(old_valid, is_there),
            joined(self.mass, torch.zeros(n_new, dtype=torch.float32, device=k.device)),
        )  # fmt: skip

    def at(self, index: Tensor, ok: Tensor | None = None) -> Entries:
        """The entries at `index` (b, H, n); where `ok` is False an entry is padding. The others are gone once nobody holds the old tensors."""
        rows = index[..., None].expand(*index.shape, self.k.shape[3])
        valid = None if self.valid is None else self.valid.gather(2, index)
        if ok is not None:
            valid = ok if valid is None else valid & ok
        mass = None if self.mass is None else self.mass.gather(2, index)
        return Entries(self.k.gather(2, rows), self.v.gather(2, rows), self.positions().gather(2, index).int(), valid, mass)

    def owned(self) -> Entries:
        """The same entries in memory that holds nothing else: fresh keys and values are views of a larger projection."""

        def own(t: Tensor | None) -> Tensor | None:
            is_whole = t is None or t.untyped_storage().nbytes() == t.numel() * t.element_size()
            return t if t is None or is_whole else t.clone(memory_format=torch.contiguous_format)

        k, v = own(self.k), own(self.v)
        assert k is not None
        assert v is not None
        return Entries(k, v, own(self.position), own(self.valid), own(self.mass))

    def merged(self, retain: Retain) -> Entries:
        """The entries with the anchors of an answer's merge replaced by their weighted sums; all others bit for bit the same."""
        merge = retain.merge
        if merge is None:
            return self
        # a weight of 0 is padding and names nobody
        counts = merge.weight != 0
        named = torch.zeros(self.k.shape[:3], dtype=torch.float32, device=self.k.device).scatter_add(2, merge.anchor, counts.float())[..., None] > 0
        k, v = (_weighted(t, merge) for t in (self.k, self.v))
        k = F.normalize(k, dim=-1) if retain.renorm_keys else k
        return replace(self, k=torch.where(named, k.to(self.k.dtype), self.k), v=torch.where(named, v.to(self.v.dtype), self.v))

    def before(self, number: int) -> Entries:
        """Without the newest entries, those at positions from `number` on, which stand behind all others in every head."""
        n = int((self.positions() < number).sum(-1).amax()) if len(self) else 0

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, :, :n]

        return Entries(self.k[:, :, :n], self.v[:, :, :n], cut(self.position), cut(self.valid), cut(self.mass))

    def rows(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """With the rows of the batch chosen, repeated or reordered by `change`."""
        changed = (None if t is None else change(t) for t in (self.position, self.valid, self.mass))
        return Entries(change(self.k), change(self.v), *changed)

    def attention(self, q: Tensor, scale: float, *, softcap: float | None = None, n_causal: int = 0) -> Tensor:
        """Attention of q (b, H·G, n, d) to all valid entries: (b, H·G, n, d). A row without any gives 0.

        n_causal: the last entries, those of the last n_causal queries, are hidden from the queries before their own; 0 hides nothing.
        """
        mask, each = self._visible(q.shape[2], n_causal), q.shape[1] // self.k.shape[1]
        if softcap is None:
            # (b, H, …) -> (b, H·G, …): torch repeats keys and values for their query heads, but no mask
            own = mask if mask is None or each == 1 else mask.repeat_interleave(each, 1)
            out = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=own, scale=scale, enable_gqa=each != 1)
            return out if own is None else out.masked_fill(~own.any(-1, keepdim=True), 0)
        return (self._weights(q, scale, softcap=softcap, mask=mask) @ self.v.float()[:, :, None]).flatten(1, 2).to(q.dtype)

    @torch.no_grad()
    def received(self, q: Tensor, scale: float, *, softcap: float | None = None, n_causal: int = 0) -> Tensor:
        """(b, H, N) fp32: the attention each entry receives from all queries together, summed chunk by chunk of them. Arguments as in `attention`."""
        total = torch.zeros(self.k.shape[:3], dtype=torch.float32, device=q.device)
        mask, step = self._visible(q.shape[2], n_causal), max(1, MAX_MATRIX_ELEMENTS // max(1, total.numel()))
        with torch.autocast(q.device.type, enabled=False):
            for first in range(0, q.shape[2], step):
                own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first : first + step]
                total += self._weights(q[:, :, first : first + step], scale, softcap=softcap, mask=own).sum((2, 3))
        return total

    def _visible(self, n_rows: int, n_causal: int) -> Tensor | None:
        """(b, H, n or 1, N) bool: which entries each query sees; None where all see all."""
        found = None if self.valid is None else self.valid[:, :, None]
        if n_causal <= 1:
            return found
        n = len(self)
        place = torch.arange(n, device=self.k.device)
        # the last query sees everything; each one before it one entry less, down to the first of the causal ones
        limit = n - (n_rows - 1 - torch.arange(n_rows, device=self.k.device)).clamp_max(n_causal)
        causal = (place < limit[:, None]).expand(*self.k.shape[:2], -1, -1)
        return causal if found is None else causal & found

    def _weights(self, q: Tensor, scale: float, *, softcap: float | None, mask: Tensor | None) -> Tensor:
        """(b, H, G, n, N) fp32: the attention of every query, 0 for one that sees nothing."""
        batch, heads, _, width = self.k.shape
        scores = q.float().reshape(batch, heads, -1, q.shape[2], width) @ self.k.float().mT[:, :, None] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        found: Tensor = scores.softmax(-1)
        return found if mask is None else found.nan_to_num(0.0)


def _weighted(rows: Tensor, merge: Merge) -> Tensor:
    """(b, H, N, d) fp32: at each anchor Σ weight · row[source], zeros elsewhere."""
    n_entries, n_rows = rows.shape[2], rows.shape[:3].numel()
    # places in (b · H · N) rows, those of one anchor together: sums of row segments are several times as fast as scattered additions
    first = torch.arange(0, n_rows, n_entries, device=rows.device).view(*rows.shape[:2], 1)
    anchor, order = (merge.anchor + first).flatten().sort(stable=True)
    source, weight = (merge.source + first).flatten()[order], merge.weight.float().flatten()[order]
    begins = torch.searchsorted(anchor, torch.arange(n_rows, device=rows.device))
    return F.embedding_bag(source, rows.float().flatten(0, 2), begins, mode="sum", per_sample_weights=weight).view(rows.shape)


def check_answer(retain: Retain, group: HeadGroup, entries: Entries, name: str) -> None:
    """Raises PatchError where an answer breaks the protocol. Values are looked at on a CPU only, where nobody has to wait for them."""
    expected = (*entries.k.shape[:2], group.budget)
    label = f" {group.label}" if group.label else ""
    shape = tuple(retain.cache_index.shape)
    if shape != expected:
        raise PatchError(f"{name}: an answer for the{label} heads {group.heads} must have the shape {expected}, got {shape}")
    indexes = [retain.cache_index] if retain.attend_index is None else [retain.cache_index, retain.attend_index]
    for index in indexes:
        if index.shape[2] == 0 or index.shape[:2] != expected[:2]:
            raise PatchError(f"{name}: an index of {tuple(index.shape)} for {expected[:2]} rows and heads; each must name at least one entry")
        if index.device.type != "cpu":
            continue
        if not bool((index.diff(dim=-1) > 0).all()) or int(index.min()) < 0 or int(index.max()) >= len(entries):
            raise PatchError(f"{name}: indexes must ascend within the {len(entries)} entries, without one twice")
    if retain.ok is not None and retain.ok.device.type == "cpu" and not bool(retain.ok.any(-1).all()):
        raise PatchError(f"{name}: a head was left without an entry")
