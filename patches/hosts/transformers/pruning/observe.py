"""Attention maps of chosen layers, recorded while they run, without changing what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.kernels.probe.api import attention_row, mean_attention
from accel.patches.hosts.bound import outside_graph
from accel.patches.hosts.transformers.layers import call_original, original_attention
from accel.patches.hosts.transformers.masks import LazyMask
from accel.protocols import Observation, TokenPruning

WATCHER = "_accel_watcher"
PREFIX = "accel_watched_"


class Watcher:
    """The mark on a watched attention module. see(q, k, key_mask, scale, softcap) is called before its attention runs. Copies see nothing.

    config: the module's own, which it gets back; it names the attention that runs, and that its neighbours' masks are made for. inner: what it
    named when our function was put in front of it.
    """

    def __init__(self, see: Callable[..., None] | None, config: Any, inner: str) -> None:
        self.see, self.config, self.inner = see, config, inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
        return Watcher(None, copy.deepcopy(self.config, memo), self.inner)

    def __reduce__(self) -> Any:
        return _blind, (self.config, self.inner)


def _blind(config: Any, inner: str) -> Watcher:
    """A watcher out of a pickle, in a process that may not have registered our function yet."""
    _register(inner)
    return Watcher(None, config, inner)


def watch(module: nn.Module, see: Callable[..., None], handle: Handle) -> None:
    """Has `see` called with the queries and keys of `module`, behind its norms and rotary embeddings, until the handle is undone.

    Only this module's config is exchanged, for a copy that names our function: masks and all other layers stay as they are.
    """
    config: Any = module.config
    inner: str = config._attn_implementation
    if original_attention(module, inner) is None:
        raise UnsupportedError(f"{type(module).__name__} runs {inner!r}, which accel cannot call and hence not watch")
    watched = copy.copy(config)
    watched._attn_implementation_internal = _register(inner)
    handle.set_attr(module, WATCHER, Watcher(see, config, inner))
    handle.set_attr(module, "config", watched)


def _register(inner: str) -> str:
    # transformers treats names with "flash" or "/" in a special way
    name = PREFIX + inner.replace("flash", "fa").replace("/", "--")
    if name not in AttentionInterface._global_mapping:

        def watched_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            watcher: Watcher | None = getattr(module, WATCHER, None)
            if watcher is not None and watcher.see is not None:
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                if query.shape[2] > 1 or not torch.compiler.is_compiling():
                    outside_graph(watcher.see, query, key, attention_mask, scale, kwargs.get("softcap"))
            # somebody may have called set_attn_implementation since
            current = inner if watcher is None else watcher.config._attn_implementation
            function = original_attention(module, current)
            if function is None:
                raise UnsupportedError(f"{type(module).__name__} runs {current!r}, which accel cannot call")
            return call_original(function, module, query, key, value, attention_mask, scaling=scaling, kwargs=kwargs)

        AttentionInterface.register(name, watched_attention)
        if inner in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def encoder_maps(
    q: Tensor, k: Tensor, mask: Any, scale: float, *, prefix: int, wanted: list[tuple[TokenPruning, Observation]]
) -> list[list[Tensor]]:
    """For each wanted observation the maps of the rows of one encoder call, (patches,) fp32 each. q, k: (segments, H, prefix + P, d)."""
    key_mask = _bidirectional_key_mask(mask, len(q), k.shape[2])
    n = k.shape[2]

    def mean_over(rows: Tensor, heads: Any) -> Tensor:
        return mean_attention(q, k, rows=rows, scale=scale, is_causal=False, key_mask=key_mask, heads=heads)[:, prefix:]

    received: dict[tuple[int | None, str], Tensor] = {}
    found = []
    for method, observation in wanted:
        if observation.what == "cls_row":
            maps = attention_row(q, k, 0, scale=scale, is_causal=False, key_mask=key_mask, heads=observation.head_reduce)[:, prefix:]
        else:
            how = (observation.max_queries, observation.head_reduce)
            if how not in received:
                received[how] = mean_over(_spread_rows(prefix, n, observation.max_queries, q.device), observation.head_reduce)
            maps = received[how]
            if observation.what == "mean_selected_rows":
                chosen = nn.functional.pad(method.select_rows(maps), (prefix, 0))
                maps = mean_over(chosen, observation.head_reduce)
        found.append(list(maps))
    return found


def _spread_rows(prefix: int, n: int, most: int | None, device: torch.device) -> Tensor:
    """Numbers of the patch rows that a mean is taken over: all, or `most` evenly spread ones."""
    rows = torch.arange(prefix, n, device=device)
    if most is None or len(rows) <= most:
        return rows
    return rows[((torch.arange(most, device=device) + 0.5) * len(rows) / most).long()]


def _bidirectional_key_mask(mask: Any, batch: int, n: int) -> Tensor | None:
    """(segments, n) bool out of an encoder's mask, which hides padding from every query alike."""
    mask = mask.build() if isinstance(mask, LazyMask) else mask
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() in (2, 4):
        row = mask if mask.dim() == 2 else mask[:, 0, 0]
        is_seen = row if row.dtype == torch.bool else row == 0 if mask.dim() == 4 else row > 0
        return is_seen[:, :n].expand(batch, n)
    raise UnsupportedError(f"the vision encoder's attention mask is a {type(mask).__name__}, of which accel cannot tell what it hides")


def newest_row(
    q: Tensor, k: Tensor, mask: Any, scale: float, softcap: float | None, *, row: Tensor, observation: Observation
) -> Tensor:
    """The attention of query `row` (B,) of each sequence over the keys that this pass brought, (B, L) fp32. q (B, Hq, L, d), k (B, Hkv, n, d)."""
    n, length = k.shape[2], q.shape[2]
    if isinstance(mask, LazyMask) and isinstance(mask.q_offset, Tensor):
        # a static cache holds keys that do not exist yet
        n = int(mask.q_offset) + length
        k = k[:, :, :n]
    key_mask = mask.valid_keys(n) if isinstance(mask, LazyMask) else None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0].expand(len(q), -1, -1)[torch.arange(len(q), device=mask.device), row.to(mask.device)][:, :n]
        key_mask = seen if seen.dtype == torch.bool else seen == 0
    key_mask = None if key_mask is None else key_mask.bool().to(q.device)
    found = attention_row(q, k, row, scale=scale, is_causal=True, key_mask=key_mask, softcap=softcap, heads=observation.head_reduce)
    return found[:, n - length :]
