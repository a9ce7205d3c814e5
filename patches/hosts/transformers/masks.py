"""Masks that are built only when somebody reads them (transformers-integration.md §1.3).

transformers calls our mask function once per forward and mask type. A dense boolean mask costs O(n²); the sparse path needs only the
rule and the padding. So the call is recorded, and the mask function of the *original* implementation is run on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


@dataclass(frozen=True)
class KeptKeys:
    """The keys of a layer that fewer tokens reach. index(): (B, length) int64, the number of each in the whole sequence, −1 for holes.

    offset: place of the first query among them; a tensor on a static cache. key: equal for layers with equal keys.
    """

    index: Callable[[], Tensor]
    length: int
    offset: int | Tensor
    has_holes: bool
    key: Hashable


def _by_number(rule: Callable[..., Any], q_index: Tensor, kv_index: Tensor, offset: int | Tensor) -> Callable[..., Any]:
    """A rule about numbers of the whole sequence, as a rule about places in the shortened one."""
    q_index, kv_index = q_index.clamp_min(0), kv_index.clamp_min(0)

    def asked_by_number(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return rule(batch, head, q_index[batch, q - offset], kv_index[batch, kv])

    return asked_by_number


def shortened_tensor(mask: Tensor, rows: Tensor | None, index: Tensor) -> Tensor:
    """A finished mask (B or 1, heads or 1, L, n), boolean or additive, cut to `rows` (B, m) of its queries and `index` (B, n') of its keys."""
    batch, heads, index = len(index), mask.shape[1], index.to(mask.device)
    rows = None if rows is None else rows.to(mask.device)
    mask = mask.expand(batch, -1, -1, -1)
    if rows is not None:
        mask = mask.gather(2, rows.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    is_known = ((index >= 0) & (index < mask.shape[3]))[:, None, None]
    found = mask.gather(3, index.clamp(0, mask.shape[3] - 1)[:, None, None].expand(-1, heads, mask.shape[2], -1))
    return found & is_known if mask.dtype == torch.bool else found.masked_fill(~is_known, torch.finfo(mask.dtype).min)


class LazyMask:
    """A mask function's arguments, with the mask they describe built on first use and shared by all layers of the forward.

    It passes for neither a padding mask (`ndim` is not 2) nor a finished mask (`shape` is not 4 long).
    """

    ndim = 3
    shape = (0, 0, 0)

    def __init__(self, original: str, arguments: dict[str, Any]) -> None:
        offset = arguments["q_offset"]
        self.original = original
        # a static cache hands out its live counter and advances it before attention runs: the mask needs the value of now
        self.q_offset: int | Tensor = offset.clone() if isinstance(offset, Tensor) else offset
        self.arguments = {**arguments, "q_offset": self.q_offset}
        self.padding: Tensor | None = arguments.get("attention_mask")
        self.is_plain_causal = arguments["mask_function"] is causal_mask_function and arguments["kv_offset"] == 0
        self._built = False
        self._mask: Any = None
        self._is_unpadded: bool | None = None
        self._shortened: dict[Hashable, LazyMask] = {}
        self._valid: dict[int, Tensor] = {}
        self._new: dict[int, Tensor | None] = {}

    def contiguous(self) -> LazyMask:
        return self

    def build(self) -> Any:
        """What the original implementation's own mask function returns: a tensor, a BlockMask or None."""
        if not self._built:
            self._mask = ALL_MASK_ATTENTION_FUNCTIONS[self.original](**self.arguments)
            self._built = True
        return self._mask

    def shortened(self, q_index: Tensor, keys: KeptKeys) -> LazyMask:
        """The mask of a layer that fewer tokens reach: its rows are the queries `q_index` (B, m), its columns the entries of `keys`.

        Both hold numbers of the whole sequence, −1 for holes. Order is kept, so a causal rule holds for places as it did for numbers; any other
        rule is asked by number.
        """
        known = self._shortened.get(keys.key)
        if known is not None:
            return known
        valid = None
        # on the device where masks are built: layers may lie on others
        device = self.padding.device if self.padding is not None else self.arguments.get("device") or q_index.device
        if keys.has_holes or (self.padding is not None and not self._has_ones_only(self.padding)):
            index = keys.index().to(device)
            valid = index >= 0
            if self.padding is not None:
                width = self.padding.shape[-1]
                valid &= self.padding.bool().expand(len(index), -1).gather(1, index.clamp(0, width - 1)) & (index < width)
        offset = keys.offset.to(device) if isinstance(keys.offset, Tensor) else keys.offset
        sizes = {"q_length": q_index.shape[1], "kv_length": keys.length, "q_offset": offset, "kv_offset": 0, "attention_mask": valid}
        rule: dict[str, Any] = {}
        if not self.is_plain_causal:
            by_number = _by_number(self.arguments["mask_function"], q_index.to(device), keys.index().to(device), offset)
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            rule = {"mask_function": by_number, "local_size": None, **skips}
        short = LazyMask(self.original, {**self.arguments, **sizes, **rule, "batch_size": q_index.shape[0]})
        self._shortened[keys.key] = short
        return short

    def valid_keys(self, kv_length: int) -> Tensor | None:
        """Keys that are no padding, (B, kv_length) bool, or None where there are no others. Past the padding mask's end nothing is valid.

        All layers of a forward get the same tensor, so that what the first one reads from it need not be read again (`attend.runs_of`).
        """
        if self.padding is None or self._has_ones_only(self.padding):
            return None
        if kv_length not in self._valid:
            missing = kv_length - self.padding.shape[-1]
            padding = self.padding[:, :kv_length]
            self._valid[kv_length] = torch.nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
        return self._valid[kv_length]

    def new_padding(self, length: int) -> Tensor | None:
        """(B, length) bool of the columns of this pass: False for padding; None where there is none. Read once for all layers.

        As everywhere, past the padding mask's end nothing is valid.
        """
        if self.padding is None or self._has_ones_only(self.padding):
            return None
        if length not in self._new:
            first = int(self.q_offset)
            newest = self.padding[:, first : first + length].bool()
            newest = torch.nn.functional.pad(newest, (0, length - newest.shape[1]))
            self._new[length] = None if bool(newest.all()) else newest
        return self._new[length]

    def _has_ones_only(self, padding: Tensor) -> bool:
        """Whether no key up to the last query is padding. Read once for all layers, each of which would wait for the device otherwise."""
        if not isinstance(self.q_offset, int) or padding.device.type == "meta" or torch.compiler.is_compiling():
            return False
        if self._is_unpadded is None:
            # nothing can be read inside a CUDA graph
            if padding.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            n = self.q_offset + int(self.arguments["q_length"])
            self._is_unpadded = padding.shape[-1] >= n and bool(padding[:, :n].all())
        return self._is_unpadded


def mask_function_for(original: str) -> Callable[..., Any]:
    """The mask function to register beside the dispatcher of `original`."""

    def lazy_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Any = None,
        **more: Any,
    ) -> Any:
        # generate with a static cache builds the mask ahead and passes it through here again
        if isinstance(attention_mask, LazyMask):
            return attention_mask
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        arguments = {**sizes, "mask_function": mask_function, "attention_mask": attention_mask, **more}
        # decoding on a static cache is compiled, and a Python object among its inputs would recompile every step
        if isinstance(q_offset, Tensor) and q_length == 1:
            return ALL_MASK_ATTENTION_FUNCTIONS[original](**arguments)
        return LazyMask(original, arguments)

    return lazy_mask


def causal_mask_for(original: str, q: Tensor, *, kv_length: int, q_offset: int | Tensor, valid: Tensor | None, config: Any) -> Any:
    """The original implementation's mask of plain causal attention with padding, for a call whose lazy mask is out of reach.

    q: (B, Hq, L, D). valid: (B, kv_length) bool or None. Used inside the opaque operator.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS[original](
        batch_size=q.shape[0],
        q_length=q.shape[2],
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=valid,
        # the test for it would read a counter that is on a GPU
        allow_is_causal_skip=isinstance(q_offset, int),
        dtype=q.dtype,
        config=config,
        use_vmap=False,
        device=q.device,
    )
