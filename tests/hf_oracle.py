"""Greedy tokens of the transformers host, the oracle of the vLLM host: prompts at once, or in the chunks that a scheduler makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import accel


@contextmanager
def patched(folder: str, *methods: Any) -> Iterator[Any]:
    """The model of a folder in fp32 with these methods, and its handle (None without any)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yield model, accel.apply(model, *methods) if methods else None


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], n: int = 8, *, chunk: int | None = None) -> list[int]:
    """The greedy continuation of one prompt, which is read `chunk` tokens at a time; None: all at once."""
    cache, found = None, []
    size = chunk or len(prompt)
    for at in range(0, len(prompt), size):
        out = model(input_ids=torch.tensor([prompt[at : at + size]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    for left in reversed(range(n)):
        found.append(int(out.logits[0, -1].argmax()))
        if left:
            out = model(input_ids=torch.tensor([found[-1:]]), past_key_values=cache, use_cache=True)
    return found
