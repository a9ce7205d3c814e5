"""Where in the prompt an answer was found or lost: shares of right answers by length and depth, for tasks whose answers have a place."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from accel.evals.results import SampleRecord

# beyond so many places, depths are drawn by chance and put together in bins
MOST_PLACES = 11
N_BINS = 5
_IN_QUESTION = re.compile(r"\(at (\d+(?:\.\d+)?)%\)")


def depth_rows(records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    """`depths` of a result.json: one row per task and label whose answers all have a place.

    Each row: task, label, depths (names of the bins, from the front of the prompt to its end), lengths, and by depth and length `share` of right
    answers (None where no answer lies there) and `n`.
    """
    found = []
    for task, label in dict.fromkeys((r.task, r.label) for r in records):
        mine = [r for r in records if (r.task, r.label) == (task, label)]
        answers = [(depth, r.tokens, hit) for r in mine for depth, hit in zip(depths_of(r), r.hits, strict=True)]
        if any(depth is None for depth, _, _ in answers):
            continue
        # the same bins for all labels of a task, whatever of it each of them has answered
        places = sorted({depth for r in records if r.task == task for depth in depths_of(r) if depth is not None})
        bins = _bins(places)
        lengths = sorted({tokens for _, tokens, _ in answers})
        cells = [[[hit for depth, tokens, hit in answers if tokens == length and _is_in(depth, low, high)] for length in lengths]
                 for _, low, high in bins]  # fmt: skip
        share, n = [[sum(cell) / len(cell) if cell else None for cell in row] for row in cells], [[len(cell) for cell in row] for row in cells]
        found.append({"task": task, "label": label, "depths": [name for name, _, _ in bins], "lengths": lengths, "share": share, "n": n})
    return found


def depths_of(record: SampleRecord) -> list[float | None]:
    """The depth of each answer, a share of the prompt: as the record has it, or as its question tells it ("… (at 33%)"), as in older runs."""
    if record.depths is not None:
        return list(record.depths)
    found = [_IN_QUESTION.search(question) for question in record.questions]
    return [None if match is None else float(match[1]) / 100 for match in found]


def _bins(places: Sequence[float]) -> list[tuple[str, float, float]]:
    """Name, low and high end of each bin; where there are few places, one for each."""
    if len(places) <= MOST_PLACES:
        return [(f"{100 * place:.0f} %", place, place) for place in places]
    edges = [i / N_BINS for i in range(N_BINS + 1)]
    return [(f"{100 * low:.0f}–{100 * high:.0f} %", low, high) for low, high in itertools.pairwise(edges)]


def _is_in(depth: float | None, low: float, high: float) -> bool:
    # the last bin holds its own end
    return depth is not None and (depth == low if low == high else low <= depth < high or high == depth == 1.0)
