"""Completion of Python source: perplexity of the last 512 tokens of a module of the standard library.

Prompt of exactly N tokens that ends with the module; where the module is shorter, the sources of other modules stand before it. The scored end is the
same at every length. It does not separate sparse methods from a sliding window: read it beside needle and fewshot, never alone.
"""

from __future__ import annotations

from typing import Any

from accel.errors import OptionError
from accel.evals.tasks import Answer, Sample, Task
from accel.evals.tasks._code import code_before, modules_from
from accel.evals.tasks._prompts import opening, require_length
from accel.evals.tasks._text import SOURCE_MODULES, source

N_SCORED = 512


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts of exactly `n_tokens` tokens, one answer per scored token. Seed 0 begins with argparse; there are as many prompts as modules."""
    if n > len(SOURCE_MODULES):
        raise OptionError(f"code has {len(SOURCE_MODULES)} samples, one per module, asked for {n}")
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    require_length("code", n_tokens, len(opening(tokenizer)) + 1 + N_SCORED)
    module, *more = modules_from(seed + index)
    ids = code_before(tokenizer, "code", source(module), more, n_tokens)
    answers = (Answer(f"{module}, token {i - n_tokens}", tokenizer.decode([ids[i]]), i, i + 1) for i in range(n_tokens - N_SCORED, n_tokens))
    return Sample(index, seed, tuple(ids), tuple(answers))


TASK = Task(samples, metric="perplexity", most_samples=len(SOURCE_MODULES))
