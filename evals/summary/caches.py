"""What a reader must know of text tasks beside methods that drop cache entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.decoder_cache import is_compressing
from accel.evals.scoring.cached import TAIL
from accel.evals.tasks import load_task

if TYPE_CHECKING:
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
