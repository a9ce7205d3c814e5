"""Finished samples as table rows: one per task, length and method, with n and a standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from accel.evals.results import SampleRecord
from accel.evals.summary.times import prefills_of, spread, timings_of

BASELINE = "dense"
# prompts with more answers than this are texts, not questions
MOST_ANSWERS_SHOWN = 8


def summarise(records: Sequence[SampleRecord], metric: Literal["exact", "perplexity"]) -> dict[str, Any]:
    """One row from all samples of one task, length and method.

    score: the share of right answers, a mean over prompts, or the perplexity of their tokens. n: answers. The standard error is taken over prompts,
    since the answers of one prompt depend on each other; over answers where there is one prompt only; `stderr_over` tells which. kept_share: of the
    visual tokens, as reached, a mean over the decoder layers. cache: as `cache_of` returns it.
    """
    first = records[0]
    exact = _mean_and_error([r.hits for r in records])
    log_prob = _mean_and_error([r.log_probs for r in records]) if all(r.log_probs for r in records) else (None, None)
    if metric == "perplexity":
        assert log_prob[0] is not None
        value = math.exp(-log_prob[0])
        # d exp(−x) = −exp(−x) dx
        score = {"name": metric, "value": value, "stderr": None if log_prob[1] is None else value * log_prob[1]}
    else:
        score = {"name": metric, "value": exact[0], "stderr": exact[1]}
    densities = [r.density for r in records if r.density is not None]
    selection = [r.selection_ms for r in records if r.selection_ms is not None]
    n_sparse, dense_calls = sum(r.sparse_calls for r in records), _added([r.dense_calls for r in records])
    return {
        "task": first.task,
        "label": first.label,
        "options": first.options,
        "tokens": first.tokens,
        "kind": "class" if first.features is not None else "text" if first.picture_hash is None else "picture",
        "is_baseline": first.label == BASELINE,
        "n": sum(len(r.hits) for r in records),
        "n_prompts": len(records),
        "score": score,
        "stderr_over": "prompts" if len(records) > 1 else "answers",
        "log_prob": log_prob[0],
        "log_prob_stderr": log_prob[1],
        "density": statistics.fmean(densities) if densities else None,
        "keep": asked_of(records),
        "kept_share": kept_share_of(records),
        "visual_tokens": statistics.fmean(r.visual_tokens for r in records),
        "cache": cache_of(records),
        "calls": {"sparse": n_sparse, "dense": dense_calls},
        "prefill_ms": spread(prefills_of(records)),
        "selection_ms": spread(selection),
        **timings_of(records),
        "hash": {"prompts": sorted({r.prompt_hash for r in records})},
        "note": _note(n_sparse, dense_calls, _added([r.not_pruned for r in records])),
    }


def kept_share_of(records: Sequence[SampleRecord]) -> float | None:
    """Share of the visual tokens that was kept, as a mean; all of a prompt that was left whole. None where nothing was asked to leave."""
    if not any(_was_asked(r) for r in records):
        return None
    return statistics.fmean(1.0 if r.kept_share is None else r.kept_share for r in records)


def kept_tokens_of(records: Sequence[SampleRecord]) -> float | None:
    """Visual tokens behind the last layer at which tokens leave, as a mean; all of a prompt that was left whole. None as for the share."""
    if not any(_was_asked(r) for r in records):
        return None
    return statistics.fmean(r.visual_tokens if r.kept_tokens is None else r.kept_tokens for r in records)


def cache_of(records: Sequence[SampleRecord]) -> dict[str, Any] | None:
    """Figures of compressed caches (`drawn.cache_figures`), every one as a mean over the samples that have them; None where none has."""
    found = [r.cache for r in records if r.cache is not None]
    if not found:
        return None
    return {key: _mean([figures[key] for figures in found]) for key in found[0]}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of lists of numbers place by place."""
    return [statistics.fmean(place) for place in zip(*values, strict=True)] if isinstance(values[0], list) else statistics.fmean(values)


def asked_of(records: Sequence[SampleRecord]) -> float | int | None:
    """What was asked to be kept; None where that was something else for each prompt."""
    return records[0].keep if len({r.keep for r in records}) == 1 else None


def _was_asked(record: SampleRecord) -> bool:
    return record.kept_share is not None or bool(record.not_pruned)


def answer_rows(records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    """One row per question and method, of the first text prompt of each task and length, where its answers are few enough to be read.

    A right answer is shown as it was expected, also where it is only a part of the reply.
    """
    return [
        {"task": r.task, "question": f"{r.task} {r.tokens}: {question}", "expected": expected, "label": r.label,
         "answer": expected if hit == 1.0 else answer, "log_prob": log_prob}
        for r in records
        if r.sample == 0 and r.picture_hash is None and r.features is None and len(r.expected) <= MOST_ANSWERS_SHOWN
        for question, expected, answer, hit, log_prob in zip(r.questions, r.expected, r.answers, r.hits, r.log_probs, strict=True)
    ]  # fmt: skip


def _mean_and_error(values: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean over the groups' means and its standard error, or over the values of a single group. No error for a single value.

    Prompts count the same however many answers they have, as they do where they are compared.
    """
    units = [statistics.fmean(group) for group in values] if len(values) > 1 else list(values[0])
    return statistics.fmean(units), statistics.stdev(units) / math.sqrt(len(units)) if len(units) > 1 else None


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for reason, n in count.items():
            total[reason] = total.get(reason, 0) + n
    return total


def _note(sparse: int, dense: dict[str, int], not_pruned: dict[str, int]) -> str:
    """Which calls of the prefill ran dense, for methods that ought to be sparse, and which prompts were left whole."""
    parts = [f"not pruned: {_reasons(not_pruned)}"] if not_pruned else []
    if dense:
        parts.append(f"dense calls: {_reasons(dense)}" if sparse else f"ran dense: {_reasons(dense)}")
    return "; ".join(parts)


def _reasons(counts: dict[str, int]) -> str:
    """ "dense layer (12), decode (3)", the most frequent first."""
    return ", ".join(f"{reason} ({n})" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))
