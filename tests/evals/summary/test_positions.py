"""Perplexity by position: means over the right tokens, and a table that names the places."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import byte_tokenizer, tiny_model

from accel.evals.models import LoadedModel
from accel.evals.report.comparisons import comparison_sections
from accel.evals.results import RunFolder, SampleRecord
from accel.evals.runner import rows_of, run_accuracy
from accel.evals.summary.positions import position_rows
from accel.evals.summary.run import summarise_run
from accel.evals.summary.scores import answer_rows


def record(label: str, depths: list[float | None] | None, log_probs: list[float], *, sample: int = 0, tokens: int = 1024) -> SampleRecord:
    shared: dict[str, Any] = {"options": [], "seed": 0, "prompt_hash": str(sample), "log_prob": -1.0, "exact": 0.0, "density": None}
    n = len(log_probs)
    return SampleRecord(
        task="perplexity", label=label, tokens=tokens, sample=sample, n_tokens=tokens, log_probs=log_probs, hits=[0.0] * n, questions=[""] * n,
        expected=[""] * n, answers=[""] * n, sparse_calls=0, dense_calls={}, prefill_ms=1.0, depths=depths, **shared,
    )  # fmt: skip


def test_places_are_means_over_all_prompts_of_a_label_and_length() -> None:
    first = record("dense", [0.5, 0.5, 1.0], [-1.0, -3.0, -0.5])
    second = record("dense", [1.0, 0.5, 1.0], [-1.5, -2.0, -1.0], sample=1)
    other = record("narrow", [0.5, 0.5, 1.0], [-4.0, -4.0, -4.0])
    dense, narrow = position_rows([first, other, second])
    assert (dense["label"], dense["tokens"], dense["depths"], dense["n"]) == ("dense", 1024, [0.5, 1.0], [3, 3])
    assert dense["perplexity"] == pytest.approx([math.exp(2.0), math.exp(1.0)])
    assert narrow["perplexity"] == pytest.approx([math.exp(4.0)] * 2)
    assert len(position_rows([first, record("dense", [0.5, 0.5, 1.0], [-1.0] * 3, tokens=2048)])) == 2


def test_tokens_without_a_place_make_no_row() -> None:
    assert position_rows([record("dense", None, [-1.0, -1.0])]) == []
    assert position_rows([record("dense", [0.5, 1.0, None], [-1.0] * 3)]) == []
    assert position_rows([record("dense", [0.5, 0.5], [-1.0] * 2)]) == []


def test_a_run_records_where_its_scored_tokens_stand(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", {"model": "tiny"})
    loaded = LoadedModel(tiny_model(), byte_tokenizer(), "tiny")
    run_accuracy(loaded, {}, ["perplexity", "fewshot"], [2048], n=1, seed=0, folder=folder, progress=False)
    perplexity, fewshot = folder.records
    assert perplexity.depths is not None
    assert sorted(set(perplexity.depths)) == [i / 16 for i in range(1, 17)]
    assert fewshot.depths is None
    sections = summarise_run(folder.records, rows_of(folder, [perplexity.key, fewshot.key]), [], [])
    [row] = sections["positions"]
    assert row["n"] == [32] * 16
    # a random model of 256 tokens is as lost everywhere
    assert all(150 < value < 400 for value in row["perplexity"])
    assert "depths" not in sections, "shares of right tokens by depth would say nothing here"


def test_a_line_that_is_only_alike_is_shown_as_it_was_written() -> None:
    near = replace(record("dense", None, [-1.0]), hits=[0.9], expected=["return x"], answers=["return y"])
    assert [row["answer"] for row in answer_rows([near, replace(near, hits=[1.0])])] == ["return y", "return x"]


def test_the_report_has_a_table_of_them() -> None:
    rows = position_rows([record("dense", [0.0625, 1.0], [-1.0, -2.0]), record("dense", [0.0625, 1.0], [0.0, 0.0], tokens=2048)])
    [section] = comparison_sections({"positions": rows})
    [table] = section.tables
    assert table.headers == ["tokens", "method", "6%", "100%"]
    assert table.rows == [["1K", "dense", "2.7", "7.4"], ["2K", "dense", "1.0", "1.0"]]
    assert "lower is better" in table.caption
    assert table.group_starts == frozenset({1})
