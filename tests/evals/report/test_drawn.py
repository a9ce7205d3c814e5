"""Reports on drawn pictures: what each column holds, four figures of memory that stay apart, and which lines a plot has."""

from __future__ import annotations

from typing import Any

import pytest

from accel.evals.report import plots
from accel.evals.report.drawn import drawn_figures, drawn_notices, drawn_sections, drawn_table, entry_lines, head_figures, memory_table, paired_table
from accel.evals.report.page import cards, render_html, render_markdown

pytest.importorskip("matplotlib")
WHOLE = [1, 5, 14, 30, 66, 130]


def estimate(value: float, stderr: float | None = 0.01) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 20}


def cache(share: float, *, n_bytes: int, attended: list[float] | None = None) -> dict[str, Any]:
    read = attended or [min(n, share * 130) for n in WHOLE]
    return {"whole": WHOLE, "attended": read, "retained": [*read[:-1], 0], "kept_share": share, "peak_bytes": n_bytes, "whole_bytes": 400 * 1024}


def row(label: str, *, share: float | None = None, far: float | None = None, n_bytes: int = 0, **changes: Any) -> dict[str, Any]:
    is_baseline = share is None or share == 1.0
    held = None if share is None else cache(share, n_bytes=n_bytes)
    memory = {"how": "growth of resident memory", "allocated_bytes": None, "reserved_bytes": None, "resident_bytes": 3 * 2**19}
    return {
        "task": "images", "label": label, "series": label.split("(")[0].strip(), "keep": None if is_baseline else share, "is_baseline": is_baseline,
        **estimate(0.95), "frechet": 12.346, "to_dense": None if is_baseline else estimate(-0.05, 0.05), "psnr": far and estimate(25),
        "perceptual": None if far is None else estimate(far, 0.002), "cache": held, "memory": memory, "ms": 40.0, **changes,
    }  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("dense", share=1.0, n_bytes=400 * 1024),
        row("h2o(keep=0.5)", share=0.5, far=0.02, n_bytes=410 * 1024),
        row("h2o(keep=0.3)", share=0.3, far=0.08, n_bytes=250 * 1024),
        row("random_kv (keep 0.5)", share=0.5, far=0.03, n_bytes=390 * 1024),
        row("random_kv (keep 0.3)", share=0.3, far=0.06, n_bytes=240 * 1024),
        {**row("real pictures", memory=None, ms=None), "task": ""},
    ]


@pytest.fixture
def paired() -> list[dict[str, Any]]:
    return [
        {"task": "images", "label": f"h2o(keep={k})", "other": f"random_kv (keep {k})", "keep": k, "right": estimate(0.0, 0.02),
         "perceptual": estimate(far, 0.004)}
        for k, far in ((0.5, -0.01), (0.3, 0.02))
    ]  # fmt: skip


def test_rows_of_one_budget_stand_together_and_real_pictures_last(rows: list[dict[str, Any]]) -> None:
    table = drawn_table(rows)
    assert [cells[0] for cells in table.rows] == [
        "dense", "h2o(keep=0.5)", "random_kv (keep 0.5)", "h2o(keep=0.3)", "random_kv (keep 0.3)", "real pictures",
    ]  # fmt: skip
    assert table.group_starts == {1, 3, 5}
    assert table.quiet_rows == {0, 5}
    assert dict(zip(table.headers, table.rows[1], strict=True)) == {
        "method": "h2o(keep=0.5)", "n": "20", "right, %": "95.0 ± 1.0", "− dense": "−5.0 ± 5.0", "Fréchet": "12.35",
        "PSNR, dB": "25.0 ± 0.0", "perceptual distance": "0.0200 ± 0.0020", "read": "50.0%", "cache, KiB": "410", "per picture": "40.0 ms",
    }  # fmt: skip


def test_none_of_the_four_figures_stands_for_another(rows: list[dict[str, Any]]) -> None:
    table = memory_table(rows)
    names = table.headers[1:]
    assert names == ["entries per head, stored", "read at the last scale", "cache, KiB", "peak allocated", "peak reserved", "peak resident growth"]
    by_label = {cells[0]: cells[1:] for cells in table.rows}
    assert by_label["dense"] == ["66", "130 of 130", "400", "–", "–", "1.5 MiB"]
    assert by_label["h2o(keep=0.3)"] == ["39", "39 of 130", "250", "–", "–", "1.5 MiB"]
    assert "real pictures" not in by_label
    assert "growth of resident memory" in table.caption
    on_gpu = {"how": "the CUDA allocator", "allocated_bytes": 2**20, "reserved_bytes": 2**21, "resident_bytes": None}
    [cells] = memory_table([row("h2o", share=0.3, memory=on_gpu)]).rows
    assert cells[-3:] == ["1.0 MiB", "2.0 MiB", "–"]


