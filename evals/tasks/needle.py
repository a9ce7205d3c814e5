"""Passkeys: four facts hidden in prose and repeated at the end, scored under teacher forcing.

Prompt of exactly N tokens: help-topic prose with "Note that the magic number for KEY is ddddd." at 8, 33, 58 and 83 % depth; the tail states
the four facts again in the order 3, 1, 4, 2, so that no answer follows from the one before. A number at chance has log-probability
5·ln(1/10) = −11.5 where the tokenizer splits digits. The tail lies inside FlexPrefill's probe (the last block of queries). Retrieval of this
kind separates sparse methods; perplexity does not. Methods that drop cache entries do so before the tail is read, and each fact is asked for behind
the same cache: nobody has told them which of the prose is worth keeping.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Answer, Sample, Task
from accel.evals.tasks._prompts import Piece, encode, encode_parts, filler, insert, opening, require_length, sample_rng
from accel.evals.tasks._text import help_topics
from accel.evals.tasks._words import KEYS

DEPTHS = (0.08, 0.33, 0.58, 0.83)
TAIL_ORDER = (2, 0, 3, 1)
FACT = "\n\nNote that the magic number for {key} is {number}.\n\n"
LEAD = "\n\nHere are the magic numbers once more.\n\n"


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts of exactly `n_tokens` tokens, four answers each, in tail order."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("needle", seed, index)
    keys = rng.sample(KEYS, len(DEPTHS))
    numbers = [str(rng.randrange(10_000, 100_000)) for _ in DEPTHS]
    facts = [encode_parts(tokenizer, FACT.format(key=key, number=number), [number]) for key, number in zip(keys, numbers, strict=True)]
    head, tail_start = opening(tokenizer), encode(tokenizer, LEAD)
    tail = [*tail_start, *(token for i in TAIL_ORDER for token in facts[i].ids)]
    n_fixed = len(head) + len(tail) + sum(len(fact.ids) for fact in facts)
    require_length("needle", n_tokens, 2 * n_fixed)
    text = help_topics()
    prose = filler(tokenizer, text, n_tokens - n_fixed, start=rng.randrange(len(text)), separator="\n\n")
    ids = [*insert([*head, *prose], [fact.ids for fact in facts], DEPTHS, n_tokens), *tail]
    answers = []
    at = n_tokens - len(tail) + len(tail_start)
    for i in TAIL_ORDER:
        answers.append(_answer(facts[i], at, keys[i], numbers[i], DEPTHS[i]))
        at += len(facts[i].ids)
    return Sample(index, seed, tuple(ids), tuple(answers))


def _answer(fact: Piece, at: int, key: str, number: str, depth: float) -> Answer:
    [(start, stop)] = fact.spans
    return Answer(f"{key} (at {depth:.0%})", number, at + start, at + stop, lead=at, depth=depth)


TASK = Task(samples)
