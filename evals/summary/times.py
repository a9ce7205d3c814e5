"""The times of finished samples as figures of one table row: medians with p20 and p80, under vLLM's names."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from accel.evals.results import SampleRecord

# times of one prompt, which a batch does not have
_OF_ONE = ("ttft_ms", "tpot_ms", "e2el_ms")
_SPREAD = (*_OF_ONE, "selection_share", "energy_j")


def timings_of(records: Sequence[SampleRecord]) -> dict[str, Any]:
    """Figures of samples of one task, length and label; None where no sample has them.

    ttft_ms, tpot_ms, e2el_ms, selection_share (of the prefill, host clock) and energy_j: median, p20, p80 and n, the samples that have one.
    peak_bytes: the most of all samples. finish_reasons: replies by why they ended. batch: the most prompts that were read together; above 1,
    energy_j and peak_bytes are those of a batch, of which each is counted once, and the three times are None.
    """
    found: dict[str, Any] = {name: spread([v for r in _once_per_batch(records) if (v := getattr(r, name)) is not None]) for name in _SPREAD}
    most = max(r.batch for r in records)
    if most > 1:
        # a last batch may be a single prompt: its times are no figure of the row
        found |= dict.fromkeys(_OF_ONE)
    peaks = [r.peak_bytes for r in records if r.peak_bytes is not None]
    reasons = Counter(r.finish_reason for r in records if r.finish_reason is not None)
    return {**found, "peak_bytes": max(peaks, default=None), "finish_reasons": dict(sorted(reasons.items())), "batch": most}


def prefills_of(records: Sequence[SampleRecord]) -> list[float]:
    """Prefill times, one of each batch; a last batch that is smaller than the others is left out."""
    most = max(r.batch for r in records)
    return [r.prefill_ms for r in _once_per_batch(records) if r.batch == most]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, p20, p80 and n of some values; None of none."""
    if not values:
        return None
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0], "n": 1}
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "n": len(values)}


def _once_per_batch(records: Sequence[SampleRecord]) -> list[SampleRecord]:
    """One record of each batch, whose samples all carry the same reading of the clock."""
    return list({(r.batch, r.prefill_ms if r.batch > 1 else r.sample): r for r in records}.values())
