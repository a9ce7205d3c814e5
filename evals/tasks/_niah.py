"""Needle-in-a-haystack prompts with one or several keys, in chat form."""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._text import sentences
from accel.evals.tasks._words import ADJECTIVES, KEYS

MAX_NEW_TOKENS = 32


def niah_sample(tokenizer: Any, task: str, n_tokens: int, *, n_keys: int, index: int, seed: int) -> Sample:
    """One prompt with `n_keys` needles in prose, of which the first is asked for."""
    rng = sample_rng(task, seed, index)
    keys = [f"{a}-{k}" for a, k in zip(rng.sample(ADJECTIVES, n_keys), rng.sample(KEYS, n_keys), strict=True)]
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    needles = [f"The secret number of {key} is {value}." for key, value in zip(keys, values, strict=True)]
    depths = [rng.random() for _ in keys]
    text = sentences()
    start = rng.randrange(len(text))

    def question(n_sentences: int) -> str:
        hay = [text[(start + i) % len(text)] for i in range(n_sentences)]
        # from the back, so that an earlier place is not moved by a later needle
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            hay.insert(round(depth * n_sentences), needle)
        return (
            "Secret numbers are hidden in the text below. Remember them: I will ask for one of them afterwards.\n\n"
            f"{' '.join(hay)}\n\nWhat is the secret number of {keys[0]} in this text?"
        )

    return chat_sample(
        tokenizer, task=task, n_tokens=n_tokens, most_units=8 * n_tokens // 10 + 64, question=question,
        prefix=f"The secret number of {keys[0]} in this text is", answer=f" {values[0]}", parts=[values[0]],
        labels=[f"{keys[0]} (at {depths[0]:.0%})"], max_new_tokens=MAX_NEW_TOKENS, id=index, seed=seed,
    )  # fmt: skip
