"""What text and visual tokens read in every layer of a vision-language model: the shares behind the three stages of DyVTE (arXiv 2411.19628)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import OptionError, UnsupportedError
from accel.evals.pictures.questions import is_placeholder


@torch.no_grad()
def attention_flow(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Attention of one prompt by layer: {n_visual, n_text, layers: [{layer, text_to_visual, text_to_text, visual_to_visual}]}.

    Each is the share of a query's attention that goes to keys of a kind, as a mean over heads and queries: the n_text text tokens behind the last
    visual one, or the n_visual visual ones. Text is what is no placeholder of a picture, the begin token included. inputs: of one prompt without
    padding. One forward with eager attention, of which one layer's weights are held at a time: heads · tokens² numbers. The model is left as it was.
    """
    is_visual = is_placeholder(model.config, inputs["input_ids"])[0]
    if not bool(is_visual.any()):
        raise UnsupportedError("the prompt holds no placeholder of a picture that the model's config names: visual tokens cannot be told from text")
    is_asked = ~is_visual
    is_asked[: int(is_visual.nonzero().max())] = False
    if not bool(is_asked.any()):
        raise OptionError("no text stands behind the picture, whose attention could be shown")
    found: dict[int, dict[str, Any]] = {}
    with _weights_seen(model.get_decoder(), partial(_note, found, is_visual, is_asked)):
        model.base_model(**inputs, use_cache=False)
    if not found:
        raise UnsupportedError(f"the layers of {type(model).__name__} give no attention weights")
    return {"n_visual": int(is_visual.sum()), "n_text": int(is_asked.sum()), "layers": [found[layer] for layer in sorted(found)]}


def _note(found: dict[int, dict[str, Any]], is_visual: Tensor, is_asked: Tensor, module: nn.Module, _args: Any, output: Any) -> None:
    """A hook on an attention module. output: its second entry are weights (1, heads, n, n), that of other modules is not."""
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, Tensor) or weights.dim() != 4:
        return
    visual, asked = is_visual.to(weights.device), is_asked.to(weights.device)
    to_visual = weights[0][..., visual].float().sum(-1)     # (heads, n)
    to_text = weights[0][..., ~visual].float().sum(-1)
    layer = int(module.layer_idx)   # type: ignore[arg-type]
    found[layer] = {
        "layer": layer, "text_to_visual": float(to_visual[:, asked].mean()), "text_to_text": float(to_text[:, asked].mean()),
        "visual_to_visual": float(to_visual[:, visual].mean()),
    }  # fmt: skip


@contextmanager
def _weights_seen(decoder: Any, hook: Any) -> Iterator[None]:
    """Has the decoder run eager attention, whose weights `hook` sees, and takes both back."""
    config, before = decoder.config, decoder.config._attn_implementation
    hooks = [m.register_forward_hook(hook) for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
        for one in hooks:
            one.remove()
