"""Positions without the gaps that dropped tokens leave (`position_mode="compact"`, visual-token-pruning.md §1.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.patches.hosts.transformers.pruning.cache import logical_layer
from accel.patches.hosts.transformers.pruning.passes import Pass


def compacted(running: Pass, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments for a pass of a prompt. Later passes go on from there: the first cache layer knows how many tokens are gone."""
    prompt = running.prompt
    gone = torch.zeros(prompt.ids.shape, dtype=torch.int64, device="cpu")
    rows, ordinals = (prompt.tokens.exists & ~prompt.front()).nonzero(as_tuple=True)
    gone[rows, prompt.tokens.column[rows, ordinals]] = 1
    device = kwargs["inputs_embeds"].device
    before = gone.cumsum(1)[:, running.past : running.past + running.length].to(device)
    earlier = _gone_before(cache)
    if earlier is not None:
        before = before + earlier[:, None]
    if running.is_last and cache is not None:
        here = gone.sum(1).to(device)
        logical_layer(cache, 0).n_gone = here if earlier is None else earlier + here
    return _less(kwargs, before, running.past)


def continued(cache: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a pass behind a prompt that was compacted; None where none was."""
    gone = _gone_before(cache)
    if gone is None or kwargs.get("inputs_embeds") is None:
        return None
    return _less(kwargs, gone[:, None].expand(-1, kwargs["inputs_embeds"].shape[1]), cache.get_seq_length())


def _gone_before(cache: Any) -> Tensor | None:
    return getattr(cache.layers[0], "n_gone", None) if cache is not None and cache.layers else None


def _less(kwargs: dict[str, Any], less: Tensor, past: int | Tensor) -> dict[str, Any]:
    embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
    if positions is None:
        positions = (torch.arange(embeds.shape[1], device=embeds.device) + past)[None]
    return {**kwargs, "position_ids": positions - less}
