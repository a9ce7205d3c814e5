"""The one test that decides, from shapes and arguments alone, whether a call may leave the model's own attention.

It runs inside traced code: no tensor values, no state, no strings built on the usual path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.masks import LazyMask

# Arguments that flow down from the caller and do not change what attention computes.
HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "softcap",
        "position_ids",
        "cache_position",
        "image_sizes",
        "logits_to_keep",
        "labels",
        "num_items_in_batch",
        "position_embeddings",
        "token_type_ids",
        "mm_token_type_ids",
    }
)


def why_dense(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Why this call keeps the model's own attention, or None. q (B, Hq, L, D), k and v (B, Hkv, N, D).

    Raises UnsupportedError for continuous batching, whose cache expects to be filled by the attention function.
    """
    if kwargs.get("cache") is not None:
        raise UnsupportedError("accel does not serve the paged cache of continuous batching (generate_batch); call undo() on the handle first")
    if kwargs.get("sliding_window") is not None:
        return "sliding window"
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "attention is not causal"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if kwargs.get("dropout"):
        return "attention dropout"
    for name, value in kwargs.items():
        # scalars are settings for other layers; a tensor we do not know may change the result (sinks, position bias, packed lengths, …)
        if name not in HARMLESS and isinstance(value, Tensor):
            return "attention takes an argument accel does not know: " + name
    if q.shape[2] == 0:
        return "no query rows"
    if k.shape[3] != v.shape[3]:
        return "value head size differs from key head size"
    if q.dtype != k.dtype or k.dtype != v.dtype:
        return "queries, keys and values differ in type"
    return _why_dense_mask(q, k, mask)


def _why_dense_mask(q: Tensor, k: Tensor, mask: Any) -> str | None:
    if isinstance(mask, LazyMask):
        if isinstance(mask.q_offset, int) and k.shape[2] < mask.q_offset + q.shape[2]:
            return "fewer keys than the mask counts"
        return None if mask.is_plain_causal else "mask is not plain causal"
    if isinstance(mask, Tensor):
        # one decoding step on a static cache: the row itself says which keys exist
        is_decode_row = q.shape[2] == 1 and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
        return None if is_decode_row and mask.shape[3] == k.shape[2] else "mask was given explicitly"
    return None if mask is None and (q.shape[2] == k.shape[2] or q.shape[2] == 1) else "mask is not plain causal"
