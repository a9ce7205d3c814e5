"""Prompts that end in the source of a module of Python's library."""

from __future__ import annotations

from typing import Any

from accel.errors import OptionError
from accel.evals.tasks._prompts import encode, opening
from accel.evals.tasks._text import SOURCE_MODULES, source


def modules_from(number: int) -> list[str]:
    """All source modules, that of this number first."""
    first = number % len(SOURCE_MODULES)
    return [*SOURCE_MODULES[first:], *SOURCE_MODULES[:first]]


def code_before(tokenizer: Any, task: str, text: str, more: list[str], n_tokens: int) -> list[int]:
    """Exactly `n_tokens` tokens that end with `text`; where it is shorter, the sources of the modules `more` stand before it."""
    head = opening(tokenizer)
    ids, rest = encode(tokenizer, text), list(more)
    while len(ids) < n_tokens - len(head):
        if not rest:
            raise OptionError(f"{task}: the sources of {len(more) + 1} modules end before {n_tokens} tokens; ask for a shorter length")
        ids = encode(tokenizer, source(rest.pop(0))) + ids
    return head + ids[len(ids) - (n_tokens - len(head)) :]
