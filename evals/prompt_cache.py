"""The cache behind a prompt, what goes on from it, and what models call it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

import accel
from accel.protocols import Method


def filled_cache(model: Any, input_ids: Tensor, methods: Sequence[Method], *, chunk: int | None = None) -> Any:
    """The cache behind a prompt (B, L) with the methods on, read in one pass or in chunks of so many tokens."""
    with accel.apply(model, *methods) if methods else nullcontext():
        return read_prompt(model, input_ids, chunk=chunk)


def read_prompt(model: Any, input_ids: Tensor, *, chunk: int | None = None) -> Any:
    """The cache behind a prompt (B, L) with whatever is on."""
    cache, n = None, input_ids.shape[1]
    for i in range(0, n, chunk or n):
        given: dict[str, Any] = {} if cache is None else {cache_argument(model): cache}
        out = model(input_ids=input_ids[:, i : i + (chunk or n)], use_cache=True, **given, **last_logits_only(model))
        cache = getattr(out, cache_argument(model))
    return cache


@contextmanager
def branch(cache: Any, n_tokens: int) -> Iterator[Any]:
    """The cache behind `n_tokens` tokens, to go on from inside the block; behind it, `cache` holds these tokens alone again.

    It is cut back where that leaves no trace, and else, as with recurrent states, the block gets a copy: a second prefill would take far longer.
    """
    if not getattr(cache, "is_croppable", False):
        yield copy.deepcopy(cache)
        return
    # a window holds what leaves it from now on
    cache.activate_past_recording()
    try:
        yield cache
    finally:
        if surplus := int(cache.get_seq_length()) - n_tokens:
            cache.crop(-surplus)


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument with which the model computes the logits of the last token alone; empty where it has none."""
    # asked of the class: a patched or wrapped forward may hide its arguments
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def cache_argument(model: Any) -> str:
    """transformers 5.24 renamed the argument."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
