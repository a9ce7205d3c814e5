"""A pass key of five digits in one line that is repeated: InfiniteBench's passkey.

At a random depth, where the benchmark has even steps; right where the first number of the reply is the key; 6 new tokens, or what the key needs. As
published but for this, the wording, the repeated line and the length, which is the one asked for.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._infinitebench import CAVEAT, GROUP, PASSKEY_TOKENS, hidden_number, random_digits

N_DIGITS = 5


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with one answer."""
    return [
        hidden_number(
            tokenizer, task="passkey", what="pass key", n_tokens=n_tokens, number=lambda rng: random_digits(rng, N_DIGITS),
            max_new_tokens=PASSKEY_TOKENS, index=index, seed=seed,
        )
        for index in range(n)
    ]  # fmt: skip


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
