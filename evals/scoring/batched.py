"""Scores of several prompts that the model reads together, padded to the longest; the same as those of each alone (`accel.evals.scoring.single`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accel.errors import UnsupportedError
from accel.evals.prompt_cache import branch, cache_argument
from accel.evals.scoring.single import Scored, Written, device_of, end_tokens, keeps_rows, split_by_answer, token_log_probs
from accel.evals.tasks import Sample
from accel.evals.tasks._rules import RULES
from accel.evals.timing import Stopwatch, Times

# of the logits' spread, by which padding may change them: rounding, half precision included
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


def score_batch(model: Any, tokenizer: Any, samples: Sequence[Sample], *, on_prefill: Callable[[], None] | None = None) -> list[Scored]:
    """Scores of samples of one task under whatever is applied to `model`, in their order; times and `on_prefill` are those of the batch.

    Samples without `n_prompt` are padded on the right, where no token sees it; prompts behind which the model writes on the left, so that all end
    together.
    """
    scorer = _teacher_forced if samples[0].n_prompt is None else _generated
    with torch.no_grad():
        return scorer(model, tokenizer, samples, on_prefill)


def require_padding(model: Any, name: str) -> None:
    """Raises UnsupportedError for a model that reads a padded prompt otherwise than the same prompt alone. Ask with no method on."""
    missing = {"attention_mask"} - _arguments(model)
    if missing:
        raise UnsupportedError(f"{name} cannot read prompts in batches: its forward takes no attention_mask. --batch-size 1 can be had")
    long = torch.arange(3, 27, device=device_of(model)) % model.config.get_text_config().vocab_size
    short = long[5:18]
    with torch.no_grad():
        alone = _Batch([short]).read(model)[0][0].float()
        padded = _Batch([long, short]).read(model)[0][1].float()
    error = float((padded - alone).norm() / (alone - alone.mean()).norm())
    # written as `<=`: a NaN must fail
    if not error <= _TOLERANCE.get(next(iter(model.parameters())).dtype, 0.05):
        raise UnsupportedError(
            f"{name} cannot read prompts in batches: padding changes its logits by {error:.1%} of their spread. --batch-size 1 can be had"
        )


@dataclass
class _Batch:
    """Prompts padded on the left, and what a forward over them needs; `step` goes on with one token per prompt."""

    ids: list[Tensor]
    mask: Tensor | None = None
    lengths: Tensor | None = None

    def read(self, model: Any) -> tuple[Tensor, Any]:
        """Logits (B, vocabulary) behind the prompts, and their cache."""
        lengths = torch.tensor([len(row) for row in self.ids], device=self.ids[0].device)
        padded = pad_sequence(self.ids, batch_first=True, padding_side="left")
        columns = torch.arange(padded.shape[1], device=padded.device)
        mask = (columns >= padded.shape[1] - lengths[:, None]).long()
        self.lengths = lengths
        # without padding the model runs as it does with one prompt
        self.mask = None if bool(mask.all()) else mask
        last = {"logits_to_keep": 1} if keeps_rows(model) else {}
        out = model(input_ids=padded, use_cache=True, **last, **self._places(model, (mask.cumsum(-1) - 1).clamp(min=0)))
        return out.logits[:, -1], getattr(out, cache_argument(model))

    def step(self, model: Any, tokens: Tensor, cache: Any, n_before: int) -> Tensor:
        """Logits (B, vocabulary) behind one more token each (B,), the first but `n_before` behind the prompts; they join the cache."""
        assert self.lengths is not None
        positions = (self.lengths + n_before)[:, None]
        places = self._places(model, positions, n_more=n_before + 1)
        logits: Tensor = model(input_ids=tokens[:, None], use_cache=True, **places, **{cache_argument(model): cache}).logits[:, -1]
        return logits

    def _places(self, model: Any, positions: Tensor, *, n_more: int = 0) -> dict[str, Tensor]:
        if self.mask is None:
            return {}
        mask = torch.nn.functional.pad(self.mask, (0, n_more), value=1)
        return {"attention_mask": mask, **({"position_ids": positions} if "position_ids" in _arguments(model) else {})}


def _teacher_forced(model: Any, tokenizer: Any, samples: Sequence[Sample], on_prefill: Callable[[], None] | None) -> list[Scored]:
    device = device_of(model)
    ids = [torch.tensor(sample.input_ids, device=device) for sample in samples]
    padded = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    # the row before a token predicts it
    rows = [torch.tensor([i - 1 for a in sample.answers for i in range(a.start, a.stop)], device=device) for sample in samples]
    wanted = torch.unique(torch.cat(rows))
    with Stopwatch(device).lap() as reading:
        places = {} if bool(mask.all()) else {"attention_mask": mask}
        kept = {"logits_to_keep": wanted} if keeps_rows(model) else {}
        logits = model(input_ids=padded, use_cache=False, **places, **kept).logits
        # row of the prompt -> row of these logits
        mine = [torch.searchsorted(wanted, row) if kept else row for row in rows]
        guesses = [logits[i, row].argmax(-1).tolist() for i, row in enumerate(mine)]
    if on_prefill:
        on_prefill()
    found = []
    for i, sample in enumerate(samples):
        log_probs = token_log_probs(logits[i, mine[i]], ids[i][rows[i] + 1]).tolist()
        given = split_by_answer(guesses[i], sample.answers)
        found.append(Scored(
            log_probs=[sum(tokens) for tokens in split_by_answer(log_probs, sample.answers)],
            hits=[float(tuple(g) == sample.input_ids[a.start : a.stop]) for g, a in zip(given, sample.answers, strict=True)],
            texts=[tokenizer.decode(g) for g in given], prefill_ms=reading.ms, times=Times.of_prompt(reading).of_batch(), batch=len(samples),
        ))  # fmt: skip
    return found


def _generated(model: Any, tokenizer: Any, samples: Sequence[Sample], on_prefill: Callable[[], None] | None) -> list[Scored]:
    device, watch = device_of(model), Stopwatch(device_of(model))
    prompts = [torch.tensor(sample.input_ids[: sample.n_prompt], device=device) for sample in samples]
    targets = [torch.tensor(sample.input_ids[sample.n_prompt :], device=device) for sample in samples]
    batch = _Batch(prompts)
    with watch.lap() as reading:
        first, cache = batch.read(model)
        first.argmax(-1).tolist()
    if on_prefill:
        on_prefill()
    # what stands behind a shorter answer is read and not scored
    forced = pad_sequence(targets, batch_first=True)
    with branch(cache, max(map(len, prompts))) as own:
        rows = [first, *(batch.step(model, tokens, own, n) for n, tokens in enumerate(forced.T[:-1]))]
    del own
    logits = torch.stack(rows, 1)
    log_probs = [token_log_probs(logits[i, : len(target)], target).tolist() for i, target in enumerate(targets)]
    with watch.lap() as writing:
        replies = _greedy(model, batch, first, cache, [sample.max_new_tokens for sample in samples])
    found = []
    for sample, tokens, reply in zip(samples, log_probs, replies, strict=True):
        assert sample.n_prompt is not None
        text = tokenizer.decode(reply.tokens, skip_special_tokens=True)
        times = Times.of_reply(reading, writing, n_output_tokens=reply.n_output_tokens, finish_reason=reply.finish_reason).of_batch()
        found.append(Scored(
            log_probs=[sum(tokens[a.start - sample.n_prompt : a.stop - sample.n_prompt]) for a in sample.answers],
            hits=[RULES[sample.rule](a.text, text) for a in sample.answers],
            texts=[text] * len(sample.answers), prefill_ms=reading.ms, times=times, batch=len(samples),
        ))  # fmt: skip
    return found


def _greedy(model: Any, batch: _Batch, logits: Tensor, cache: Any, most: Sequence[int]) -> list[Written]:
    """The likeliest tokens one after the other, until every prompt has its end token or `most` tokens."""
    ends, replies = end_tokens(model), [Written([], "length") for _ in most]
    is_open = [True] * len(most)
    n = 0
    while True:
        tokens = logits.argmax(-1)
        for i, token in enumerate(tokens.tolist()):
            if is_open[i] and token in ends:
                replies[i], is_open[i] = Written(replies[i].tokens, "stop"), False
            elif is_open[i]:
                replies[i].tokens.append(token)
                is_open[i] = len(replies[i].tokens) < most[i]
        if not any(is_open):
            return replies
        logits = batch.step(model, tokens, cache, n)
        n += 1


def _arguments(model: Any) -> set[str]:
    # asked of the class: a patched or wrapped forward may hide its arguments
    return set(inspect.signature(type(model).forward).parameters)
