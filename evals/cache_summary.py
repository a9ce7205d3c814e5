"""What text tasks show of methods that drop cache entries: differences to the controls of their budget, and what a reader must know."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.cached_scoring import TAIL
from accel.evals.decoder_cache import is_compressing
from accel.evals.picture_summary import clustered
from accel.evals.results import SampleRecord
from accel.evals.summary import BASELINE
from accel.evals.tasks import load_task

if TYPE_CHECKING:
    from accel.evals.controls import Control
    from accel.protocols import Method

ASKED_APART = "apart, behind one cache"


def cache_settings(methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of a run say of how text is scored where a method drops cache entries; empty where none does, or nothing is text."""
    if not any(map(is_compressing, methods.values())) or all(load_task(task).kind != "text" for task in tasks):
        return {}
    return {"questions": ASKED_APART, **({"shared_prefill": True} if settings.get("shared_prefill") else {})}


def cache_notices(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about the way of scoring, caches behind pictures, whose tables have no bytes, and caches that are no smaller than a whole one."""
    found = []
    if config.get("shared_prefill"):
        found.append(
            f"One unpatched prefill of each prompt, up to its last {TAIL} tokens, was shared by dense and by the methods that ask for no more than "
            "that many queries; they saw the queries of these last tokens only."
        )
    held = [row for row in rows if row["cache"] and row["kind"] != "class"]
    if shares := [f"{row['label']} {row['cache']['peak_bytes'] / row['cache']['whole_bytes']:.1%} ({row['task']})" for row in held
                  if row["kind"] == "picture"]:  # fmt: skip
        found.append(f"Bytes that caches held, of a whole one: {', '.join(shares)}.")
    if large := [row["label"] for row in held if row["cache"]["peak_bytes"] >= row["cache"]["whole_bytes"]]:
        found.append(f"No smaller than a whole cache, as where every prompt fits the budget: {', '.join(dict.fromkeys(large))}.")
    return found


def paired_caches(records: Sequence[SampleRecord], controls: Sequence[Control]) -> dict[str, Any]:
    """`cache_paired` of a result.json: methods minus dense, and minus each control of the same budget, on the prompts that both have; else empty.

    Each row: task, tokens, label, other, and `score` and `log_prob`, differences with a standard error over prompts; bytes, the mean difference of
    the most bytes held, None beside dense.
    """
    mine = [r for r in records if r.picture_hash is None and r.features is None]
    compressed = {r.label for r in mine if r.cache is not None}
    pairs = [(label, BASELINE) for label in dict.fromkeys(r.label for r in mine) if label in compressed]
    pairs += [(label, control.label) for control in controls for label in control.references if label in compressed]
    order = {label: i for i, label in enumerate(dict.fromkeys(r.label for r in mine))}
    pairs.sort(key=lambda pair: (order[pair[0]], order.get(pair[1], 0)))
    by_key = {r.key: r for r in mine}
    found = []
    for task, tokens in dict.fromkeys((r.task, r.tokens) for r in mine):
        for label, other in pairs:
            both = [
                (r, o) for r in mine if (r.task, r.tokens, r.label) == (task, tokens, label)
                and (o := by_key.get(r.key._replace(label=other))) is not None
            ]  # fmt: skip
            if both:
                found.append({"task": task, "tokens": tokens, "label": label, "other": other, **_difference(both)})
    return {"cache_paired": found} if found else {}


def _difference(both: Sequence[tuple[SampleRecord, SampleRecord]]) -> dict[str, Any]:
    prompts = [str(i) for i in range(len(both))]
    exact = clustered([r.exact - o.exact for r, o in both], prompts)
    logs = [r.log_prob - o.log_prob for r, o in both if r.log_prob is not None and o.log_prob is not None]
    sizes = [r.cache["peak_bytes"] - o.cache["peak_bytes"] for r, o in both if r.cache is not None and o.cache is not None]
    return {
        "score": exact.as_dict(), "log_prob": clustered(logs, prompts[: len(logs)]).as_dict() if logs else None,
        "bytes": statistics.fmean(sizes) if sizes else None,
    }  # fmt: skip
