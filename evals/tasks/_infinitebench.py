"""What the InfiniteBench retrieval tasks share (Zhang et al., ACL 2024, arXiv 2402.13718)."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

from accel.evals.tasks import Sample
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._ruler import NOISE

GROUP = "infinitebench"
# the tokens that a model may write, as published
PASSKEY_TOKENS, NUMBER_TOKENS, KV_TOKENS = 6, 12, 50
CAVEAT = (
    "InfiniteBench's retrieval tasks have the published form and rule, wording of our own, and the lengths that were asked for, where the benchmark "
    "has 90 to 125 thousand tokens: compare methods with dense here, not with tables elsewhere."
)


def random_digits(rng: random.Random, n: int) -> str:
    """n digits, a zero first as likely as another."""
    return "".join(rng.choices(string.digits, k=n))


def hidden_number(
    tokenizer: Any, *, task: str, what: str, n_tokens: int, number: Callable[[random.Random], str], max_new_tokens: int, index: int, seed: int
) -> Sample:
    """One prompt with a number, told twice in one place, in a line that is repeated; `what` it is called."""
    rng = sample_rng(task, seed, index)
    depth, answer = rng.random(), number(rng)
    fact = f"The {what} is {answer}. Remember it: {answer} is the {what}."

    def question(n_lines: int) -> str:
        lines = [NOISE] * n_lines
        lines.insert(int(depth * (n_lines + 1)), fact)
        text = " ".join(lines)
        return f"One important fact is hidden in a long text without any importance. Find it and remember it.\n\n{text}\n\nWhat is the {what}?"

    return chat_sample(
        tokenizer, task=task, n_tokens=n_tokens, most_units=n_tokens // 8 + 64, question=question, prefix=f"The {what} is", answer=f" {answer}",
        parts=[answer], labels=[f"{what} (at {depth:.0%})"], max_new_tokens=max_new_tokens, id=index, seed=seed, depths=[depth], rule="first_number",
    )  # fmt: skip
