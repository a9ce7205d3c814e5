"""The three most frequent words of a coded text: RULER's fwe.

Made-up words of six letters whose frequencies fall as 1/rank² (a zeta distribution with alpha 2), one word per 50 tokens of the prompt; the most
frequent one is "...", noise that the question tells to ignore, and the three behind it are wanted. Parameters as published; the wording is our own;
50 new tokens. The score is the share of the three in the reply; their log-prob depends on an order, by frequency.
"""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._ruler import CAVEAT, FWE_TOKENS, GROUP
from accel.evals.tasks._words import made_up_words

N_WANTED = 3
NOISE = "..."
TOKENS_PER_WORD = 50
ZETA_2 = math.pi**2 / 6
# with fewer words the third and the fourth could be equally frequent
FEWEST = 75
QUESTION = (
    "Read the coded text below and count how often each coded word stands there. Find the three most frequent ones.\n{}\n"
    "Which three coded words are the most frequent in the text above? Ignore the dots '...' and explain nothing."
)
REPLY = "The three most frequent coded words in the text above are:"


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with three answers."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("fwe", seed, index)
    words = [NOISE, *islice(made_up_words(rng), max(N_WANTED + 1, (n_tokens - FWE_TOKENS) // TOKENS_PER_WORD - 1))]
    wanted, order = words[1 : 1 + N_WANTED], rng.random()

    def question(n_more: int) -> str:
        text = [word for word, count in zip(words, counts(FEWEST + n_more, len(words)), strict=True) for _ in range(count)]
        random.Random(order).shuffle(text)
        return QUESTION.format(" ".join(text))

    return chat_sample(
        tokenizer, task="fwe", n_tokens=n_tokens, most_units=n_tokens, question=question, prefix=REPLY, answer=f" {', '.join(wanted)}", parts=wanted,
        labels=[f"rank {i + 1}" for i in range(N_WANTED)], max_new_tokens=FWE_TOKENS, id=index, seed=seed,
    )  # fmt: skip


def counts(n_words: int, n_kinds: int) -> list[int]:
    """How often the words of rank 1, 2, … stand in a text of about `n_words`."""
    return [int(n_words / rank**2 / ZETA_2) for rank in range(1, n_kinds + 1)]


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
