"""Scores of one sample behind a cache that methods compress: the context is read once, then every question on a copy of what is left of it.

A copy, since a compressed cache cannot be cut back past an eviction. Dense is scored the same way beside such methods, or the difference between the
two ways would count as the methods'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accel.evals.scoring.single import Scored, decode, device_of, greedy, prefill, rows_of_logits, split_by_answer, token_log_probs
from accel.evals.tasks import Answer, Sample
from accel.evals.tasks._rules import RULES
from accel.evals.timing import Lap, Stopwatch, Times
from accel.protocols import KVCompression, Method

# of a shared prefill, the last tokens that every method reads itself
TAIL = 64


@dataclass(frozen=True)
class Prefix:
    """The cache of a sample's first tokens, made with no method on; never written to."""

    prompt_hash: str
    n_tokens: int
    cache: Any


def n_context(sample: Sample) -> int:
    """Tokens that are read before the first question: the prompt, or what stands before the first answer's lead."""
    if sample.n_prompt is not None:
        return sample.n_prompt
    return min(_begin(a) for a in sample.answers)


def questions(sample: Sample) -> list[tuple[int, list[Answer]]]:
    """What is asked behind the context: the first token of each pass, and its answers. Answers without a lead are one pass."""
    found: dict[int, list[Answer]] = {}
    begin = n_context(sample)
    for answer in sample.answers:
        found.setdefault(begin if answer.lead is None else answer.lead, []).append(answer)
    return list(found.items())


def shared_prefix(model: Any, sample: Sample) -> Prefix | None:
    """All of the context but its last TAIL tokens, prefilled with nothing applied; None where there is no more than that."""
    n = n_context(sample) - TAIL
    if n < 1:
        return None
    with torch.no_grad():
        return Prefix(sample.prompt_hash, n, prefill(model, _ids(model, sample.input_ids[:n]))[1])


def can_share(methods: Sequence[Method]) -> bool:
    """Whether methods find all that they ask the host for in the last TAIL tokens of the context, told of the cache behind the rest."""
    for method in methods:
        if not isinstance(method, KVCompression):
            return False
        needs = method.needs()
        if needs.attention_mass or needs.every_step or needs.n_queries > TAIL:
            return False
    return True


def score_behind_cache(
    model: Any, tokenizer: Any, sample: Sample, *, prefix: Prefix | None = None, on_prefill: Callable[[], None] | None = None
) -> Scored:
    """Scores of a sample under whatever is applied to `model`. `on_prefill` is called behind the context, before any question.

    Samples with `n_prompt`: the tokens of the answer are scored one by one behind the prompt, and the model writes its own reply greedily. Samples
    without: every question with its right answer is one pass behind the context. prefix: goes on from there, and `prefill_ms` is that of the rest.
    """
    if prefix is not None and prefix.prompt_hash != sample.prompt_hash:
        raise ValueError("this prefix is of another prompt")
    with torch.no_grad():
        n, watch = n_context(sample), Stopwatch(device_of(model))
        with watch.lap() as reading:
            done, cache = (0, None) if prefix is None else (prefix.n_tokens, copy.deepcopy(prefix.cache))
            first, cache = prefill(model, _ids(model, sample.input_ids[done:n]), cache)
            int(first.argmax(-1))
        if on_prefill:
            on_prefill()
        if sample.n_prompt is None:
            scored = _asked(model, tokenizer, sample, first, cache, reading)
        else:
            scored = _written(model, tokenizer, sample, first, cache, reading, watch)
        # what the shared part took is in none of the times that begin with the prompt, and its energy is nowhere
        return scored if prefix is None else replace(scored, times=replace(scored.times, ttft_ms=None, e2el_ms=None, energy_j=None))


def _asked(model: Any, tokenizer: Any, sample: Sample, first: Tensor, cache: Any, reading: Lap) -> Scored:
    log_probs: dict[Answer, float] = {}
    hits: dict[Answer, float] = {}
    texts: dict[Answer, str] = {}
    asked = questions(sample)
    for i, (begin, answers) in enumerate(asked):
        own = cache if i == len(asked) - 1 else copy.deepcopy(cache)
        stop = max(a.stop for a in answers)
        # the row before a token predicts it
        rows = torch.tensor([t - 1 - begin for a in answers for t in range(a.start, a.stop)], device=first.device)
        logits = rows_of_logits(model, _ids(model, sample.input_ids[begin : stop - 1]), rows, own)
        target = torch.tensor([t for a in answers for t in sample.input_ids[a.start : a.stop]], device=first.device)
        found = list(zip(logits.argmax(-1).tolist(), token_log_probs(logits, target).tolist(), strict=True))
        for answer, tokens in zip(answers, split_by_answer(found, answers), strict=True):
            given = [guess for guess, _ in tokens]
            log_probs[answer] = sum(p for _, p in tokens)
            hits[answer] = float(tuple(given) == sample.input_ids[answer.start : answer.stop])
            texts[answer] = tokenizer.decode(given)
    in_order = [log_probs[a] for a in sample.answers], [hits[a] for a in sample.answers], [texts[a] for a in sample.answers]
    return Scored(*in_order, reading.ms, Times.of_prompt(reading))


def _written(model: Any, tokenizer: Any, sample: Sample, first: Tensor, cache: Any, reading: Lap, watch: Stopwatch) -> Scored:
    assert sample.n_prompt is not None
    target = torch.tensor(sample.input_ids[sample.n_prompt :], device=first.device)
    rows, own = [first], copy.deepcopy(cache)
    for token in target[:-1]:
        rows.append(decode(model, token, own))
    log_probs = token_log_probs(torch.stack(rows), target).tolist()
    del own
    with watch.lap() as writing:
        written = greedy(model, first, cache, sample.max_new_tokens)
    reply = tokenizer.decode(written.tokens, skip_special_tokens=True)
    return Scored(
        log_probs=[sum(log_probs[a.start - sample.n_prompt : a.stop - sample.n_prompt]) for a in sample.answers],
        hits=[RULES[sample.rule](a.text, reply) for a in sample.answers],
        texts=[reply] * len(sample.answers),
        prefill_ms=reading.ms,
        times=Times.of_reply(reading, writing, n_output_tokens=written.n_output_tokens, finish_reason=written.finish_reason),
    )


def _begin(answer: Answer) -> int:
    """Where its pass would begin: at its question, or else with the token that predicts it."""
    return answer.start - 1 if answer.lead is None else answer.lead


def _ids(model: Any, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], device=device_of(model))
