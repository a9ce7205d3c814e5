"""One needle in a haystack, after RULER's single-needle task with prose as haystack, words as keys and numbers as values (niah_single_2).

Changed from RULER: the haystack is Python's help topics instead of essays, the wording is our own, 32 new tokens instead of 128 (the answer
is seven digits). Kept: key = adjective-noun, value = seven digits, the needle at a random sentence, the model's chat template, the reply
begun by the words that lead to the answer, greedy decoding, exact = the value appears in the reply.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._niah import niah_sample


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves 32 of `n_tokens` tokens for the reply, with one answer."""
    return [niah_sample(tokenizer, "niah_single", n_tokens, n_keys=1, index=index, seed=seed) for index in range(n)]


TASK = Task(samples, group="ruler")
