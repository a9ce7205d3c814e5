"""The ten most common words of a numbered list: RULER's cwe.

Ten words stand 30 times each, all others three times, in random order, behind one solved example of 40 words (10 and 3 times); below 4096 tokens
six times and once, behind an example of 20 words (3 times and once). Parameters as published; wording and words are our own: English words from
lists and from essays, and made-up words among the rare ones where those end, from more than a hundred thousand tokens on. 120 new tokens, or what
ten words need. The score is the share of the ten in the reply; none of the ten is a part of another word. Its log-prob depends on an order that no
reader can know.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._ruler import CAVEAT, CWE_TOKENS, GROUP
from accel.evals.tasks._text import common_words
from accel.evals.tasks._words import ALL_ADJECTIVES, ALL_NOUNS, made_up_words

N_COMMON = 10
REPLY = f"The {N_COMMON} words that stand most often in the list are:"
SHORT = 4096    # tokens: shorter prompts have fewer repeats
# (times that the ten stand there, times that the others do) in the prompt and in the example, words of the example
REPEATS, EXAMPLE, N_EXAMPLE = (30, 3), (10, 3), 40
SHORT_REPEATS, SHORT_EXAMPLE, N_SHORT_EXAMPLE = (6, 1), (3, 1), 20


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with ten answers."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("cwe", seed, index)
    is_short = n_tokens < SHORT
    repeats, example_repeats, n_example = (SHORT_REPEATS, SHORT_EXAMPLE, N_SHORT_EXAMPLE) if is_short else (REPEATS, EXAMPLE, N_EXAMPLE)
    n_rare = n_tokens // repeats[1] // 2
    example_words = rng.sample(english_words(), n_example)
    common, rare = _words(rng, n_rare)
    shown = _question(example_words[:N_COMMON], example_words[N_COMMON:], example_repeats, rng)
    example = f"{shown}\n{REPLY} {_numbered(example_words[:N_COMMON])}\n\n"
    order = rng.random()
    return chat_sample(
        tokenizer, task="cwe", n_tokens=n_tokens, most_units=n_rare,
        question=lambda k: example + _question(common, rare[:k], repeats, random.Random(order)),
        prefix=REPLY, answer=f" {_numbered(common)}", parts=common, labels=[f"word {i + 1}" for i in range(N_COMMON)],
        max_new_tokens=CWE_TOKENS, id=index, seed=seed,
    )  # fmt: skip


@cache
def english_words() -> tuple[str, ...]:
    """English words of our lists and of the essays, none a part of another: a reply cannot name one by naming another."""
    found = sorted({*ALL_ADJECTIVES, *ALL_NOUNS, *common_words()})
    text = "\n".join(found)
    return tuple(word for word in found if text.count(word) == 1)


def _words(rng: random.Random, n_rare: int) -> tuple[list[str], list[str]]:
    """(the ten, the others): English, and where there are no more, made up."""
    words = rng.sample(english_words(), min(len(english_words()), N_COMMON + n_rare))
    common, rare = words[:N_COMMON], words[N_COMMON:]
    invented = (word for word in made_up_words(rng) if not any(known in word for known in common))
    return common, [*rare, *islice(invented, n_rare - len(rare))]


def _question(common: list[str], rare: list[str], repeats: tuple[int, int], rng: random.Random) -> str:
    words = [*common * repeats[0], *rare * repeats[1]]
    rng.shuffle(words)
    return (
        "Below is a list of words. Some of them stand there more often than others. Remember those that stand there most often.\n"
        f"{_numbered(words)}\nWhich {N_COMMON} words stand most often in the list above?"
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
