"""Perplexity by position: where in the prompt a method begins to read worse, for tasks whose scored tokens stand in several places of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from accel.evals.results import SampleRecord


def position_rows(records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    """`positions` of a result.json: one row per task, length and label whose answers all tell their place.

    Each row: task, tokens, label, depths (shares of the prompt, ascending), and by depth the `perplexity` of the tokens there and their number `n`.
    records: of tasks whose score is a perplexity, one answer per token.
    """
    found = []
    for task, tokens, label in dict.fromkeys((r.task, r.tokens, r.label) for r in records):
        mine = [r for r in records if (r.task, r.tokens, r.label) == (task, tokens, label)]
        by_depth: dict[float | None, list[float]] = {}
        for record in mine:
            for depth, log_prob in zip(record.depths or [None] * len(record.log_probs), record.log_probs, strict=True):
                by_depth.setdefault(depth, []).append(log_prob)
        depths = sorted(depth for depth in by_depth if depth is not None)
        if None in by_depth or len(depths) < 2:
            continue
        found.append(
            {"task": task, "tokens": tokens, "label": label, "depths": depths,
             "perplexity": [math.exp(-statistics.fmean(by_depth[d])) for d in depths], "n": [len(by_depth[d]) for d in depths]}
        )  # fmt: skip
    return found
