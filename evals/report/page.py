"""Writes `report.md` and a self-contained `report.html` beside the `result.json` of a run folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.evals.pictures.overlays import data_address
from accel.evals.report import plot_grids, plots
from accel.evals.report.caches import cache_figures
from accel.evals.report.comparisons import comparison_figures, prefill_rows
from accel.evals.report.drawn import drawn_cards, drawn_figures, drawn_sections, head_figures
from accel.evals.report.pictures import picture_sections, points, share_kept, spread_exits, text_scores
from accel.evals.report.sections import Card, Figure, Row, Section, Table, milliseconds, number, ratio, score_cell, sections
from accel.evals.report.serving import serving_sections
from accel.evals.report.trials import trial_figures

NEEDED_FOR_HTML = ("jinja2", "matplotlib")
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Reports:
    """The two files that were written."""

    markdown: Path
    html: Path


def require_packages(*more: str) -> None:
    """Raises AccelError with the command to run where a package for the HTML report, or one of `more`, is missing. Ask before a long measurement."""
    missing = [name for name in (*NEEDED_FOR_HTML, *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise AccelError(f"reports need {' and '.join(missing)}. Install with:\n    pip install {' '.join(missing)}")


def write_reports(folder: str | Path) -> Reports:
    """Reads `result.json` in `folder`, writes both reports beside it and returns their paths.

    Raises AccelError without a result, and without the packages of `require_packages`, then before anything is written.
    """
    require_packages()
    folder = Path(folder)
    source = folder / "result.json"
    if not source.exists():
        raise AccelError(f"{folder} holds no result.json: the run has not finished, or this is not a run folder")
    result = json.loads(source.read_text(encoding="utf-8"))
    reports = Reports(folder / "report.md", folder / "report.html")
    reports.markdown.write_text(render_markdown(result), encoding="utf-8")
    reports.html.write_text(render_html(result, folder), encoding="utf-8")
    return reports


def render_markdown(result: Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured markdown, without figures."""
    parts = [f"# {_title(result)}", _subtitle(result), *(f"> {notice}" for notice in result.get("notices", []))]
    for section in all_sections(result):
        parts += [f"## {section.title}", *section.paragraphs]
        parts += ["\n".join(f"- {bullet}" for bullet in section.bullets)] if section.bullets else []
        for table in [*section.tables, *section.drawn_tables]:
            parts += [_markdown_table(table), *([f"_{table.caption}_"] if table.caption else [])]
    for title, key in (("Settings", "config"), ("Environment", "env")):
        parts += [f"## {title}", _markdown_table(_key_values(result.get(key)))] if result.get(key) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def all_sections(result: Mapping[str, Any]) -> list[Section]:
    """Everything that the result holds, in reading order."""
    return [*serving_sections(result), *drawn_sections(result), *picture_sections(result), *sections({**result, "scores": text_scores(result)})]


