"""Rules by which a written reply is compared with a right answer, as the benchmarks publish them: each gives 1.0 for right and 0.0 for wrong, or
something between where the rule has degrees."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable


def contains(answer: str, reply: str) -> float:
    """RULER's rule for all tasks but question answering: the answer stands somewhere in the reply, in capitals or not."""
    return float(answer.lower() in reply.lower())


def first_number(answer: str, reply: str) -> float:
    """InfiniteBench's rule for pass keys and number strings: the first run of digits in the reply is the answer."""
    found = re.search(r"[0-9]+", reply)
    return float(found is not None and found[0] == answer)


def word(answer: str, reply: str) -> float:
    """InfiniteBench's rule for key-value retrieval: the answer is one of the reply's words, between blanks and punctuation."""
    return float(answer in re.split(r"[\s:\"'.,?!{}]+", reply))


def line_similarity(answer: str, reply: str) -> float:
    """How alike the answer and the reply's first line of code are, 0 to 1, after LongBench's rule for code: lines of comment are passed over."""
    lines = [line.strip() for line in reply.splitlines()]
    code = next((line for line in lines if line and not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, answer, code, autojunk=False).ratio()


RULES: dict[str, Callable[[str, str], float]] = {rule.__name__: rule for rule in (contains, first_number, word, line_similarity)}
