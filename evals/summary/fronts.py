"""Accuracy against time: the mean score of each method beside what its prefill took, and which of them nobody beats at both (the Pareto front)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
CLEAN, SCORED = "ttft_ms", "prefill_ms"


def on_front(scores: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which points no other one beats: at least as high a score at no more cost, and better in one of the two."""
    points = list(zip(scores, costs, strict=True))
    return [not any(s >= score and c <= cost and (s > score or c < cost) for s, c in points) for score, cost in points]


def without_times(scores: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows whose prompts of text have no time: behind a shared prefill some labels were timed on its rest only, others on the whole prompt."""
    return [{**row, SCORED: None} if row.get("kind", "text") == "text" else dict(row) for row in scores]


def front_rows(scores: Sequence[Row], latency: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """`fronts` of a result: a row per length and label, in the order of `scores`; no rows for a length with fewer than two labels that have a time.

    scores: of a result.json. A label's score at a length is the mean over the tasks that all labels have there; perplexities are left out of it, and
    a length that has nothing else is scored by the mean log-probability. latency: rows of `accel bench`; where at least two labels have a time to
    first token there, those times count (`time` is "ttft_ms"), otherwise the medians of the scored passes ("prefill_ms").
    Each row: kind, tokens, tasks, metric, label, score, stderr, time, ms (None where nothing timed it), is_baseline, is_front.
    """
    places = dict.fromkeys((row.get("kind", "text"), row.get("tokens") or 0) for row in scores)
    return [row for place in places for row in _front_at(place, scores, latency)]


def _front_at(place: tuple[str, int], scores: Sequence[Row], latency: Sequence[Row]) -> list[dict[str, Any]]:
    kind, tokens = place
    here = [row for row in scores if (row.get("kind", "text"), row.get("tokens") or 0) == place]
    shares = [row for row in here if row["score"].get("name", "exact") != "perplexity"]
    metric, rows = ("score", shares) if shares else ("log_prob", here)
    by_label: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], {})[row["task"]] = row
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if all(task in own for own in by_label.values())]
    if not tasks:
        return []
    ttft = {row["label"]: row["ms"]["median"] for row in latency if row["metric"] == CLEAN and row["tokens"] == tokens and row["label"] in by_label}
    is_clean = len(ttft) > 1
    found: list[dict[str, Any]] = []
    for label, own in by_label.items():
        timed = [own[task][SCORED]["median"] for task in tasks if own[task].get(SCORED)]
        ms = ttft.get(label) if is_clean else statistics.fmean(timed) if len(timed) == len(tasks) else None
        value, error = mean_score([own[task] for task in tasks], metric)
        found.append(
            {"kind": kind, "tokens": tokens, "tasks": tasks, "metric": metric, "label": label, "score": value, "stderr": error,
             "time": CLEAN if is_clean else SCORED, "ms": ms, "is_baseline": _is_dense(own[tasks[0]])}
        )  # fmt: skip
    timed_rows = [row for row in found if row["ms"] is not None]
    if len(timed_rows) < 2:
        return []
    best = on_front([row["score"] for row in timed_rows], [row["ms"] for row in timed_rows])
    front = {row["label"] for row, is_best in zip(timed_rows, best, strict=True) if is_best}
    return [{**row, "is_front": row["label"] in front} for row in found]


def _is_dense(row: Row) -> bool:
    """The unpatched model, or the control that computes the same."""
    options = row.get("options") or []
    return bool(row.get("is_baseline")) or (bool(options) and all(name == "dense" for entry in options for name in entry))


def mean_score(rows: Sequence[Row], metric: str) -> tuple[float, float | None]:
    """The mean over tasks, each of the same weight, and its standard error as if tasks were independent; None where one has none."""
    pairs = [(row["log_prob"], row.get("log_prob_stderr")) if metric == "log_prob" else (row["score"]["value"], row["score"].get("stderr"))
             for row in rows]  # fmt: skip
    errors = [error for _, error in pairs if error is not None]
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(pairs) if len(errors) == len(pairs) else None
    return statistics.fmean(value for value, _ in pairs), error
