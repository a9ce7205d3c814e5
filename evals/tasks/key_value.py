"""One value out of many by its key, after InfiniteBench's key-value retrieval: a JSON object of random keys and values, one of them asked for.

Changed from InfiniteBench: keys are two words and two digits, and values five digits, where it has UUIDs for both, so that small models can do
it; the wording is our own. Every pair looks like every other, so nothing but the question, which stands behind the
object, tells which of them matters: what is dropped before it is read is a guess.
"""

from __future__ import annotations

import random
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, encode, sample_rng
from accel.evals.tasks._words import ADJECTIVES, KEYS

CAVEAT = (
    "key_value: its question stands at the end of the prompt, inside the window of methods that choose by the last queries, and names the key word "
    "for word. That is the friendly case for them: whether a pair survives that is asked for in a later turn is another matter."
)
# values are this long or a token longer: the reply needs no more
SLACK = 4


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with one answer."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("key_value", seed, index)
    depth, (key, value) = rng.random(), _pair(rng)
    others = [_line(*pair) for _ in range(n_tokens // 8 + 1) if (pair := _pair(rng))[0] != key]

    def question(n_others: int) -> str:
        lines = others[:n_others]
        lines.insert(round(depth * n_others), _line(key, value))
        return f"Find the value of a key in the JSON object below.\n\n{{{', '.join(lines)}}}\n\nWhat is the value of the key \"{key}\"?"

    return chat_sample(
        tokenizer, task="key_value", n_tokens=n_tokens, most_units=len(others), question=question, prefix=f'"{key}": "',
        answer=value, parts=[value], labels=[f"{key} (at {depth:.0%})"], max_new_tokens=len(encode(tokenizer, value)) + SLACK, id=index, seed=seed,
        depths=[depth],
    )  # fmt: skip


def _pair(rng: random.Random) -> tuple[str, str]:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(KEYS)}-{rng.randrange(10, 100)}", str(rng.randrange(10_000, 100_000))


def _line(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


TASK = Task(samples, caveat=CAVEAT)