def test_a_cache_that_saves_nothing_is_told(rows: list[dict[str, Any]]) -> None:
    [notice] = drawn_notices(rows)
    assert "h2o(keep=0.5) (410 KiB)" in notice
    assert "random_kv" not in notice
    assert "66 of 130 entries" in notice
    rows[3]["cache"]["peak_bytes"] = 405 * 1024
    assert "keep 0.5: h2o, random_kv (405–410 KiB)" in drawn_notices(rows)[0]
    del rows[3]
    assert drawn_notices([r for r in rows if r["label"] != "h2o(keep=0.5)"]) == []


def test_methods_of_the_same_entries_share_a_line(rows: list[dict[str, Any]]) -> None:
    uneven = row("cake(keep=0.3)", share=0.3, cache=cache(0.3, n_bytes=1, attended=[1, 5, 14, 30, 45, 39]))
    lines = entry_lines([*rows[:-1], uneven], "attended")
    assert [(line["label"], line["is_baseline"]) for line in lines] == [
        ("dense", True), ("keep 0.5: h2o, random_kv", False), ("keep 0.3: h2o, random_kv", False), ("cake(keep=0.3)", False),
    ]  # fmt: skip
    assert lines[2]["entries"] == [1, 5, 14, 30, 39, 39]
    # what is stored is another figure: nothing behind the last scale
    assert entry_lines(rows[:-1], "retained")[2]["entries"] == [1, 5, 14, 30, 39, 0]


def test_points_against_memory_stand_where_they_were_measured(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    drawn: list[tuple[dict[str, Any], ...]] = []
    keep_plot = plots.keep_plot

    def spy(found: Any, colours: Any, **options: Any) -> str:
        if options.get("is_measured"):
            drawn.append(tuple(found))
        return keep_plot(found, colours, **options)

    monkeypatch.setattr(plots, "keep_plot", spy)
    drawn_figures(rows)
    # bytes of a whole cache of 400 KiB, not the share that was read
    assert [round(row["share"], 3) for row in drawn[0]] == [1.025, 0.625, 0.975, 0.6]


def test_the_page_has_the_plots_and_the_tables(rows: list[dict[str, Any]], paired: list[dict[str, Any]]) -> None:
    result = {"command": "run", "drawn": rows, "drawn_paired": paired}
    assert [(f.section, f.title) for f in drawn_figures(rows)] == [
        ("drawn", "Distance against keep"), ("drawn", "Distance against memory"), ("drawn", "Right classes against keep"),
        ("cache", "Cache entries against scale"), ("cache", "Entries read against scale"),
    ]  # fmt: skip
    page = render_html(result)
    assert page.count("<svg") == 5
    assert "What the cache and the process held" in page
    text = render_markdown(result)
    assert "| h2o(keep=0.3) − random_kv (keep 0.3) | +0.0 ± 2.0 | +0.0200 ± 0.0040 | 20 |" in text


def test_numbers_of_heads_are_drawn_by_kind_and_equal_ones_once() -> None:
    def heads(label: str, title: str, top: float) -> dict[str, Any]:
        kinds = (("contextual", "structural"), ("contextual", "contextual"))
        return {"label": label, "title": title, "caption": "entries", "values": ((1.0, top), (2.0, 3.0)), "kinds": kinds, "is_log": top > 10}

    found = head_figures([heads("a(keep=0.5)", "Kinds", 50.0), heads("a(keep=0.3)", "Kinds", 50.0), heads("a(keep=0.3)", "Budget", 5.0)])
    assert [(f.section, f.title, f.caption) for f in found] == [
        ("heads", "Kinds", "a(keep=0.5), a(keep=0.3): entries"), ("heads", "Budget", "a(keep=0.3): entries"),
    ]  # fmt: skip
    assert "contextual (3)" in found[0].svg
    assert "structural (1)" in found[0].svg


def test_cards_show_the_first_method_beside_its_controls(rows: list[dict[str, Any]], paired: list[dict[str, Any]]) -> None:
    found = cards({"drawn": rows, "drawn_paired": paired})
    assert [(card.value, card.label, card.detail) for card in found] == [
        ("0.020", "h2o, 50.0% of the cache read: distance to dense", "random_kv 0.030"),
        ("0.080", "h2o, 30.0% of the cache read: distance to dense", "random_kv 0.060"),
    ]


def test_a_run_of_dense_alone_has_a_table_and_no_plot() -> None:
    alone = [row("dense", cache=None), {**row("real pictures", memory=None), "task": ""}]
    assert drawn_figures(alone) == []
    assert cards({"drawn": alone}) == []
    assert [section.name for section in drawn_sections({"drawn": alone})] == ["drawn", "cache"]
    assert render_html({"command": "run", "drawn": alone}).count("<svg") == 0
    assert drawn_sections({}) == []


def test_paired_rows_of_another_method_begin_a_group(paired: list[dict[str, Any]]) -> None:
    assert paired_table([paired[0], {**paired[0], "other": "streaming_kv (keep 0.5)"}, paired[1]]).group_starts == {2}
