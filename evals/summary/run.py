"""What a run tells beyond its table of scores: paired tests, scores by depth, accuracy against time, and which blocks each head read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.results import SampleRecord
from accel.evals.summary.depths import depth_rows
from accel.evals.summary.fronts import front_rows, without_times
from accel.evals.summary.positions import position_rows
from accel.evals.summary.significance import compared, planned_pairs

if TYPE_CHECKING:
    from accel.evals.controls import Control
    from accel.evals.models import LoadedModel
    from accel.protocols import Method

# the maps of a longer prompt would take gigabytes
MOST_MAPPED_TOKENS = 32768


def summarise_run(
    records: Sequence[SampleRecord], rows: Sequence[Mapping[str, Any]], methods: Sequence[str], controls: Sequence[Control],
    gates: Sequence[Mapping[str, Any]] = (), *, shares_prefill: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Sections of a result.json: `comparisons`, `depths`, `positions` and `fronts`, those that have rows.

    rows: of `summary.summarise`. methods: labels. gates: of pictures; tasks that failed theirs are left out, as everywhere. shares_prefill: whether
    the run did, so that the times of its prompts of text cannot be compared.
    """
    failed = {gate["task"] for gate in gates if not gate["passes"]}
    shown = [row for row in rows if row["task"] not in failed]
    texts = log_prob_tasks(rows)
    found = {
        "comparisons": compared(records, planned_pairs(methods, controls), log_prob_tasks=texts, left_out=failed),
        "depths": depth_rows([r for r in records if r.task not in texts]),
        "positions": position_rows([r for r in records if r.task in texts]),
        "fronts": front_rows(without_times(shown) if shares_prefill else shown),
    }
    return {key: value for key, value in found.items() if value}


def log_prob_tasks(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Tasks whose score is a perplexity: their samples are compared by log-probability."""
    return {row["task"] for row in rows if row["score"].get("name") == "perplexity"}


def map_heads(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, seed: int
) -> list[dict[str, Any]]:  # fmt: skip
    """`block_maps` of a result.json: what each head reads of the first prompt of the first text task, at its greatest length up to 32K.

    One more prefill for each variant with sparse attention (methods: by label); one that runs dense throughout has no map. Empty without text.
    """
    import torch

    from accel.evals.block_maps import record_block_maps
    from accel.evals.tasks import Task, load_task
    from accel.protocols import SparseAttention

    sparse = {label: group for label, group in methods.items() if any(isinstance(m, SparseAttention) for m in group)}
    task = next((found for name in tasks if isinstance(found := load_task(name), Task)), None)
    fitting = [n for n in lengths if n <= MOST_MAPPED_TOKENS]
    if not sparse or task is None or not fitting:
        return []
    sample = task.samples(loaded.tokenizer, max(fitting), 1, seed)[0]
    ids = torch.tensor([sample.input_ids[: sample.n_prompt]], device=next(iter(loaded.model.parameters())).device)
    maps = {label: record_block_maps(loaded.model, group, ids) for label, group in sparse.items()}
    return [found.as_dict(label, found.typical_heads()) for label, found in maps.items() if found.calls]
