"""Variables that pass a value on, after RULER's variable tracking: one chain of four hops, five names to find.

Changed from RULER: the noise sentences and the wording are our own. Kept: names of five capital letters, a value of five digits, the
assignments in order at random places of repeated noise, one solved example before the question, the model's chat template, 30 new tokens,
greedy decoding, exact = the share of the names that appear in the reply. Under teacher forcing the names stand in the order of the chain.
"""

from __future__ import annotations

import random
import string
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, encode, sample_rng

N_HOPS = 4
MAX_NEW_TOKENS = 30
NOISE = "The road is long and the hills are low. A bird sings in the tree. We walk on, rest at noon, and walk on again."


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with five answers."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("variable_tracking", seed, index)
    example_names, example_value, example_lines = _chain(rng)
    names, value, lines = _chain(rng)
    depths = sorted(rng.random() for _ in lines)
    example = f"{_question(example_lines, [0.2, 0.35, 0.5, 0.65, 0.8], 5, example_value)}\n{_reply(example_value)} {' '.join(example_names)}\n\n"
    answer = f" {' '.join(names)}"
    return chat_sample(
        tokenizer, task="variable_tracking", n_tokens=n_tokens, most_units=n_tokens, question=lambda k: example + _question(lines, depths, k, value),
        prefix=_reply(value), answer=answer, parts=names, labels=[f"hop {i}" for i in range(len(names))],
        max_new_tokens=max(MAX_NEW_TOKENS, len(encode(tokenizer, answer)) + 2), id=index, seed=seed,
    )  # fmt: skip


def _chain(rng: random.Random) -> tuple[list[str], str, list[str]]:
    """(names, value, assignments): the first name gets the value, each later one the name before it."""
    names: list[str] = []
    while len(names) <= N_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    return names, value, [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]


def _question(lines: list[str], depths: list[float], n_noise: int, value: str) -> str:
    """The task with `n_noise` units of noise; assignments at ascending shares of it, so that their order stays."""
    hay = [NOISE] * n_noise
    for depth, line in reversed(list(zip(depths, lines, strict=True))):
        hay.insert(round(depth * n_noise), f"{line}.")
    return f"Follow the variables in this text.\n\n{' '.join(hay)}\n\nWhich variables have the value {value} in the text above?"


def _reply(value: str) -> str:
    return f"These {N_HOPS + 1} variables have the value {value}:"


TASK = Task(samples, group="ruler")
