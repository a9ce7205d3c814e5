"""What a run tells beyond its scores: tests and fronts without the tasks that failed their gate, and maps of what the heads read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import byte_tokenizer, tiny_model
from written_runs import write_run

from accel.evals.compare.folders import read_sources
from accel.evals.models import LoadedModel
from accel.evals.summary.run import MOST_MAPPED_TOKENS, log_prob_tasks, map_heads, summarise_run
from accel.registry import build

pytest.importorskip("scipy")


def test_a_task_that_failed_its_gate_is_in_no_test_and_on_no_front(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"m": [1, 0]})
    [source] = read_sources([folder])
    rows = json.loads((folder / "result.json").read_text())["scores"]
    found = summarise_run(source.records, rows, ["m"], [])
    assert {"comparisons", "depths", "fronts"} <= set(found)
    assert [row["label"] for row in found["fronts"]] == ["dense", "m"]
    failed = summarise_run(source.records, rows, ["m"], [], gates=[{"task": "needle", "passes": False}])
    assert not {"comparisons", "fronts"} & set(failed)
    assert "comparisons" in summarise_run(source.records, rows, ["m"], [], gates=[{"task": "needle", "passes": True}])


def test_tasks_scored_by_perplexity_are_told_by_their_rows() -> None:
    assert log_prob_tasks([{"task": "a", "score": {"name": "exact"}}, {"task": "b", "score": {"name": "perplexity"}}]) == {"b"}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model(positions=2048), byte_tokenizer(), "tiny")


def maps(loaded: LoadedModel, lengths: list[int], tasks: list[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    sparse = {"streaming": [build("streaming", {"min_seq_len": 0, **options})], "kv": [build("streaming_kv")]}
    return map_heads(loaded, sparse, tasks or ["scene_color", "needle"], lengths, seed=0)


def test_heads_are_mapped_at_the_greatest_length_that_fits(loaded: LoadedModel) -> None:
    [found] = maps(loaded, [1024, 1536, MOST_MAPPED_TOKENS + 1], block_size=64)
    assert (found["label"], found["tokens"], found["n_layers"]) == ("streaming", 1536, 3)
    assert {layer: len(heads) for layer, heads in found["density"].items()} == {"0": 4, "1": 4, "2": 4}
    assert all(0 < density < 1 for heads in found["density"].values() for density in heads)


def test_there_is_no_map_without_text_sparse_attention_or_a_sparse_call(loaded: LoadedModel) -> None:
    assert maps(loaded, [1024], ["scene_color"]) == []
    assert maps(loaded, [MOST_MAPPED_TOKENS * 2]) == []
    assert maps(loaded, [1024], min_seq_len=4096) == []
    assert map_heads(loaded, {"kv": [build("streaming_kv")]}, ["needle"], [1024], seed=0) == []
