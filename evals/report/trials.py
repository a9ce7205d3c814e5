"""The part of a report about a search for accuracy against latency: the trials, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.report import plots
from accel.evals.report.sections import Figure, Row, Section, Table, number

# beyond so many trials, the table holds the front, the defaults and the chosen one
MOST_ROWS = 40


def trial_sections(result: Mapping[str, Any]) -> list[Section]:
    """The section on `trials`, where the result holds them."""
    rows = result.get("trials")
    if not rows:
        return []
    about = result["trials_about"]
    text = (
        f"Score: mean over {', '.join(about['tasks'])}. Time: prefill, as a share of dense's on the same prompts in turn. Chosen is the fastest "
        f"whose score is at most {about['margin']:g} below dense's. {len(rows)} trials succeeded and {about['n_failed']} were refused."
    )
    return [Section("trials", "Trials", paragraphs=[text], tables=[trial_table(rows)])]


def trial_table(rows: Sequence[Row]) -> Table:
    """One row per trial, the fastest first. rows: of `accel.tune.front.FrontResult`."""
    shown = sorted(rows, key=lambda row: row["time_share"])
    is_short = len(rows) > MOST_ROWS
    if is_short:
        shown = [row for row in shown if row["is_front"] or row["is_default"] or row["is_chosen"]]
    options = list(rows[0]["options"])
    cells = [
        [str(row["number"]), *(_value(row["options"][option]) for option in options), _score(row), number(row["time_share"], 3),
         "yes" if row["is_front"] else "", _remark(row)]
        for row in shown
    ]  # fmt: skip
    cells.append(["", *([""] * len(options)), number(rows[0]["dense_score"], 3), number(1.0, 3), "", "dense"])
    caption = "On the front: no other trial is at least as good and as fast, and better in one of the two."
    if is_short:
        caption += f" Of {len(rows)} trials those on the front, the defaults and the chosen one; trials.json has all."
    headers = ["trial", *options, "score ± s.e.", "time", "on the front", ""]
    return Table(headers, cells, text_columns=(len(headers) - 1,), quiet_rows=frozenset([len(cells) - 1]), caption=caption)


def trial_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Score against time, a point per trial."""
    rows = result.get("trials")
    if not rows:
        return []
    points = [{"label": "dense", "score": rows[0]["dense_score"], "stderr": None, "cost": 1.0, "is_baseline": True, "is_front": False}]
    points += [
        {"label": "chosen" if row["is_chosen"] else "defaults" if row["is_default"] else "trials", "score": row["score"],
         "stderr": row["stderr"] if row["is_chosen"] else None, "cost": row["time_share"], "is_baseline": False, "is_front": row["is_front"]}
        for row in rows
    ]  # fmt: skip
    colours = plots.colour_by_label(sorted(points, key=lambda point: ("dense", "chosen", "defaults", "trials").index(str(point["label"]))))
    svg = plots.pareto_plot(points, colours, x_label="prefill time, share of dense's", y_label="mean score", width=8.6)
    return [Figure("trials", "", "Up and to the left is better. Filled: on the front, which the steps follow.", svg=svg)]


def _score(row: Row) -> str:
    return number(row["score"], 3) + ("" if row["stderr"] is None else f" ± {row['stderr']:.3f}")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remark(row: Row) -> str:
    return ", ".join(word for word, holds in (("chosen", row["is_chosen"]), ("defaults", row["is_default"])) if holds)
