"""Paired tests agree with what can be counted by hand, keep prompts that depend on each other together, and never pair different prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

from accel.evals.controls import Control
from accel.evals.results import SampleRecord
from accel.evals.summary.significance import (
    MCNEMAR,
    SIGNS,
    compared,
    describe_p,
    log_prob_bound,
    loss_bound,
    pair_up,
    paired_test,
    planned_pairs,
    unit_differences,
)

pytest.importorskip("scipy")


def record(label: str, sample: int, hits: Sequence[float], **changes: Any) -> SampleRecord:
    fields: dict[str, Any] = {
        "task": "needle", "label": label, "options": [], "tokens": 1024, "sample": sample, "seed": 0, "n_tokens": 1024, "prompt_hash": f"p{sample}",
        "log_prob": None, "exact": sum(hits) / len(hits), "log_probs": [], "hits": list(hits), "questions": [""] * len(hits),
        "expected": [""] * len(hits), "answers": [""] * len(hits), "density": None, "sparse_calls": 0, "dense_calls": {}, "prefill_ms": 1.0,
    }  # fmt: skip
    return SampleRecord(**{**fields, **changes})


def pairs(mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]], **changes: Any) -> list[tuple[SampleRecord, SampleRecord]]:
    return [(record("m", i, a, **changes), record("dense", i, b, **changes)) for i, (a, b) in enumerate(zip(mine, other, strict=True))]


def flipped(sums: Sequence[float]) -> float:
    """The two-sided share of sign patterns whose sum is at least as far from zero."""
    seen = abs(sum(sums))
    all_ = [abs(sum(s * d for s, d in zip(signs, sums, strict=True))) for signs in itertools.product((1, -1), repeat=len(sums))]
    return sum(value >= seen - 1e-12 for value in all_) / len(all_)


def test_single_hits_and_misses_are_tested_by_exact_mcnemar() -> None:
    # 1 prompt that only the method got right, 6 that only dense did, 5 alike: P(at most 1 of 7) twice over
    mine, dense = [[1.0]] + [[0.0]] * 6 + [[1.0]] * 5, [[0.0]] + [[1.0]] * 6 + [[1.0]] * 5
    row = paired_test(pairs(mine, dense))
    assert (row["test"], row["better"], row["worse"], row["n"], row["unit"]) == (MCNEMAR, 1, 6, 12, "prompts")
    assert row["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert row["difference"] == pytest.approx(-5 / 12)


def test_prompts_of_several_answers_are_flipped_as_a_whole() -> None:
    mine, dense = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    row = paired_test(pairs(mine, dense))
    assert (row["test"], row["better"], row["worse"], row["n"]) == (SIGNS, 0, 4, 4)
    assert row["p"] == pytest.approx(flipped([-0.5, -0.75, -0.25, -0.25])) == 0.125
    # 9 of 13 answers are worse, which answers taken for themselves would call p < 0.01
    mixed = paired_test(pairs([[1, 1], [0, 0], [0, 1]], [[0, 0], [1, 1], [1, 1]]))
    assert mixed["p"] == pytest.approx(flipped([1.0, -1.0, -0.5]))


def test_sign_flips_of_single_hits_are_mcnemar() -> None:
    from accel.evals.summary.significance import _mcnemar, _sign_flips

    for better, worse in ((0, 3), (2, 8), (5, 5), (1, 0)):
        assert _sign_flips([1.0] * better + [-1.0] * worse + [0.0] * 4) == pytest.approx(_mcnemar(better, worse))


def test_no_difference_is_no_evidence() -> None:
    assert paired_test(pairs([[1.0]] * 3, [[1.0]] * 3))["p"] == 1.0
    assert paired_test(pairs([[1, 0]] * 3, [[1, 0]] * 3))["p"] == 1.0


def test_graded_answers_are_not_taken_for_hits() -> None:
    assert paired_test(pairs([[0.4], [0.2]], [[1.0], [1.0]]))["test"] == SIGNS


def test_questions_about_one_picture_are_one_unit() -> None:
    mine = [record("m", i, [0.0], tokens=0, picture_hash=f"picture {i // 3}") for i in range(9)]
    dense = [record("dense", i, [1.0], tokens=0, picture_hash=f"picture {i // 3}") for i in range(9)]
    row = paired_test(list(zip(mine, dense, strict=True)))
    assert (row["test"], row["n"], row["unit"], row["worse"]) == (SIGNS, 3, "pictures", 3)
    assert row["p"] == 0.25, "nine independent questions would give 0.004"


def test_the_interval_comes_with_enough_prompts_and_holds_the_difference() -> None:
    few = paired_test(pairs([[0.0]] * 19, [[1.0], [0.0]] * 9 + [[1.0]]))
    assert few["interval"] is None
    row = paired_test(pairs([[0.0]] * 40, [[1.0], [0.0]] * 20))
    low, high = row["interval"]
    assert low < row["difference"] == -0.5 < high
    # 1.96 · √(0.25/40) on either side
    assert (low, high) == (pytest.approx(-0.655, abs=0.03), pytest.approx(-0.345, abs=0.03))


def test_perplexities_are_compared_by_log_probability() -> None:
    both = [(record("m", i, [0.0], log_prob=-2.0 - 0.1 * i), record("dense", i, [1.0], log_prob=-2.0)) for i in range(5)]
    row = paired_test(both, is_log_prob=True)
    assert (row["metric"], row["test"], row["worse"]) == ("log_prob", SIGNS, 4)
    assert row["difference"] == pytest.approx(-0.2)


def test_rows_are_by_task_and_length_and_over_all_with_one_draw_counted_once() -> None:
    records = [
        record(label, i, [float(label == "dense" or i == 0)], task=task, tokens=tokens, prompt_hash=f"{task}{tokens}{i}")
        for label in ("dense", "m") for task in ("needle", "code") for tokens in (1024, 2048) for i in range(3)
    ]  # fmt: skip
    rows = compared(records, [("m", "dense"), ("m", "nobody")])
    assert [(row["task"], row["tokens"], row["n"]) for row in rows] == [
        ("needle", 1024, 3), ("needle", 2048, 3), ("code", 1024, 3), ("code", 2048, 3), (None, None, 6),
    ]  # fmt: skip
    assert rows[-1]["tasks"] == ["needle", "code"]
    assert (rows[-1]["better"], rows[-1]["worse"], rows[-1]["test"]) == (0, 4, SIGNS)
    assert rows[-1]["p"] == pytest.approx(0.125), "eight of twelve prompts differ, from four draws"


def test_perplexity_and_left_out_tasks_stay_out_of_the_row_over_all() -> None:
    records = [record(label, i, [1.0], task=task, tokens=n, log_prob=-1.0) for label in ("dense", "m") for task in ("a", "b", "c")
               for n in (1, 2) for i in range(2)]  # fmt: skip
    rows = compared(records, [("m", "dense")], log_prob_tasks={"b"}, left_out={"c"})
    assert [(row["task"], row["metric"]) for row in rows] == [("a", "score")] * 2 + [("b", "log_prob")] * 2 + [(None, "score")]
    assert rows[-1]["tasks"] == ["a"]
    assert len(compared(records, [("m", "dense")], left_out={"a", "c"})) == 3
    one_cell = [r for r in records if r.task == "a" and r.tokens == 1]
    assert [row["task"] for row in compared(one_cell, [("m", "dense")])] == ["a"], "one cell is all there is"


def test_other_prompts_are_no_pair() -> None:
    mine = [record("m", 0, [1.0]), record("m", 1, [1.0], prompt_hash="other"), record("m", 2, [1.0])]
    dense = [record("dense", 0, [0.0]), record("dense", 1, [0.0])]
    assert [(a.sample, b.sample) for a, b in pair_up(mine, dense)] == [(0, 0)]


def test_methods_are_paired_with_dense_and_their_own_controls() -> None:
    controls = [Control("random (a)", "random", ("a",)), Control("random (both)", "random", ("a", "b"))]
    assert planned_pairs(["a", "b"], controls) == [
        ("a", "dense"), ("a", "random (a)"), ("a", "random (both)"), ("b", "dense"), ("b", "random (both)"),
    ]  # fmt: skip


def test_the_bound_is_tangos() -> None:
    # published (Newcombe 1998, Statistics in Medicine 17, 2635): 12 lost, 2 won of 50, 95 % two-sided 0.0611 to 0.3447
    differences = [-1.0] * 12 + [1.0] * 2 + [0.0] * 36
    assert loss_bound(differences, 0.975) == pytest.approx(0.3447, abs=1e-4)
    assert -loss_bound([-d for d in differences], 0.975) == pytest.approx(0.0611, abs=1e-4)


@pytest.mark.parametrize("n", [2, 10, 100])
def test_no_loss_in_few_prompts_still_leaves_a_loss_open(n: int) -> None:
    z = 1.6448536
    assert loss_bound([0.0] * n, 0.95) == pytest.approx(z * z / (n + z * z), rel=1e-5)


def test_the_bound_lies_above_the_loss_and_grows_with_confidence() -> None:
    differences = [-0.5, -0.25, 0.0, 0.25]
    low, high = loss_bound(differences, 0.8), loss_bound(differences, 0.99)
    assert 0.125 < low < high <= 1
    assert loss_bound([-1.0] * 4, 0.95) == 1.0
    assert loss_bound([1.0] * 100, 0.95) < -0.9, "what always wins loses nothing"


def test_a_unit_of_several_answers_bounds_no_tighter_than_its_own_mean() -> None:
    assert loss_bound([-0.5] * 20, 0.95) >= 0.5 + 0.1, "as uncertain as ten whole losses of twenty"


def test_the_bound_of_log_probabilities_is_students() -> None:
    # mean −0.2, s = 0.158, t(0.95, 4) = 2.132
    assert log_prob_bound([0.0, -0.1, -0.2, -0.3, -0.4], 0.95) == pytest.approx(-0.2 - 2.1318 * math.sqrt(0.025 / 5), abs=1e-4)
    assert log_prob_bound([0.1], 0.95) is None


def test_units_are_means_of_their_samples() -> None:
    both = [(record("m", i, [h], tokens=n), record("dense", i, [1.0], tokens=n)) for i, h, n in ((0, 0.0, 1), (0, 1.0, 2), (1, 1.0, 1))]
    assert unit_differences(both) == [-0.5, 0.0]


@pytest.mark.parametrize("p, text", [(0.0004, "< 0.001"), (0.0312, "0.031"), (0.25, "0.25"), (1.0, "1.00")])
def test_p_is_written_with_as_many_digits_as_matter(p: float, text: str) -> None:
    assert describe_p({"p": p}) == text
