"""The next line of a Python module, written by the model: completion of code, scored by how alike the lines are.

The prompt is the source of a module of the standard library up to a random line of its second half, other modules before it where it is too short,
without a chat template; the line has 20 to 80 characters and is no comment. 64 new tokens. The score of a line is its similarity to the first line
of code in the reply, 0 to 1, as LongBench scores LCC and RepoBench-P; texts and lengths are other ones than there.
"""

from __future__ import annotations

import re
from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._code import code_before, modules_from
from accel.evals.tasks._prompts import encode_parts, opening, require_length, sample_rng, written_sample
from accel.evals.tasks._text import SOURCE_MODULES, source

MAX_NEW_TOKENS = 64
SHORTEST, LONGEST = 20, 80
FEWEST_BEFORE = 128
CAVEAT = (
    "code_line: models have seen Python's library in training and may know lines by heart; most of a line follows from the lines just before it. "
    f"There are {len(SOURCE_MODULES)} modules: more prompts than that, or prompts longer than a module, share source, and standard errors, which "
    "take prompts for independent, are too small then."
)


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts that end in a module each, in turn, and leave the reply of `n_tokens` tokens, with one answer; no line twice if there are others."""
    taken: set[tuple[str, int]] = set()
    return [_sample(tokenizer, n_tokens, index, seed, taken) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int, taken: set[tuple[str, int]]) -> Sample:
    """taken: module and line of the samples before; this one joins them."""
    rng = sample_rng("code_line", seed, index)
    module, *more = modules_from(seed + index)
    lines = source(module).splitlines(keepends=True)
    fit = [i for i in range(len(lines) // 2, len(lines)) if _is_fit(lines[i])]
    number = rng.choice(fit)
    if (module, number) in taken:
        number = rng.choice([i for i in fit if (module, i) not in taken] or fit)
    taken.add((module, number))
    line = lines[number]
    expected = encode_parts(tokenizer, line, [line.strip()])
    reserved = max(MAX_NEW_TOKENS, len(expected.ids) + 2)
    require_length("code_line", n_tokens, len(opening(tokenizer)) + FEWEST_BEFORE + reserved)
    prompt = code_before(tokenizer, "code_line", "".join(lines[:number]), more, n_tokens - reserved)
    return written_sample(
        prompt, expected, parts=[line.strip()], labels=[f"{module}, line {number + 1}"], rule="line_similarity", max_new_tokens=reserved, id=index,
        seed=seed,
    )  # fmt: skip


def _is_fit(line: str) -> bool:
    text = line.strip()
    # something is called, assigned or returned: prose of a docstring is no code
    is_code = re.search(r"\w\(|\w = |return |^(if|for|while) .*:$", text) is not None
    return SHORTEST <= len(text) <= LONGEST and is_code and not re.search(r"[#`]|//", text)


TASK = Task(samples, caveat=CAVEAT)
