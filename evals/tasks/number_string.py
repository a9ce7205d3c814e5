"""A number of ten digits, many of them repeated, in one line that is repeated: InfiniteBench's number_string.

Runs of equal digits such as 2200012222 ask for a finer look than a pass key does. At a random depth; right where the first number of the reply is
this one; 12 new tokens, or what the number needs. As published but for the wording, the repeated line and the length, which is the one asked for.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._infinitebench import CAVEAT, GROUP, NUMBER_TOKENS, hidden_number

N_DIGITS, N_RUNS = 10, 4


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with one answer."""
    return [
        hidden_number(
            tokenizer, task="number_string", what="sequence of digits", n_tokens=n_tokens, number=number, max_new_tokens=NUMBER_TOKENS, index=index,
            seed=seed,
        )
        for index in range(n)
    ]  # fmt: skip


def number(rng: random.Random) -> str:
    """Ten digits in four runs; neighbouring runs differ."""
    cuts = [0, *sorted(rng.sample(range(1, N_DIGITS), N_RUNS - 1)), N_DIGITS]
    digits = ""
    for start, stop in pairwise(cuts):
        digits += rng.choice([d for d in "0123456789" if not digits.endswith(d)]) * (stop - start)
    return digits


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
