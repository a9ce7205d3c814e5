"""Accuracy runs with methods that drop cache entries, on a tiny random model: controls of equal budget, bytes in the records, tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_llama import byte_tokenizer, tiny_model

from accel.errors import AccelError
from accel.evals.controls import plan_controls, swept
from accel.evals.models import LoadedModel
from accel.evals.report.caches import cache_figures, series_of
from accel.evals.report.comparisons import comparison_table
from accel.evals.report.sections import accuracy_table
from accel.evals.results import RunFolder
from accel.evals.runner import run_accuracy
from accel.evals.summary.caches import ASKED_APART, cache_notices, cache_settings
from accel.evals.summary.significance import compared, planned_pairs
from accel.registry import build

TOKENS = 1024
CONTROLS = ("random_kv", "streaming_kv")
KEEPS = (0.5, 0.2)
TASKS = ["needle", "needle_map"]


def variants() -> dict[str, list[Any]]:
    return swept({"snapkv": [build("snapkv", {"every": 16})]}, KEEPS)


def run(folder: RunFolder, **changes: Any) -> list[dict[str, Any]]:
    loaded = LoadedModel(tiny_model(positions=4096), byte_tokenizer(), "tiny")
    settings: dict[str, Any] = {"n": 2, "seed": 0, "controls": CONTROLS, "progress": False, **changes}
    return run_accuracy(loaded, settings.pop("methods", variants()), TASKS, [TOKENS], folder=folder, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "r", {"model": "tiny"})
    return folder, run(folder)


def test_every_budget_has_its_controls(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    labels = ["dense", "snapkv(keep=0.5, every=16)", "snapkv(keep=0.2, every=16)",
              *(f"{name} (keep {keep}, every 16)" for name in CONTROLS for keep in KEEPS)]  # fmt: skip
    assert [row["label"] for row in finished[1] if row["task"] == "needle"] == labels
    records = [r for r in finished[0].records if r.label.startswith("random_kv")]
    # what the control shares with the method it is compared to
    assert {r.options[0]["random_kv"]["every"] for r in records} == {16}
    assert len({r.options[0]["random_kv"]["seed"] for r in records if r.task == "needle"}) == 2


def test_prompts_are_finished_one_after_the_other(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    samples = [r.sample for r in finished[0].records if r.task == "needle"]
    assert samples == sorted(samples)


def test_records_hold_the_bytes_of_prompt_and_peak(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    for record in finished[0].records:
        if record.label == "dense":
            assert record.cache is None
            continue
        keep, cache = record.keep, record.cache
        assert cache is not None
        assert isinstance(keep, float)
        # a place of 4 bytes beside a key and a value of 64 each
        assert cache["kept_share"] == pytest.approx(keep * 132 / 128, rel=0.01)
        assert cache["prompt_bytes"] <= cache["peak_bytes"] < cache["whole_bytes"]
        assert cache["peak_share"] == cache["peak_bytes"] / cache["whole_bytes"]
        # whole: of the prompt and what was asked behind it
        per_token = 2 * 3 * 2 * 16 * 4
        n_tokens = cache["whole_bytes"] / per_token
        assert record.n_tokens < n_tokens <= record.n_tokens + 32 if record.task == "needle_map" else n_tokens < record.n_tokens


def test_dropped_entries_change_scores(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    for task in TASKS:
        log_probs = [row["log_prob"] for row in finished[1] if row["task"] == task]
        assert len(set(log_probs)) == len(log_probs)


def test_a_shared_prefill_gives_the_same_run(finished: tuple[RunFolder, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", {"model": "tiny"})
    run(folder, shares_prefill=True, n=1, limit=7)
    assert len(folder.records) == 7
    for record in folder.records:
        want = finished[0].get(record.key)
        assert want is not None
        assert record.log_probs == pytest.approx(want.log_probs, abs=1e-3)
        assert record.cache == want.cache


def test_the_table_tells_bytes_and_the_figure_has_a_line_per_method(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    table = accuracy_table(finished[1])
    assert table.headers[-3:] == ["cache", "of whole", ""]
    dense, first = table.rows[0], table.rows[1]
    assert dense[-2] == "100.0%"
    assert 50 < float(first[-2].rstrip("%")) < 55
    assert first[-3].endswith("KiB")
    assert len({len(row) for row in table.rows}) == 1
    pytest.importorskip("matplotlib")
    figures = cache_figures(finished[1])
    assert [figure.title for figure in figures] == ["needle at 1K", "needle_map at 1K"]
    assert {series_of(row) for row in finished[1]} == {"dense", "snapkv(every=16)", "random_kv(every=16)", "streaming_kv(every=16)"}
    assert all("cache bytes at their peak" in figure.svg for figure in figures)


def test_tables_without_compressed_caches_have_no_bytes() -> None:
    row = {"task": "needle", "tokens": 8, "label": "dense", "is_baseline": True, "score": {"value": 1.0}, "n": 1, "log_prob": -1.0,
           "log_prob_stderr": 0.5, "options": []}  # fmt: skip
    table = accuracy_table([row])
    assert "cache" not in table.headers
    assert table.rows[0][5] == "−1.00"
    assert cache_figures([row]) == []


def test_differences_are_taken_prompt_by_prompt(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    folder, _ = finished
    paired = compared(folder.records, planned_pairs(variants(), plan_controls(CONTROLS, variants())))
    mine = [row for row in paired if (row["task"], row["label"]) == ("needle", "snapkv(keep=0.2, every=16)")]
    assert [row["other"] for row in mine] == ["dense", "random_kv (keep 0.2, every 16)", "streaming_kv (keep 0.2, every 16)"]
    records = {(r.label, r.sample): r for r in folder.records if r.task == "needle"}
    for row in mine:
        differences = [records[row["label"], i].log_prob - records[row["other"], i].log_prob for i in range(2)]  # type: ignore[operator]
        assert row["log_prob"]["value"] == pytest.approx(sum(differences) / 2)
        assert row["log_prob"]["stderr"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
        assert row["n"] == 2
    assert mine[0]["bytes"] is None
    assert abs(mine[1]["bytes"]) < 64 * 1024
    table = comparison_table(paired)
    assert (table.headers[-2:], len(table.rows)) == (["log-prob", "cache, difference"], len(paired))
    assert comparison_table([row for row in paired if row["other"] == "dense"]).headers[-1] == "log-prob", "a whole cache has no budget"


def test_a_run_is_not_mixed_of_two_ways_of_scoring(tmp_path: Path) -> None:
    settings = cache_settings(variants(), TASKS, {})
    assert settings == {"questions": ASKED_APART}
    assert cache_settings({"streaming": [build("streaming")]}, TASKS, {"shared_prefill": True}) == {}
    assert cache_settings(variants(), ["images"], {}) == {}
    RunFolder.create(tmp_path / "r", {"model": "tiny"})
    with pytest.raises(AccelError, match=r"--method \(beside one that drops cache entries, .*\) differs"):
        RunFolder.create(tmp_path / "r", {"model": "tiny", **settings}, resume=True)


def test_readers_are_told_of_shared_prefills_and_of_caches_that_save_nothing(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    assert cache_notices({}, finished[1]) == []
    [shared] = cache_notices({"shared_prefill": True}, finished[1])
    assert "up to its last 64 tokens" in shared
    large = {"kind": "text", "label": "m", "cache": {"peak_bytes": 9, "whole_bytes": 9}}
    assert cache_notices({}, [large]) == ["No smaller than a whole cache, as where every prompt fits the budget: m."]
    seen = {"kind": "picture", "task": "scene_color", "label": "m", "cache": {"peak_bytes": 3, "whole_bytes": 9}}
    assert cache_notices({}, [seen]) == ["Bytes that caches held, of a whole one: m 33.3% (scene_color)."]
    # next-scale models have a notice of their own
    assert cache_notices({}, [{**large, "kind": "class"}]) == []
