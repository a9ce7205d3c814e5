"""Variables that pass a value on: RULER's vt, one chain of four hops, five names to find.

Names of five capital letters, a value of five digits, the assignments in order at random lines of one line that is repeated, and one solved example
of some 500 tokens before, its names of three letters. Parameters as published; wording and the repeated line are our own; 30 new tokens, or what
five names need. The score is the share of the names in the reply. Under teacher forcing they stand in the order of the chain.
"""

from __future__ import annotations

import random
import string
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._ruler import CAVEAT, GROUP, NOISE, VT_TOKENS

N_HOPS = 4
N_LETTERS, N_EXAMPLE_LETTERS = 5, 3
N_EXAMPLE_LINES = 10


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with five answers."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("vt", seed, index)
    example_names, example_value, example_lines = _chain(rng, N_EXAMPLE_LETTERS)
    names, value, lines = _chain(rng, N_LETTERS)
    example_depths, depths = (sorted(rng.random() for _ in lines) for _ in range(2))
    example = f"{_question(example_lines, example_depths, N_EXAMPLE_LINES, example_value)}\n{_reply(example_value)} {' '.join(example_names)}\n\n"
    return chat_sample(
        tokenizer, task="vt", n_tokens=n_tokens, most_units=n_tokens // 8 + 64, question=lambda k: example + _question(lines, depths, k, value),
        prefix=_reply(value), answer=f" {' '.join(names)}", parts=names, labels=[f"hop {i}" for i in range(len(names))],
        max_new_tokens=VT_TOKENS, id=index, seed=seed, depths=depths,
    )  # fmt: skip


def _chain(rng: random.Random, n_letters: int) -> tuple[list[str], str, list[str]]:
    """(names, value, assignments): the first name gets the value, each later one the name before it."""
    names: list[str] = []
    while len(names) <= N_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=n_letters))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    return names, value, [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]


def _question(lines: list[str], depths: list[float], n_noise: int, value: str) -> str:
    """The task with `n_noise` lines of noise; assignments at ascending shares of it, so that their order stays."""
    hay = [NOISE] * n_noise
    # no two of them stand side by side
    room = max(n_noise - len(lines) + 1, 0)
    for i, (depth, line) in reversed(list(enumerate(zip(depths, lines, strict=True)))):
        hay.insert(int(depth * room) + i, f"{line}.")
    return "Follow the variables in the text below.\n\n{}\n\nWhich variables have the value {} in the text above?".format("\n".join(hay), value)


def _reply(value: str) -> str:
    return f"By the assignments in the text above, {N_HOPS + 1} variables have the value {value}:"


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
