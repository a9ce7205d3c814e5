"""What a pruned run must equal: the whole model, with the dropped columns hidden from every other token from their layer on.

Nothing of accel's host runs here: plain modules, the library's own boolean masks, and a per-layer set of hidden columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "conformance_hidden"

_hidden: dict[int, Tensor] = {}


def hide_by_layer(events: list[tuple[int, Tensor]], n_layers: int) -> dict[int, Tensor]:
    """By layer the columns (B, S) bool that are hidden there. events: (layer, hidden from it on), later ones on top."""
    found = {}
    for layer in range(n_layers):
        masks = [hidden for first, hidden in events if first <= layer]
        if masks:
            found[layer] = torch.stack(masks).any(0)
    return found


@contextmanager
def hiding(model: PreTrainedModel, hidden: dict[int, Tensor]) -> Iterator[None]:
    """Runs `model`, which must not be patched, with those columns hidden."""
    layers = [m for m in model.get_decoder().modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]
    configs = {id(m.config): m.config for m in layers}
    before = {key: config._attn_implementation for key, config in configs.items()}
    _hidden.clear()
    _hidden.update(hidden)
    for config in configs.values():
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    batch, heads, length, dim = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    n = key.shape[2]
    allowed = attention_mask.expand(batch, 1, length, -1)[..., :n].clone()
    hidden = _hidden.get(module.layer_idx)
    if hidden is not None:
        hidden = hidden.repeat_interleave(batch // len(hidden), dim=0)
        first = attention_mask.first_column     # type: ignore[attr-defined]
        columns = torch.nn.functional.pad(hidden, (0, max(0, first + n - hidden.shape[1])))[:, first : first + n]
        allowed &= ~columns[:, None, None]
    scores = query @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (probs @ value).transpose(1, 2).contiguous(), None


def _mask(*, q_offset: int | Tensor = 0, **arguments: Any) -> Tensor:
    mask = sdpa_mask(q_offset=q_offset, **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    # layers with a window hold the newest keys only
    mask.first_column = arguments.get("kv_offset", 0)       # type: ignore[attr-defined]
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
