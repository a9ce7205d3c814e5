"""One needle among three distractors, after RULER's multi-key task with prose as haystack (niah_multikey_1: four keys, one of them asked for).

Changed from RULER: as in niah_single. The distractors differ from the needle by key and value only.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._niah import niah_sample

N_KEYS = 4


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves 32 of `n_tokens` tokens for the reply, with one answer."""
    return [niah_sample(tokenizer, "niah_multikey", n_tokens, n_keys=N_KEYS, index=index, seed=seed) for index in range(n)]


TASK = Task(samples, group="ruler")
