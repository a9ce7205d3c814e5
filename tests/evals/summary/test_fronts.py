"""Accuracy against time: who is on the front, whose times count; and shares of right answers by length and depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from accel.evals.report.comparisons import front_table
from accel.evals.results import SampleRecord
from accel.evals.summary.depths import depth_rows, depths_of
from accel.evals.summary.fronts import front_rows, mean_score, on_front, without_times


def score_row(label: str, value: float, ms: float | None = None, *, task: str = "needle", tokens: int = 1024, **changes: Any) -> dict[str, Any]:
    spread = None if ms is None else {"median": ms, "p20": ms, "p80": ms}
    row = {"task": task, "label": label, "tokens": tokens, "kind": "text", "is_baseline": label.startswith("dense"), "n": 4,
           "score": {"name": "exact", "value": value, "stderr": 0.1}, "log_prob": -value, "log_prob_stderr": 0.2, "prefill_ms": spread}  # fmt: skip
    return {**row, **changes}


def timed(label: str, ms: float, tokens: int = 1024) -> dict[str, Any]:
    return {"metric": "ttft_ms", "label": label, "tokens": tokens, "ms": {"median": ms}}


def test_the_front_holds_what_nobody_beats_at_both() -> None:
    assert on_front([1.0, 0.9, 0.8, 0.8, 0.2], [10, 5, 5, 7, 1]) == [True, True, False, False, True]
    assert on_front([0.5, 0.5], [3, 3]) == [True, True], "equals do not beat each other"


def test_scores_are_means_over_the_tasks_that_all_labels_have() -> None:
    rows = [score_row("dense", 1.0, 100), score_row("dense", 0.5, 200, task="fewshot"), score_row("m", 0.8, 60),
            score_row("m", 0.4, 80, task="fewshot"), score_row("dense", 0.1, 1, task="code")]  # fmt: skip
    dense, mine = front_rows(rows)
    assert dense["tasks"] == ["needle", "fewshot"]
    assert (dense["score"], dense["ms"], mine["score"], mine["ms"]) == (0.75, 150, pytest.approx(0.6), 70)
    assert mine["stderr"] == pytest.approx((2 * 0.01) ** 0.5 / 2)
    assert (dense["time"], dense["is_front"], mine["is_front"]) == ("prefill_ms", True, True)


def test_times_to_first_token_are_preferred_and_never_mixed_with_others() -> None:
    rows = [score_row("dense", 1.0, 100), score_row("m", 0.9, 1), score_row("control", 0.95, 2)]
    found = {row["label"]: row for row in front_rows(rows, [timed("dense", 50), timed("m", 40)])}
    assert {row["time"] for row in found.values()} == {"ttft_ms"}
    assert (found["m"]["ms"], found["control"]["ms"], found["control"]["is_front"]) == (40, None, False)
    assert found["m"]["is_front"], "the untimed control cannot beat it"
    assert front_rows(rows, [timed("dense", 50), timed("dense", 50, 4096)])[0]["time"] == "prefill_ms", "one time is no comparison"


def test_times_behind_a_shared_prefill_are_no_times_to_compare() -> None:
    rows = [score_row("dense", 1.0, 5), score_row("m", 0.9, 64), score_row("dense", 1.0, 9, task="scene", kind="picture", tokens=0),
            score_row("m", 0.9, 3, task="scene", kind="picture", tokens=0)]  # fmt: skip
    assert {row["kind"] for row in front_rows(without_times(rows))} == {"picture"}
    found = front_rows(without_times(rows), [timed("dense", 50), timed("m", 40)])
    assert {row["label"]: row["ms"] for row in found if row["kind"] == "text"} == {"dense": 50, "m": 40}, "a bench has clean ones"


def test_perplexity_counts_only_where_there_is_nothing_else() -> None:
    text = {"score": {"name": "perplexity", "value": 9.0, "stderr": 0.3}}
    both = [score_row("dense", 0.7, 10), score_row("m", 0.6, 5), score_row("dense", 0.5, 10, task="text", **text),
            score_row("m", 0.4, 5, task="text", **text)]  # fmt: skip
    assert {tuple(row["tasks"]) for row in front_rows(both)} == {("needle",)}
    dense, mine = front_rows(both[2:])
    assert (dense["metric"], dense["score"], dense["stderr"], mine["score"]) == ("log_prob", -0.5, 0.2, -0.4)
    assert not dense["is_front"], "less likely and slower: of log-probabilities more is better"


def test_lengths_stand_apart_and_a_lone_label_has_no_front() -> None:
    rows = [score_row("dense", 1.0, 10), score_row("m", 0.5, 5), score_row("dense", 1.0, 20, tokens=2048), score_row("m", 1.0, 10, tokens=2048),
            score_row("dense", 1.0, 40, tokens=4096)]  # fmt: skip
    found = front_rows(rows)
    assert [(row["tokens"], row["label"], row["is_front"]) for row in found] == [
        (1024, "dense", True), (1024, "m", True), (2048, "dense", False), (2048, "m", True),
    ]  # fmt: skip
    table = front_table(found)
    assert [row[4] for row in table.rows] == ["1.00×", "2.00×", "1.00×", "2.00×"]
    assert table.group_starts == {2}
    assert "1K, 2K: score of needle; prefill while it was scored." in table.caption


def test_a_mean_without_an_error_has_none() -> None:
    assert mean_score([score_row("m", 0.5), score_row("m", 1.0, score={"value": 1.0, "stderr": None})], "score") == (0.75, None)


def answers(label: str, tokens: int, sample: int, hits: list[float], places: list[str]) -> SampleRecord:
    n = len(hits)
    return SampleRecord(
        task="needle", label=label, options=[], tokens=tokens, sample=sample, seed=0, n_tokens=tokens, prompt_hash="", log_prob=None,
        exact=sum(hits) / n, log_probs=[], hits=hits, questions=[f"key{place}" for place in places], expected=[""] * n, answers=[""] * n,
        density=None, sparse_calls=0, dense_calls={}, prefill_ms=1.0,
    )  # fmt: skip


def test_a_record_that_tells_depths_is_believed() -> None:
    told = replace(answers("dense", 1024, 0, [1.0, 0.0], [" (at 8%)", ""]), depths=[0.5, 1.0])
    assert depths_of(told) == [0.5, 1.0]
    [row] = depth_rows([told])
    assert (row["depths"], row["share"]) == (["50 %", "100 %"], [[1.0], [0.0]])
    assert depth_rows([replace(told, depths=[0.5, None])]) == []


def test_depths_are_read_from_the_questions_and_shares_taken_by_length() -> None:
    places = [" (at 83%)", " (at 8%)"]
    records = [answers("dense", 1024, 0, [1, 1], places), answers("dense", 1024, 1, [0, 1], places), answers("dense", 2048, 0, [0, 1], places),
               answers("m", 1024, 0, [0, 0], places)]  # fmt: skip
    assert depths_of(records[0]) == [0.83, 0.08]
    dense, mine = depth_rows(records)
    assert (dense["depths"], dense["lengths"]) == (["8 %", "83 %"], [1024, 2048])
    assert dense["share"] == [[1.0, 1.0], [0.5, 0.0]]
    assert dense["n"] == [[2, 1], [2, 1]]
    assert (mine["lengths"], mine["share"]) == ([1024], [[0.0], [0.0]])


def test_many_depths_are_put_into_bins_that_lose_no_answer() -> None:
    places = [f" (at {place}%)" for place in (0, 3, 19, 20, 41, 60, 79, 80, 90, 95, 99, 100)]
    [row] = depth_rows([answers("dense", 1024, 0, [1.0] * 12, places)])
    assert row["depths"] == ["0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %"]
    assert row["n"] == [[3], [1], [1], [2], [5]]


def test_tasks_whose_answers_have_no_place_have_no_map() -> None:
    assert depth_rows([answers("dense", 1024, 0, [1.0, 1.0], ["", " (at 8%)"])]) == []
