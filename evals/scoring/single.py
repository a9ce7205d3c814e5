"""Scores of one sample on one model: log-probability of the right answers, and whether the model gives them.

Where methods drop cache entries, `accel.evals.scoring.cached` scores instead: one forward over prompt and answers would have no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel.evals.prompt_cache import branch, cache_argument
from accel.evals.tasks import Answer, Sample
from accel.evals.tasks._rules import RULES
from accel.evals.timing import Stopwatch, Times


@dataclass(frozen=True)
class Scored:
    """One entry per answer of the sample.

    log_probs: nats, summed over the tokens of the answer. hits: 1.0 right, 0.0 wrong, or between by the sample's rule. texts: what the model answers
    (teacher-forced samples), or its whole reply. prefill_ms: until the first token behind the prompt is known; teacher-forced, of the one pass.
    batch: samples that were scored together, which all have the figures of the whole batch.
    """

    log_probs: list[float]
    hits: list[float]
    texts: list[str]
    prefill_ms: float
    times: Times = field(default_factory=Times)
    batch: int = 1


class Written(NamedTuple):
    """A reply without its end token, and why it ended: "stop" at that token, "length" at the most that it may have."""

    tokens: list[int]
    finish_reason: str

    @property
    def n_output_tokens(self) -> int:
        """Tokens that the model wrote, the end token among them."""
        return len(self.tokens) + (self.finish_reason == "stop")


def score(model: Any, tokenizer: Any, sample: Sample, *, on_prefill: Callable[[], None] | None = None) -> Scored:
    """Scores of a sample under whatever is applied to `model`. `on_prefill` is called after the prompt, before any decoding.

    Samples without `n_prompt`: one forward over prompt and answers. Samples with: the prompt is prefilled alone, so that nothing of the answer
    can reach a method that looks at the last queries; then its tokens are scored one by one, and the model writes its own reply greedily.
    """
    scorer = _teacher_forced if sample.n_prompt is None else _generated
    with torch.no_grad():
        return scorer(model, tokenizer, sample, on_prefill)


def _teacher_forced(model: Any, tokenizer: Any, sample: Sample, on_prefill: Callable[[], None] | None) -> Scored:
    ids = torch.tensor([sample.input_ids], device=device_of(model))
    # the row before a token predicts it
    rows = torch.tensor([i - 1 for a in sample.answers for i in range(a.start, a.stop)], device=ids.device)
    with Stopwatch(device_of(model)).lap() as prompt:
        logits = rows_of_logits(model, ids, rows)
        guesses = logits.argmax(-1).tolist()
    if on_prefill:
        on_prefill()
    log_probs = token_log_probs(logits, ids[0, rows + 1]).tolist()
    per_answer = split_by_answer(list(zip(guesses, log_probs, strict=True)), sample.answers)
    given = [[guess for guess, _ in tokens] for tokens in per_answer]
    return Scored(
        log_probs=[sum(p for _, p in tokens) for tokens in per_answer],
        hits=[float(tuple(g) == sample.input_ids[a.start : a.stop]) for g, a in zip(given, sample.answers, strict=True)],
        texts=[tokenizer.decode(g) for g in given],
        prefill_ms=prompt.ms,
        times=Times.of_prompt(prompt),
    )


def _generated(model: Any, tokenizer: Any, sample: Sample, on_prefill: Callable[[], None] | None) -> Scored:
    assert sample.n_prompt is not None
    prompt = torch.tensor([sample.input_ids[: sample.n_prompt]], device=device_of(model))
    watch = Stopwatch(device_of(model))
    with watch.lap() as reading:
        first, cache = prefill(model, prompt)
        int(first.argmax(-1))
    if on_prefill:
        on_prefill()
    target = torch.tensor(sample.input_ids[sample.n_prompt :], device=prompt.device)
    with branch(cache, sample.n_prompt) as own:
        rows = [first, *(decode(model, token, own) for token in target[:-1])]
    del own
    log_probs = token_log_probs(torch.stack(rows), target).tolist()
    spans = [slice(a.start - sample.n_prompt, a.stop - sample.n_prompt) for a in sample.answers]
    with watch.lap() as writing:
        written = greedy(model, first, cache, sample.max_new_tokens)
    reply = tokenizer.decode(written.tokens, skip_special_tokens=True)
    return Scored(
        log_probs=[sum(log_probs[span]) for span in spans],
        hits=[RULES[sample.rule](a.text, reply) for a in sample.answers],
        texts=[reply] * len(sample.answers),
        prefill_ms=reading.ms,
        times=Times.of_reply(reading, writing, n_output_tokens=written.n_output_tokens, finish_reason=written.finish_reason),
    )


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of targets (rows,) under logits (rows, vocabulary), fp32."""
    logits = logits.float()
    # not log_softmax: that would be a second tensor as large as the logits
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def rows_of_logits(model: Any, ids: Tensor, rows: Tensor, cache: Any = None) -> Tensor:
    """Logits (len(rows), vocabulary) of some rows of ids (1, L), behind a cache or nothing; the head runs on these alone where it can."""
    before = {"use_cache": False} if cache is None else {"use_cache": True, cache_argument(model): cache}
    if keeps_rows(model):
        kept: Tensor = model(input_ids=ids, logits_to_keep=rows, **before).logits[0]
        return kept
    everything: Tensor = model(input_ids=ids, **before).logits[0]
    return everything[rows]


def prefill(model: Any, prompt: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits (vocabulary,) behind the prompt (1, L), and its cache: a new one, or that of what stands before."""
    last = {"logits_to_keep": 1} if keeps_rows(model) else {}
    out = model(input_ids=prompt, use_cache=True, **last, **({} if cache is None else {cache_argument(model): cache}))
    return out.logits[0, -1], getattr(out, cache_argument(model))


def decode(model: Any, token: Tensor, cache: Any) -> Tensor:
    """Logits (vocabulary,) behind one more token, which joins the cache."""
    logits: Tensor = model(input_ids=token.view(1, 1), use_cache=True, **{cache_argument(model): cache}).logits[0, -1]
    return logits


def greedy(model: Any, logits: Tensor, cache: Any, n_tokens: int) -> Written:
    """The likeliest tokens one after the other. Not `generate`: a model's own settings may sample or penalise."""
    ends, found = end_tokens(model), list[int]()
    while True:
        token = logits.argmax(-1)
        if int(token) in ends:
            return Written(found, "stop")
        found.append(int(token))
        if len(found) == n_tokens:
            return Written(found, "length")
        logits = decode(model, token, cache)


def end_tokens(model: Any) -> set[int | None]:
    """The tokens with which a reply ends."""
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def split_by_answer(tokens: Sequence[Any], answers: Sequence[Answer]) -> list[list[Any]]:
    """One flat entry per token, as one list per answer."""
    found, at = [], 0
    for answer in answers:
        n = answer.stop - answer.start
        found.append(list(tokens[at : at + n]))
        at += n
    return found


def keeps_rows(model: Any) -> bool:
    # asked of the class: a patched or wrapped forward may hide its arguments
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def device_of(model: Any) -> torch.device:
    device: torch.device = next(iter(model.parameters())).device
    return device
