"""Many tasks at once: a row per task and length, short names of variants, and means over what all of them have."""

from __future__ import annotations

from typing import Any

import pytest

from accel.evals.compare.report import titled_tables
from accel.evals.report.overview import overview_table, short_labels
from accel.evals.report.sections import sections

GAMMAS = {
    "flexprefill(min_seq_len=0)": {"min_seq_len": 0},
    "flexprefill(min_seq_len=0, gamma=0.9)": {"min_seq_len": 0, "gamma": 0.9},
}


def score(task: str, label: str, value: float, *, tokens: int = 2048, density: float | None = None, name: str = "exact") -> dict[str, Any]:
    options = [{"flexprefill": GAMMAS[label]}] if label in GAMMAS else [{"streaming": {"density": 0.5}}] if "(" in label else []
    return {"task": task, "label": label, "tokens": tokens, "score": {"name": name, "value": value, "stderr": 0.1}, "density": density,
            "is_baseline": label == "dense", "options": options}  # fmt: skip


def scores(tokens: int = 2048) -> list[dict[str, Any]]:
    labels = ["dense", *GAMMAS, "streaming (same density)"]
    found = []
    for i, task in enumerate(("needle", "vt", "perplexity")):
        name = "perplexity" if task == "perplexity" else "exact"
        found += [
            score(task, label, (12.0 if i == 2 else 1.0 - 0.25 * i) - 0.125 * j, tokens=tokens, density=0.5 if j else None, name=name)
            for j, label in enumerate(labels)
        ]
    return found


def test_a_row_per_task_and_length_and_a_column_per_variant() -> None:
    table = overview_table([*scores(8192), *scores(2048)])
    assert table is not None
    assert table.headers == ["tokens", "task", "dense", "flexprefill", "flexprefill(gamma=0.9)", "streaming (same density)"]
    assert [row[:3] for row in table.rows[:3]] == [["2K", "needle", "1.00"], ["2K", "vt", "0.75"], ["2K", "perplexity", "12.00"]]
    # perplexities are no share of right answers, and have a density all the same
    assert table.rows[3] == ["2K", "mean score", "0.88", "0.75", "0.62", "0.50"]
    assert table.rows[4] == ["2K", "mean density", "1.00", "0.50", "0.50", "0.50"]
    assert [row[0] for row in table.rows[5:]] == ["8K"] * 5
    assert (table.group_starts, table.quiet_rows) == ({5}, {3, 4, 8, 9})
    assert "without perplexities (perplexity)" in table.caption


def test_means_are_over_the_tasks_that_every_variant_has() -> None:
    rows = [s for s in scores() if (s["task"], s["label"]) != ("vt", "dense")]
    table = overview_table(rows)
    assert table is not None
    assert table.rows[1][2] == "–"
    assert table.rows[3][2:] == ["1.00", "0.88", "0.75", "0.62"], "needle alone"


def test_few_tasks_or_variants_need_no_overview() -> None:
    assert overview_table([s for s in scores() if s["task"] != "vt"]) is None
    assert overview_table([s for s in scores() if s["label"] in ("dense", "streaming (same density)")]) is None
    pictures = [{**s, "tokens": 0} for s in scores()]
    assert overview_table(pictures) is None


def test_names_that_would_be_the_same_stay_whole() -> None:
    both = [
        {"label": f"{a} + {b}", "options": [{a: {}}, {b: {}}]} for a, b in (("snapkv", "flexprefill"), ("flexprefill", "snapkv"))
    ]
    assert short_labels(both) == {row["label"]: row["label"] for row in both}
    twice = [{"label": label, "options": [{"h2o": {}}]} for label in ("h2o", "h2o again")]
    assert short_labels(twice) == {"h2o": "h2o", "h2o again": "h2o again"}


def test_what_ran_dense_has_a_density_of_one_and_what_has_no_density_no_mean() -> None:
    rows = scores()
    for s in rows:
        if s["label"] == "flexprefill(min_seq_len=0)" and s["task"] == "vt":
            s |= {"density": None, "calls": {"sparse": 0, "dense": {"below crossover": 30}}}
        if s["label"] == "streaming (same density)" and s["task"] == "vt":
            s |= {"density": None, "calls": {"sparse": 0, "dense": {}}}
    table = overview_table(rows)
    assert table is not None
    assert table.rows[4][2:] == ["1.00", "0.75", "0.50", "–"]


def test_the_caption_tells_what_the_short_names_leave_out() -> None:
    table = overview_table(scores())
    assert table is not None
    assert table.caption.endswith("In all of that name: flexprefill(min_seq_len=0).")
    assert short_labels([{"label": "mine", "options": [{"flexprefill": {"gamma": 0.9}}]}]) == {"mine": "mine"}, "the name of a recipe"


def test_perplexities_alone_have_no_means() -> None:
    table = overview_table([{**s, "score": {**s["score"], "name": "perplexity"}} for s in scores()])
    assert table is not None
    assert [row[1] for row in table.rows] == ["needle", "vt", "perplexity"]


def test_it_stands_in_reports_on_stdout_and_in_comparisons(capsys: pytest.CaptureFixture[str]) -> None:
    from accel.cli.run_result import _print

    rows = [{**s, "n": 1, "kind": "text"} for s in scores()]
    [section] = [s for s in sections({"scores": rows}) if s.name == "accuracy"]
    assert [table.headers[:2] for table in section.tables] == [["tokens", "task"], ["task", "tokens"]]
    empty: dict[str, Any] = {"sources": [], "scores": rows, "comparisons": [], "latency": [], "fronts": []}
    assert "Scores of all tasks" in dict(titled_tables(empty))
    _print(rows, {})
    assert "mean density" in capsys.readouterr().out
