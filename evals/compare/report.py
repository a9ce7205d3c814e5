"""Tables and files of a comparison of run folders: `compare.json`, `compare.md` and a self-contained `compare.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.evals.report.comparisons import comparison_table, front_table
from accel.evals.report.overview import overview_table
from accel.evals.report.page import render_html, render_markdown
from accel.evals.report.pictures import text_scores
from accel.evals.report.sections import METRIC_TITLES, Row, Section, Table, accuracy_table, latency_table, number

FILES = ("compare.json", "compare.md", "compare.html")


@dataclass(frozen=True)
class Written:
    """The three files."""

    data: Path
    markdown: Path
    html: Path


def write_comparison(result: Mapping[str, Any], folder: Path) -> Written:
    """Writes the three files into `folder`, over those of an earlier comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Written(*(folder / name for name in FILES))
    written.data.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    written.markdown.write_text(render_markdown(result), encoding="utf-8")
    written.html.write_text(render_html(result), encoding="utf-8")
    return written


def titled_tables(result: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """What `accel compare` prints."""
    found = [("Folders", source_table(result["sources"]))]
    if scores := text_scores(result):
        found.append(("Scores", accuracy_table(scores)))
        found += [("Scores of all tasks", overview)] if (overview := overview_table(scores)) else []
    if result["comparisons"]:
        found.append(("Differences, prompt by prompt", comparison_table(result["comparisons"])))
    for metric, title in METRIC_TITLES.items():
        if rows := [row for row in result["latency"] if row["metric"] == metric]:
            found.append((title, latency_table(rows)))
    if result["fronts"]:
        found.append(("Accuracy against time", front_table(result["fronts"])))
    return [*found, *([("Gate", gate_table(result["gate"]))] if result.get("gate") else [])]


def compare_sections(result: Mapping[str, Any]) -> list[Section]:
    """Sections for `gate` and `sources`, where the result is a comparison."""
    found = []
    if result.get("gate"):
        found.append(Section("gate", "Gate", tables=[gate_table(result["gate"])]))
    if result.get("sources"):
        found.append(Section("sources", "What is compared", tables=[source_table(result["sources"])]))
    return found


def source_table(sources: Sequence[Row]) -> Table:
    """One row per folder. sources: of `folders.compare`."""
    columns = ("name", "command", "model", "machine", "seed", "samples", "accel", "git", "created")
    rows = [["–" if source[key] is None else str(source[key]) for key in columns] for source in sources]
    return Table(["folder", *columns[1:]], rows, text_columns=(0, 1, 2, 3, 6, 7, 8))


def gate_table(rows: Sequence[Row]) -> Table:
    """One row per method, task and length. rows: of `gate.gate_rows`."""
    has_bound = any(row["bound"] is not None for row in rows)
    cells = [
        [row["label"], row["task"], str(row["tokens"] or ""), number(row["loss"], 3), *([number(row["bound"], 3)] if has_bound else []),
         f"{row['margin']:g}", str(row["n"]), "yes" if row["passes"] else "no"]
        for row in rows
    ]  # fmt: skip
    bound = " Bound: the most that it may be (one-sided), which is what has to be within the margin." if has_bound else ""
    return Table(
        ["method", "task", "tokens", "loss", *(["bound"] if has_bound else []), "margin", "n", "passes"],
        cells,
        text_columns=(0, 1),
        caption=f"Loss: score of dense less that of the method on the same prompts; of a perplexity, its rise as a share.{bound} n: prompts.",
    )
