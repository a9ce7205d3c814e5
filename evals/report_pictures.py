"""The part of a report about pictures: which tasks may speak, scores by what was kept, paired differences, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.overlays import LEGEND
from accel.evals.picture_summary import GATE
from accel.evals.report_sections import Row, Section, Table, number

WHAT_KEPT = "Kept: share of the picture's tokens that the decoder layers saw, on average, as reached; asked: what the method was told to keep."


def picture_sections(result: Mapping[str, Any]) -> list[Section]:
    """Sections for whatever of `gates`, `means`, `paired` and `overlays` the result holds."""
    found = []
    if result.get("gates"):
        found.append(Section("gates", "Questions about pictures", paragraphs=[_gate_text()], tables=[gate_table(result["gates"])]))
    if result.get("means"):
        tables = [keep_table(result["means"], result.get("scores", []), result.get("gates", []))]
        found.append(Section("kept", "Accuracy by what was kept", tables=tables))
    if result.get("paired"):
        found.append(Section("paired", "Differences on the same questions", tables=[paired_table(result["paired"])]))
    if result.get("overlays"):
        found.append(Section("overlays", "What was kept", paragraphs=[LEGEND]))
    return found


def text_scores(result: Mapping[str, Any]) -> list[Row]:
    """The rows of `scores` that are about text."""
    return [row for row in result.get("scores", []) if row.get("kind", "text") == "text"]


def gate_table(gates: Sequence[Row]) -> Table:
    """One row per task. gates: task, dense {value, stderr, n}, baselines, passes."""
    names = list(dict.fromkeys(name for gate in gates for name in gate["baselines"]))
    rows = [
        [gate["task"], str(gate["dense"]["n"]), points(gate["dense"]), *(number(100 * gate["baselines"][name], 1) for name in names),
         "yes" if gate["passes"] else "no: left out"]
        for gate in gates
    ]  # fmt: skip
    return Table(
        ["task", "n", "dense", *names, "passes"],
        rows,
        text_columns=(0, len(names) + 3),
        quiet_rows=frozenset(i for i, gate in enumerate(gates) if not gate["passes"]),
        caption="Right answers in per cent ± standard error. No image: the likeliest answer to each question text. Among present: a guess among what "
        "the picture holds.",
    )


def keep_table(means: Sequence[Row], scores: Sequence[Row], gates: Sequence[Row]) -> Table:
    """One row per method and budget, a column per task that passed, and their mean. means, scores: as in a result.json."""
    tasks = [gate["task"] for gate in gates if gate["passes"]]
    by_place = {(row["task"], row["label"]): row["score"] for row in scores if row.get("kind") == "picture"}
    in_order = sorted(means, key=_budget_order)
    rows = [
        [asked(mean["keep"]), reached(mean), mean["label"],
         *(points(score) if (score := by_place.get((task, mean["label"]))) else "–" for task in tasks), points(mean["score"])]
        for mean in in_order
    ]  # fmt: skip
    return Table(
        ["asked", "kept", "method", *(_short(task) for task in tasks), "mean"],
        rows,
        text_columns=(2,),
        quiet_rows=frozenset(i for i, mean in enumerate(in_order) if mean["is_baseline"]),
        group_starts=frozenset(i for i in range(1, len(in_order)) if in_order[i]["keep"] != in_order[i - 1]["keep"]),
        caption=f"Right answers in per cent ± standard error; mean: over the questions of all columns. {WHAT_KEPT}",
    )


def paired_table(paired: Sequence[Row]) -> Table:
    """One row per method and what it is compared to. paired: rows of `picture_summary.paired_row`."""
    rows = [
        [asked(row["keep"]), f"{row['label']} − {row['other']}", f"{signed(row['difference'])}{_error(row)}", interval_text(row["interval"]),
         f"{row['only_method']} : {row['only_other']}", str(row["n"])]
        for row in paired
    ]  # fmt: skip
    return Table(
        ["asked", "difference", "points ± s.e.", "95 % interval", "only right", "n"],
        rows,
        text_columns=(1,),
        group_starts=frozenset(i for i in range(1, len(paired)) if paired[i]["label"] != paired[i - 1]["label"]),
        caption="Percentage points on the same questions. Standard error and interval over pictures (paired bootstrap), since questions about one "
        "picture depend on each other. Only right: questions that the first alone, and the second alone, got right.",
    )


def headline(row: Row) -> str:
    """ "fastervlm(keep=0.25) − random_tokens (keep 0.25): +61.2 ± 2.3 points (95 % interval +56.8 … +65.6, n = 500)" """
    return (
        f"{row['label']} − {row['other']}: {signed(row['difference'])}{_error(row)} points "
        f"(95 % interval {interval_text(row['interval'])}, n = {row['n']})"
    )


def points(score: Mapping[str, Any]) -> str:
    """A share of right answers in per cent: "97.2 ± 0.4"."""
    value = number(100 * score["value"], 1)
    return value if score.get("stderr") is None else f"{value} ± {100 * score['stderr']:.1f}"


def signed(share: float) -> str:
    """A difference of shares in points with its sign: "+61.2"."""
    return f"{100 * share:+.1f}".replace("-", "−")


def interval_text(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}"


def asked(keep: float | int | None) -> str:
    """What was asked for: "25 %", "36", or nothing for dense."""
    return "–" if keep is None else f"{100 * keep:g} %" if isinstance(keep, float) else str(keep)


def reached(mean: Row) -> str:
    """What was kept, as a mean over the decoder layers; everything where nothing was asked to leave."""
    return f"{100 * (1.0 if mean['kept_share'] is None else mean['kept_share']):.1f} %"


def share_asked(mean: Row) -> float:
    """The share on the axis of a plot: as asked for, counts as shares of the picture's tokens; 1 for dense."""
    keep = mean["keep"]
    if keep is None or (isinstance(keep, int) and not mean["visual_tokens"]):
        return 1.0
    return keep if isinstance(keep, float) else min(1.0, keep / mean["visual_tokens"])


def _budget_order(mean: Row) -> tuple[bool, float]:
    """Dense first, then from much to little; what is equal stays in the order in which it ran."""
    return not mean["is_baseline"], -share_asked(mean)


def _error(row: Row) -> str:
    return "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"


def _short(task: str) -> str:
    return task.removeprefix("scene_").replace("_", " ")


def _gate_text() -> str:
    return f"A task counts only where dense beats not looking, and guessing among what is there, by {100 * GATE:.0f} points in this very run."
