"""A number of ten digits, many of them repeated, in one line that is repeated: InfiniteBench's number_string.

Runs of equal digits such as 2200012222 ask for a finer look than a pass key does. At a random depth, where the benchmark has even steps; right where
the first number of the reply is this one; 12 new tokens, or what the number needs. As published but for this, the wording, the repeated line and the
length, which is the one asked for.
"""

from __future__ import annotations

import random
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._infinitebench import CAVEAT, GROUP, NUMBER_TOKENS, hidden_number, random_digits

# so many digits at random, and so many that repeat the one before them
N_DIGITS, N_REPEATS = 5, 5


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
    """Ten digits: five at random, and five times one of them again beside itself."""
    digits = random_digits(rng, N_DIGITS)
    for _ in range(N_REPEATS):
        at = rng.randrange(len(digits))
        digits = digits[:at] + digits[at] + digits[at:]
    return digits


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
