"""The report of a run on pictures: tasks that fail the gate are nowhere but in the gate's table, and pictures are inside the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from accel.evals.report.page import cards, render_html, render_markdown, write_reports
from accel.evals.report.pictures import asked, headline, keep_table, paired_table, share_kept
from accel.evals.report.plots import accuracy_keep_plot, colour_by_label

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
LABELS = (("dense", None, "dense"), ("fastervlm(keep=0.25)", 0.25, "fastervlm"), ("random_tokens (keep 0.25)", 0.25, "random_tokens"))


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.02, "n": 100}


@pytest.fixture
def result() -> dict[str, Any]:
    gates = [
        {"task": task, "dense": estimate(dense), "baselines": {"no image": 0.1, "among present": 0.5}, "passes": dense > 0.7}
        for task, dense in (("scene_color", 0.98), ("scene_relation", 0.5))
    ]
    scores = [
        {"task": task, "label": label, "kind": "picture", "tokens": 0, "score": estimate(value), "n": 100, "keep": keep, "is_baseline": keep is None}
        for task in ("scene_color", "scene_relation")
        for (label, keep, _), value in zip(LABELS, (0.98, 0.97, 0.3456), strict=True)
    ]  # fmt: skip
    means = [
        {"label": label, "series": series, "keep": keep, "is_baseline": keep is None, "score": estimate(value), "kept_share": share,
         "kept_tokens": 36 if keep else None, "visual_tokens": 144}
        for (label, keep, series), value, share in zip(LABELS, (0.98, 0.97, 0.3456), (None, 0.4375, 0.25), strict=True)
    ]  # fmt: skip
    paired = [
        {"label": LABELS[1][0], "other": LABELS[2][0], "keep": 0.25, "difference": 0.6244, "stderr": 0.023, "n": 100, "n_pictures": 100,
         "interval": [0.58, -0.01], "only_method": 64, "only_other": 2}
    ]  # fmt: skip
    return {"command": "run", "scores": scores, "gates": gates, "means": means, "paired": paired}


def test_what_failed_the_gate_is_in_no_table_but_that_of_the_gate(result: dict[str, Any]) -> None:
    table = keep_table(result["means"], result["scores"], result["gates"])
    assert table.headers == ["asked", "kept", "method", "color", "mean"]
    assert render_markdown(result).count("scene_relation") == 1
    assert "| scene_relation | 100 | 50.0 ± 2.0 | 10.0 | 50.0 | no: left out |" in render_markdown(result)


def test_what_was_reached_stands_beside_what_was_asked(result: dict[str, Any]) -> None:
    table = keep_table(result["means"], result["scores"], result["gates"])
    assert table.rows == [
        ["–", "100.0 %", "dense", "98.0 ± 2.0", "98.0 ± 2.0"],
        ["25 %", "43.8 %", LABELS[1][0], "97.0 ± 2.0", "97.0 ± 2.0"],
        ["25 %", "25.0 %", LABELS[2][0], "34.6 ± 2.0", "34.6 ± 2.0"],
    ]
    assert table.quiet_rows == {0}
    assert table.group_starts == {1, 2}, "what was kept makes a budget, not what was asked for"


def test_budgets_come_from_much_to_little_as_kept_with_dense_first(result: dict[str, Any]) -> None:
    dense, method, control = result["means"]
    unasked = {**method, "label": "dyvte", "keep": None, "kept_share": 0.3}
    mixed = [{**method, "keep": 0.1, "kept_share": 0.1}, unasked, {**control, "keep": 36, "kept_share": 0.251}, control, dense, method]
    table = keep_table(mixed, result["scores"], result["gates"])
    assert [row[1] for row in table.rows] == ["100.0 %", "43.8 %", "30.0 %", "25.1 %", "25.0 %", "10.0 %"]
    assert table.group_starts == {1, 2, 3, 5}
    assert [share_kept(mean) for mean in mixed] == [0.1, 0.3, 0.251, 0.25, 1.0, 0.4375]
    assert [asked(keep) for keep in (None, 1.0, 36, 0.05, 0.4305555)] == ["–", "100 %", "36", "5 %", "43.1 %"]


def test_a_mean_over_other_questions_is_not_shown(result: dict[str, Any]) -> None:
    result["means"][2] |= {"score": None, "note": "5 of 100 questions answered"}
    assert [row[-1] for row in keep_table(result["means"], result["scores"], result["gates"]).rows] == ["98.0 ± 2.0", "97.0 ± 2.0", "–"]
    [card] = cards(result)
    assert card.detail == ""
    assert "random_tokens</" not in "".join(re.findall(r"<svg.*?</svg>", render_html(result), re.DOTALL))


def test_the_plot_shows_what_was_kept_under_short_names(result: dict[str, Any]) -> None:
    rows = [{"series": "dense", "share": 1.0, "score": 0.9, "stderr": 0.01, "is_baseline": True},
            {"series": "vflowopt(keep=0.25, r1=0.43264316431)", "share": 0.25, "score": 0.8, "stderr": 0.01, "is_baseline": False}]  # fmt: skip
    svg = accuracy_keep_plot(rows, colour_by_label([{"label": row["series"], "is_baseline": row["is_baseline"]} for row in rows]))
    assert "vflowopt(keep=0.25, r1=0.433)" in svg
    assert "visual tokens kept, as a mean over the layers" in svg
    assert "25 %" in svg


def test_differences_are_in_points_with_their_sign(result: dict[str, Any]) -> None:
    [row] = paired_table(result["paired"]).rows
    assert row[2:] == ["+62.4 ± 2.3", "+58.0 … −1.0", "64 : 2", "100", "100"]
    assert headline(result["paired"][0]) == (
        "fastervlm(keep=0.25) − random_tokens (keep 0.25): +62.4 ± 2.3 points (95 % interval +58.0 … −1.0, n = 100, 100 pictures)"
    )
    few = {**result["paired"][0], "interval": None, "n_pictures": 19}
    assert headline(few).endswith("(too few pictures for an interval, n = 100, 19 pictures)")


def test_picture_rows_are_not_shown_as_text(result: dict[str, Any]) -> None:
    text = render_markdown(result)
    assert "## Accuracy by what was kept" in text
    assert "## Accuracy\n" not in text
    assert "one seed" in text, "the standing limit of scores"


def test_cards_show_the_first_method_beside_what_it_is_compared_to(result: dict[str, Any]) -> None:
    [card] = cards(result)
    assert (card.value, card.label, card.detail) == ("97.0 ± 2.0 %", "fastervlm, 43.8 % of the picture's tokens", "random_tokens 34.6 ± 2.0")


def test_the_page_has_the_plot_and_carries_its_pictures(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "overlays" / "a.png")
    result["overlays"] = [
        {"file": "overlays/a.png", "title": "scene_color", "caption": "what? Expected: <red>.", "starts_row": True},
        {"file": "overlays/a.png", "title": "fastervlm", "caption": "36 of 144", "starts_row": False},
    ]
    (tmp_path / "result.json").write_text(json.dumps(result))
    html = write_reports(tmp_path).html.read_text()
    assert html.count('<img src="data:image/png;base64,') == 2
    assert html.count('class="first"') == 1
    assert html.count("<svg") == 1
    assert "Expected: &lt;red&gt;." in html
    assert "overlays/a.png" not in html, "nothing is loaded from outside the page"


def test_without_methods_there_is_no_plot(result: dict[str, Any]) -> None:
    result["means"] = result["means"][:1]
    assert "<svg" not in render_html(result)
