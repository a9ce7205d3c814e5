"""Reports show both dense baselines, what the run cannot claim, and load nothing from anywhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from accel.errors import AccelError
from accel.evals.report.page import render_html, render_markdown, write_reports
from accel.evals.report.sections import accuracy_table, answer_table, headlines, latency_table, mebibytes, milliseconds

pytest.importorskip("matplotlib")

BASE = ("dense (sdpa)", "dense (accel)")


def latency_row(label: str, tokens: int, ms: float, *, density: float | None = None, note: str = "", n: int = 3) -> dict[str, Any]:
    stock, gemm = {2048: (1800.0, 1300.0), 8192: (18000.0, 12000.0)}[tokens]
    return {
        "metric": "ttft_ms", "label": label, "methods": [], "tokens": tokens,
        "ms": {"median": ms, "p20": ms * 0.9, "p80": ms * 1.1, "n": n},
        "speedup": {BASE[0]: stock / ms, BASE[1]: gemm / ms}, "selection_share": 0.07 if density else None, "density": density,
        "sparse_calls": 30 if density else 0, "dense_calls": {}, "peak_bytes": 64 * 2**20, "note": note, "is_baseline": label in BASE,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    scores = [
        {"task": "needle", "tokens": 4096, "label": label, "score": {"value": value, "stderr": 0.0}, "n": 4, "log_prob": -12 * (1 - value),
         "density": density, "is_baseline": density is None}
        for label, value, density in (("dense (sdpa)", 1.0, None), ("Flex<b>Prefill", 1.0, 0.56), ("Streaming", 0.25, 0.56))
    ]  # fmt: skip
    latency = [
        latency_row(BASE[0], 2048, 1800.0, note="baseline"),
        latency_row(BASE[1], 2048, 1300.0, note="baseline"),
        latency_row("Flex<b>Prefill", 2048, 1800.0, note="dense: below crossover"),
        latency_row(BASE[0], 8192, 18000.0, note="baseline"),
        latency_row(BASE[1], 8192, 12000.0, note="baseline"),
        latency_row("Flex<b>Prefill", 8192, 7500.0, density=0.41, n=2),
    ]
    maps = {
        "label": "Flex<b>Prefill", "block_size": 128, "tokens": 384, "n_layers": 2, "density": {"1": [0.5, 1.0]},
        "maps": [{"layer": 1, "head": 0, "density": 0.5, "rows": ["1", "01", "100"]}],
    }  # fmt: skip
    return {
        "schema": 1, "command": "demo", "title": "Dense & sparse", "model": "tiny", "scores": scores, "latency": latency,
        "block_maps": [maps],
        "answers": [
            {"task": "needle", "question": "apple", "expected": "12345", "label": "Streaming", "answer": "99999", "log_prob": -13.9}
        ],
        "limits": ["It shows one model."], "notices": ["powerattention: wants an adapted model"],
        "config": {"seed": 0, "x": {"gamma": 0.95}},
        "env": {"torch": "2.13"}, "memory_how": "growth of the resident memory",
    }  # fmt: skip


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_shows_both_baselines_and_both_ratios(result: dict[str, Any]) -> None:
    text = Page(render_html(result)).text
    assert "× dense (sdpa)" in text
    assert "× dense (accel)" in text
    # 18 s / 7.5 s and 12 s / 7.5 s
    assert "2.40×" in text
    assert "1.60×" in text
    assert "dense: below crossover" in text
    assert "wants an adapted model" in text


def test_html_loads_nothing(result: dict[str, Any]) -> None:
    html = render_html(result)
    page = Page(html)
    assert page.loads, "the figures are missing"
    assert [target for target in page.loads if not target.startswith(("data:image/png;base64,", "#"))] == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))


def test_html_has_the_figures(result: dict[str, Any]) -> None:
    page = Page(render_html(result))
    # time against length, accuracy against density, density of all heads; one head's map
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 1
    assert "#010203" not in render_html(result), "the ink of a figure must become the page's own colour"


def test_names_cannot_break_the_page(result: dict[str, Any]) -> None:
    page = Page(render_html(result))
    assert "b" not in page.tags
    assert "Flex<b>Prefill" in page.text


def test_markdown_holds_the_same_tables(result: dict[str, Any]) -> None:
    text = render_markdown(result)
    assert "| Flex<b>Prefill | 8K | 7.50 s | 6.75 s – 8.25 s | 2 | 2.40× | 1.60× | 0.41 | 7.0% | 64 MiB |  |" in text
    for heading in ("## Accuracy", "## Time to first token", "## What this run cannot claim", "## Settings", "## Environment"):
        assert heading in text
    assert "x.gamma" in text
    assert "> powerattention: wants an adapted model" in text


def test_limits_follow_from_the_run(result: dict[str, Any]) -> None:
    text = render_markdown(result)
    assert "- It shows one model." in text
    assert "the fewest timed runs of a row are 2" in text
    assert "only the ratio against the faster of the two dense baselines is the gain of sparsity" in text
    assert "one seed" in text
    del result["scores"]
    assert "one seed" not in render_markdown(result)


def test_a_result_with_nothing_but_a_command_is_rendered() -> None:
    text = Page(render_html({"command": "inspect"})).text
    assert "accel inspect" in text
    assert "cannot claim" not in text, "a heading without contents"


def test_write_reports_puts_both_files_beside_the_result(tmp_path: Path, result: dict[str, Any]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result))
    reports = write_reports(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "report.md", "report.html"}
    assert reports.html.read_text().startswith("<!doctype html>")


def test_without_a_result_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(AccelError, match=r"result\.json"):
        write_reports(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.evals.report.page.NEEDED_FOR_HTML", ("json", "no_such_package"))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(AccelError, match="pip install no_such_package"):
        write_reports(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_headline_names_both_ratios_and_only_sparse_runs(result: dict[str, Any]) -> None:
    [line] = headlines(result["latency"])
    assert "2.40× dense (sdpa) and 1.60× dense (accel)" in line
    assert headlines([r for r in result["latency"] if r["tokens"] == 2048]) == []


def test_groups_and_quiet_rows_of_the_latency_table(result: dict[str, Any]) -> None:
    table = latency_table(result["latency"])
    assert table.group_starts == {3}
    assert table.quiet_rows == {0, 1, 3, 4}
    assert all(len(row) == len(table.headers) for row in table.rows)


def test_accuracy_shows_reached_density_and_full_for_dense(result: dict[str, Any]) -> None:
    table = accuracy_table(result["scores"])
    density = table.headers.index("density")
    assert [row[density] for row in table.rows] == ["1.00", "0.56", "0.56"]


def test_answers_are_marked_right_or_wrong() -> None:
    common = {"task": "needle", "question": "apple", "expected": "12345", "log_prob": -0.25}
    table = answer_table([{**common, "label": "A", "answer": "12345"}, {**common, "label": "B", "answer": " 54321"}])
    assert table.headers == ["question", "expected", "A", "B"]
    assert table.rows == [["apple", "12345", "✓ 12345 (−0.2)", "✗ 54321 (−0.2)"]]


@pytest.mark.parametrize(
    "value, text",
    [(0.1234, "0.123 ms"), (9.87, "9.9 ms"), (123.4, "123 ms"), (1234.0, "1.23 s"), (None, "–")],
    ids=["us", "ms", "hundreds", "s", "none"],
)
def test_times_carry_a_suitable_unit(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_memory_is_in_mebibytes() -> None:
    assert mebibytes(3 * 2**20) == "3 MiB"
    assert mebibytes(None) == "–"