def render_html(result: Mapping[str, Any], folder: Path | None = None) -> str:
    """The report as one HTML page that loads nothing: style and figures are inside it. folder: of the pictures that the result names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures: dict[str, list[Figure]] = {}
    for figure in [*figures_of(result), *(_overlay_figures(result, folder) if folder else [])]:
        figures.setdefault(figure.section, []).append(figure)
    return jinja.get_template("report.html.j2").render(
        title=_title(result),
        eyebrow=f"accel {result.get('command', '')}".strip(),
        subtitle=_subtitle(result),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # our own file, not user text
        cards=cards(result),
        notices=result.get("notices", []),
        sections=all_sections(result),
        figures=figures,
        svg=Markup,  # figures are made by plots.py; labels inside them are escaped there
        details=[("Settings", _key_values(result.get("config"))), ("Environment", _key_values(result.get("env")))],
    )


def figures_of(result: Mapping[str, Any]) -> list[Figure]:
    """Every picture that the result supports."""
    latency, scores = result.get("latency", []), text_scores(result)
    colours = plots.colour_by_label([*latency, *scores])
    shares_prefill = bool(result.get("config", {}).get("shared_prefill"))
    timed = [*latency, *([] if latency or shares_prefill else prefill_rows(scores))]
    figures = [figure for metric, unit, name in _TIME_FIGURES if (figure := _time_figure(metric, timed, colours, unit=unit, y_label=name))]
    about_pictures = [*_keep_figures(result.get("means", [])), *_exit_figures(spread_exits(result)), *_attention_figures(result.get("attention"))]
    drawn = [*drawn_figures(result.get("drawn", [])), *head_figures(result.get("heads", []))]
    accuracy = [*_accuracy_figures(scores, colours), *cache_figures(scores)]
    compared = [*comparison_figures(result, colours), *trial_figures(result)]
    return [*figures, *accuracy, *compared, *about_pictures, *drawn, *_map_figures(result.get("block_maps", []))]


def cards(result: Mapping[str, Any]) -> list[Card]:
    """Key figures of the first method: its score at each task beside dense, its time and density at the greatest length; its answers by budget."""
    if result.get("command") == "compare":
        # several folders have no one method to be looked at
        return []
    latency = [r for r in result.get("latency", []) if r["metric"] == "ttft_ms"]
    scores = text_scores(result)
    focus = next((r["label"] for r in [*scores, *latency] if not r.get("is_baseline")), None)
    found = []
    for s in scores:
        if s["label"] == focus:
            same_task = (d for d in scores if (d["task"], d.get("tokens")) == (s["task"], s.get("tokens")))
            dense = next((d for d in same_task if d.get("is_baseline")), None)
            length = f" at {plots.short_length(s['tokens'])}" if s.get("tokens") else ""
            beside = f"dense {score_cell(dense['score'])}" if dense else f"n = {s['n']}"
            found.append(Card(number(s["score"]["value"], 2), f"{s['task']}{length}", beside))
    longest = max((r["tokens"] for r in latency), default=0)
    for r in latency:
        if r["label"] == focus and r["tokens"] == longest:
            ratios = " · ".join(f"{ratio(value)} {label}" for label, value in r["speedup"].items())
            length = plots.short_length(longest)
            found.append(Card(milliseconds(r["ms"]["median"]), f"to first token at {length}", ratios))
            explained = r["note"] or "share of causal tiles computed"
            found.append(Card(number(r["density"], 2, missing="dense"), f"density at {length}", explained))
    return [*found, *_picture_cards(result.get("means", []), result.get("paired", [])), *drawn_cards(result)]


def _picture_cards(means: Sequence[Row], paired: Sequence[Row]) -> list[Card]:
    """The mean score of the first series at each budget, and the first few comparisons."""
    focus = next((m["series"] for m in means if not m["is_baseline"]), None)
    mine = sorted((m for m in means if m["series"] == focus and m["score"] and not m["is_baseline"]), key=share_kept, reverse=True)
    by_label = {m["label"]: m for m in means}
    cards = []
    for mean in mine:
        others = [other for row in paired if row["label"] == mean["label"] and (other := by_label[row["other"]])["score"]]
        beside = " · ".join(f"{other['series']} {points(other['score'])}" for other in others)
        cards.append(Card(f"{points(mean['score'])} %", f"{focus}, {100 * share_kept(mean):.3g} % of the picture's tokens", beside))
    return cards


# --- figures ------------------------------------------------------------------------------------------------------------------


_TIME_FIGURES = (
    ("ttft_ms", 1e3, "time to first token, s"), ("tpot_ms", 1.0, "time per output token, ms"), ("prefill_ms", 1e3, "prefill while scored, s"),
)  # fmt: skip


def _time_figure(metric: str, latency: Sequence[Row], colours: Mapping[str, str], *, unit: float, y_label: str) -> Figure | None:
    rows = [r for r in latency if r["metric"] == metric]
    if len({r["tokens"] for r in rows}) < 2:
        return None
    svg = plots.time_plot(rows, colours, y_label=y_label, unit=unit)
    section, what = ("fronts", "Prefill against length. ") if metric == "prefill_ms" else (metric, "")
    caption = f"{what}Median with p20–p80 bars, both axes logarithmic. Dashed: dense baselines."
    return Figure(section, "", caption, svg=svg, starts_row=section == "fronts")


def _accuracy_figures(scores: Sequence[Row], colours: Mapping[str, str]) -> list[Figure]:
    figures = []
    for task, tokens in dict.fromkeys((s["task"], s.get("tokens")) for s in scores):
        mine = [s for s in scores if (s["task"], s.get("tokens")) == (task, tokens)]
        points = [
            {"label": s["label"], "density": density, "is_baseline": s.get("is_baseline", False), **score}
            for s in mine
            for score in [{"score": s["score"]["value"], "stderr": s["score"].get("stderr")}]
            if (density := _density(s)) is not None
        ]
        if len(points) > 1 and not all(point["is_baseline"] for point in points):
            title = f"{task} at {plots.short_length(tokens)}" if tokens else task
            metric = {"exact": "share of right answers"}.get(name := mine[0]["score"].get("name", "exact"), name)
            svg = plots.accuracy_density_plot(points, colours, title=title, y_label=metric)
            figures.append(Figure("accuracy", "", "", svg=svg))
    return figures


def _density(s: Row) -> float | None:
    """The density of a row of scores: 1 of dense, and of a method whose attention calls all ran dense; None where no method chose what is read."""
    calls = s.get("calls") or {"sparse": 0, "dense": {}}
    ran_dense = s.get("is_baseline") or (not calls["sparse"] and any(calls["dense"].values()))
    return s.get("density") if s.get("density") is not None else 1.0 if ran_dense else None


def _keep_figures(means: Sequence[Row]) -> list[Figure]:
    rows = [
        {"share": share_kept(m), "score": m["score"]["value"], "stderr": m["score"]["stderr"], **{key: m[key] for key in ("series", "is_baseline")}}
        for m in means
        if m["score"]
    ]
    if all(row["is_baseline"] for row in rows):
        return []
    colours = plots.colour_by_label([{"label": row["series"], "is_baseline": row["is_baseline"]} for row in rows])
    caption = "Mean over the tasks that pass, with standard errors. Dashed: the whole picture."
    return [Figure("kept", "", caption, svg=plots.accuracy_keep_plot(rows, colours))]


def _exit_figures(exits: Sequence[Row]) -> list[Figure]:
    """One histogram per method; a task has the same colour in all of them."""
    tasks = dict.fromkeys(task for row in exits for task in row["counts"])
    colours = plots.colour_by_label([{"label": task} for task in tasks])
    return [
        Figure("exits", row["label"], caption, svg=plots.exit_plot(row["counts"], colours))
        for row in exits
        for caption in [f"Mean: layer {number(row['mean'], 2)} of 0–{row['n_layers'] - 1}."]
    ]


def _attention_figures(attention: Row | None) -> list[Figure]:
    return [Figure("attention", "", "", svg=plots.attention_plot(attention["layers"]))] if attention else []


def _overlay_figures(result: Mapping[str, Any], folder: Path) -> list[Figure]:
    """The pictures that the result names, read from its folder."""
    return [
        Figure(section, row["title"], row["caption"], image=data_address((folder / row["file"]).read_bytes()), starts_row=row["starts_row"])
        for section, key in (("overlays", "overlays"), ("grids", "grids"))
        for row in result.get(key, [])
    ]


def _map_figures(block_maps: Sequence[Row]) -> list[Figure]:
    """The maps of single heads first, then one overview per method whose heads differ."""
    squares = [
        Figure("maps", m["label"], caption, image=plots.tile_image(one["rows"]), is_square=True)
        for m in block_maps
        for one in m["maps"]
        for caption in [f"layer {one['layer']}, head {one['head']}: density {one['density']:.2f}"]
    ]
    caption = "Density of every head; the stronger the colour, the more it read. A layer without colour ran dense."
    overviews = [
        Figure("maps", f"{m['label']}: all heads", caption, svg=plot_grids.head_density_plot(m["density"], m["n_layers"]))
        for m in block_maps
        if len({d for heads in m["density"].values() for d in heads}) > 1
    ]
    return [*squares, *overviews]


# --- text ---------------------------------------------------------------------------------------------------------------------


def _title(result: Mapping[str, Any]) -> str:
    return str(result.get("title") or f"accel {result.get('command', 'run')}")


def _subtitle(result: Mapping[str, Any]) -> str:
    return " · ".join(str(part) for part in (result.get("model"), result.get("dtype"), result.get("device"), result.get("created")) if part)


def _key_values(values: Any, prefix: str = "") -> Table:
    return Table(["", ""], [list(pair) for pair in _flatten(values or {}, prefix)], text_columns=(0, 1))


def _flatten(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)))
    return pairs


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---" if i in table.text_columns else "--:" for i in range(len(table.headers))) + "|"
    return "\n".join([line(table.headers), rule, *(line(row) for row in table.rows)]) if table.rows else ""

