"""The attention function that transformers calls for every layer of a patched model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from accel.errors import UnsupportedError
from accel.patches.hosts.bound import outside_graph
from accel.patches.hosts.transformers import op as _op  # noqa: F401 - registers the operators
from accel.patches.hosts.transformers.applicability import why_dense
from accel.patches.hosts.transformers.attend import known_length, why_method_dense
from accel.patches.hosts.transformers.kv.slot import KV_SLOT, KVSlot
from accel.patches.hosts.transformers.layers import LAYERS, SLOT, Slot, call_original, original_attention
from accel.patches.hosts.transformers.masks import LazyMask, mask_function_for

PREFIX = "accel"


def dispatcher_name(original: str) -> str:
    """Our implementation name in front of `original`: the name alone says how to run dense, also on a copy that lost its state.

    transformers treats names with "flash" or "/" in a special way, hence the replacements.
    """
    return f"{PREFIX}_{original.replace('flash', 'fa').replace('/', '--')}"


def register(original: str) -> str:
    """Registers dispatcher and mask function in front of `original`, once, and returns their name."""
    name = dispatcher_name(original)
    if name not in _ORIGINALS:
        _ORIGINALS[name] = original
        AttentionInterface.register(name, dispatcher_for(original))
        AttentionMaskInterface.register(name, mask_function_for(original))
    return name


_ORIGINALS: dict[str, str] = {}


def original_of(name: str) -> str | None:
    """The implementation behind one of our names; None for any other name."""
    return _ORIGINALS.get(name)


def dispatcher_for(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The dispatcher in front of `original`."""

    def accel_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        kv: KVSlot | None = getattr(module, KV_SLOT, None)
        if kv is None or kv.cache_layer is None:
            return sparse_or_original(module, query, key, value, attention_mask, scaling, **kwargs)
        q, k, v = _as_autocast_would(query, key, value)
        dense = partial(sparse_or_original, module, query, key, value, attention_mask, scaling, **kwargs)
        found: tuple[Tensor, Tensor | None] = outside_graph(kv.attend, dense, module, q, k, v, attention_mask, scaling, kwargs)
        return found

    def sparse_or_original(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        slot: Slot | None = getattr(module, SLOT, None)
        if slot is None or slot.key not in LAYERS or not slot.is_on:
            return _run_original(original, module, query, key, value, attention_mask, scaling, kwargs)
        q, k, v = _as_autocast_would(query, key, value)
        reason = why_dense(module, q, k, v, attention_mask, kwargs)
        if reason is None and not torch.compiler.is_compiling():
            reason = _why_dense_now(slot, q, k, attention_mask)
        if reason is not None:
            if torch.compiler.is_compiling():
                torch.ops.accel.count_dense(slot.ticks, slot.key, reason)
            else:
                LAYERS[slot.key].stats.dense_calls[reason] += 1
            return _run_original(original, module, query, key, value, attention_mask, scaling, kwargs)
        valid, live_offset, offset = _where(q, k, attention_mask)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.accel.attention(q, k, v, valid, live_offset, offset, slot.key, scale, kwargs.get("softcap")), None

    return accel_attention


def _why_dense_now(slot: Slot, query: Tensor, key: Tensor, mask: Any) -> str | None:
    """The method's own reasons, asked ahead so that the dense path can share one mask among all layers.

    With `dense_kernel="accel"` the operator runs dense calls as well, hence no reason here.
    """
    state = LAYERS[slot.key]
    if state.method.dense_kernel == "accel" and query.device.type == "cpu":
        return None
    return why_method_dense(state, query, _live_length(query, key, mask))


def _live_length(query: Tensor, key: Tensor, mask: Any) -> int:
    """Keys up to the last query: fewer than the key tensor holds on a static cache. On a GPU only what shapes tell."""
    if isinstance(mask, LazyMask):
        if isinstance(mask.q_offset, Tensor) and mask.q_offset.device.type != "cpu":
            return known_length(query, key)
        return int(mask.q_offset) + query.shape[2]
    if isinstance(mask, Tensor) and mask.device.type == "cpu":
        return int(mask.any(0).flatten().nonzero()[-1]) + 1 if mask.any() else 0
    return key.shape[2]


def _as_autocast_would(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The types in which autocast would run attention: rotary embeddings leave q and k in fp32 beside a v of half the size."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _where(query: Tensor, key: Tensor, mask: Any) -> tuple[Tensor | None, Tensor | None, int]:
    """Valid keys, a static cache's live offset, and the offset of the first query where it is a plain number."""
    n, length = key.shape[2], query.shape[2]
    if isinstance(mask, LazyMask):
        if isinstance(mask.q_offset, Tensor):
            return mask.valid_keys(n), mask.q_offset, 0
        return mask.valid_keys(n), None, mask.q_offset
    if isinstance(mask, Tensor):
        return (*decode_row(mask, query.shape[0]), 0)
    return None, None, n - length


def decode_row(mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Valid keys (B, n) and the place of the one query, the last of them, out of a mask (B or 1, 1, 1, n). Computed once for all layers."""
    # a caller may write the next step's key into the mask of the last one: only a tensor that counts its changes can be remembered by
    can_remember = not (torch.compiler.is_compiling() or mask.is_inference())
    version, known = getattr(mask, _ROW, (-1, None)) if can_remember else (-1, None)
    if known is not None and version == mask._version:
        return known       # type: ignore[no-any-return]
    valid = mask[:, 0, 0]
    last = (mask.shape[3] - valid.flip(1).to(torch.int8).argmax(1)).amax() - 1
    found = (valid.expand(batch, -1), last)
    if can_remember:
        setattr(mask, _ROW, (mask._version, found))
    return found


_ROW = "_accel_row"     # on the mask itself, so that it lives as long


def _run_original(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    function = original_attention(module, original)
    if function is None:
        raise UnsupportedError(f"{type(module).__name__} has no {original!r} attention to fall back to")
    built = mask.build() if isinstance(mask, LazyMask) else mask
    return call_original(function, module, query, key, value, built, scaling=scaling, kwargs=kwargs)
