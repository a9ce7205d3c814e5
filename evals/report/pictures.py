"""The part of a report about pictures: which tasks may speak, scores by what was kept, paired differences, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.pictures.overlays import LEGEND
from accel.evals.report.sections import Row, Section, Table, kibibytes, number
from accel.evals.summary.pictures import GATE

WHAT_KEPT = "Kept: share of the picture's tokens that the decoder layers saw, on average, as reached; asked: what the method was told to keep."
_WHAT_SAVED = (
    "Last layer: the last with visual tokens, counted from 0, as a mean over prompts; where none ever leave, the last of all. FLOPs saved: the share "
    "of what visual tokens cost in the decoder's prefill; KV saved: per prompt. Both by arithmetic over the tokens that reached each layer."
)
_STAGES = (
    "Share of a token's attention, as a mean over heads and tokens. Text that reads is what stands behind the picture; text that is read includes "
    "the begin token, on which much attention often rests. The DyVTE paper (arXiv 2411.19628) reads such curves from left to right as fusion of "
    "text and picture, intra-modality reading, and multimodal reasoning. Where one ends differs by model, and nothing here measures it."
)


def picture_sections(result: Mapping[str, Any]) -> list[Section]:
    """Sections for whatever of `gates`, `means`, `exits`, `paired`, `attention` and `overlays` the result holds."""
    found = []
    if result.get("gates"):
        found.append(Section("gates", "Questions about pictures", paragraphs=[_gate_text()], tables=[gate_table(result["gates"])]))
    if result.get("means"):
        saved = savings_table(result["means"])
        tables = [keep_table(result["means"], result.get("scores", []), result.get("gates", [])), *([saved] if saved.rows else [])]
        found.append(Section("kept", "Accuracy by what was kept", tables=tables))
    if exits := spread_exits(result):
        found.append(Section("exits", "The last layer with visual tokens", tables=[exit_table(exits)]))
    if result.get("paired"):
        found.append(Section("paired", "Differences on the same questions", tables=[paired_table(result["paired"])]))
    if result.get("attention"):
        found.append(Section("attention", "What text and picture read, by layer", tables=[attention_table(result["attention"])]))
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
         *(points(score) if (score := by_place.get((task, mean["label"]))) else "–" for task in tasks),
         points(mean["score"]) if mean["score"] else "–"]
        for mean in in_order
    ]  # fmt: skip
    return Table(
        ["asked", "kept", "method", *(_short(task) for task in tasks), "mean"],
        rows,
        text_columns=(2,),
        quiet_rows=frozenset(i for i, mean in enumerate(in_order) if mean["is_baseline"]),
        group_starts=frozenset(i for i in range(1, len(in_order)) if _budget_order(in_order[i]) != _budget_order(in_order[i - 1])),
        caption=f"Right answers in per cent ± standard error; mean: over the questions of all columns, – where some are missing. {WHAT_KEPT}",
    )


def savings_table(means: Sequence[Row]) -> Table:
    """One row per method that could drop visual tokens: the last layer that they reached, and what was saved. Empty in results that do not tell."""
    known = [mean for mean in sorted(means, key=_budget_order) if mean.get("last_visual_layer") is not None]
    rows = [
        [mean["label"], reached(mean), number(mean["last_visual_layer"], 2), share(mean["flops_saved"]), kibibytes(mean["kv_bytes_saved"])]
        for mean in known
    ]
    headers = ["method", "kept", "last layer with visual tokens (mean)", "FLOPs saved", "KV saved"]
    return Table(headers, rows, caption=_WHAT_SAVED)


def spread_exits(result: Mapping[str, Any]) -> list[Row]:
    """The rows of `exits` whose samples left behind different layers: of a fixed layer, the mean says everything."""
    return [row for row in result.get("exits", []) if sum(map(bool, exit_counts(row))) > 1]


def exit_counts(row: Row) -> list[int]:
    """Samples by the last layer with visual tokens, over all tasks."""
    return [sum(counts) for counts in zip(*row["counts"].values(), strict=True)]


def exit_table(exits: Sequence[Row]) -> Table:
    """One row per method and task: its questions by the last layer that still saw the picture. exits: rows of `visual_layers.exit_row`."""
    rows: list[list[str]] = []
    starts = []
    for row in exits:
        starts.append(len(rows))
        for task, counts in row["counts"].items():
            n = sum(counts)
            mean = sum(layer * count for layer, count in enumerate(counts)) / n if n else None
            shares = ", ".join(f"{layer} ({count / n:.0%})" for layer, count in enumerate(counts) if count)
            rows.append([row["label"], _short(task), number(mean, 2), shares, str(n)])
    caption = "Share of the questions by the last layer, counted from 0, that visual tokens reached; at the last of all, they never left."
    return Table(["method", "task", "mean", "last layer", "n"], rows, text_columns=(0, 1, 3), group_starts=frozenset(starts[1:]), caption=caption)


def attention_table(attention: Row) -> Table:
    """One row per decoder layer. attention: of `attention_flow`."""
    rows = [
        [str(row["layer"]), *(share(row[name]) for name in ("text_to_visual", "text_to_text", "visual_to_visual"))] for row in attention["layers"]
    ]
    counts = f"{attention['n_visual']} visual tokens, {attention['n_text']} text tokens behind them."
    return Table(["layer", "text → picture", "text → text", "picture → picture"], rows, text_columns=(), caption=f"{_STAGES} {counts}")


def paired_table(paired: Sequence[Row]) -> Table:
    """One row per method and what it is compared to. paired: rows of `summary.pictures.paired_row`."""
    rows = [
        [asked(row["keep"]), f"{row['label']} − {row['other']}", f"{signed(row['difference'])}{_error(row)}", interval_text(row["interval"]),
         f"{row['only_method']} : {row['only_other']}", str(row["n"]), str(row["n_pictures"])]
        for row in paired
    ]  # fmt: skip
    return Table(
        ["asked", "difference", "points ± s.e.", "95 % interval", "only right", "n", "pictures"],
        rows,
        text_columns=(1,),
        group_starts=frozenset(i for i in range(1, len(paired)) if paired[i]["label"] != paired[i - 1]["label"]),
        caption="Percentage points on the same questions. Standard error and interval over pictures (paired bootstrap), since questions about one "
        "picture depend on each other. Only right: questions that the first alone, and the second alone, got right.",
    )


def headline(row: Row) -> str:
    """ "fastervlm(keep=0.25) − random_tokens (keep 0.25): +61.2 ± 2.3 points (95 % interval +56.8 … +65.6, n = 500, 100 pictures)" """
    interval = "too few pictures for an interval" if row["interval"] is None else f"95 % interval {interval_text(row['interval'])}"
    pictures = f"{row['n_pictures']} {'picture' if row['n_pictures'] == 1 else 'pictures'}"
    return (
        f"{row['label']} − {row['other']}: {signed(row['difference'])}{_error(row)} points "
        f"({interval}, n = {row['n']}, {pictures})"
    )


def points(score: Mapping[str, Any]) -> str:
    """A share of right answers in per cent: "97.2 ± 0.4"."""
    value = number(100 * score["value"], 1)
    return value if score.get("stderr") is None else f"{value} ± {100 * score['stderr']:.1f}"


def share(value: float | None) -> str:
    """A share in per cent: "37.5 %"."""
    return "–" if value is None else f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """A difference of shares in points with its sign: "+61.2"."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval_text(interval: Sequence[float] | None) -> str:
    return "too few pictures" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}"


def asked(keep: float | int | None) -> str:
    """What was asked for: "25 %", "36", or nothing for dense."""
    return "–" if keep is None else f"{100 * keep:.3g} %" if isinstance(keep, float) else str(keep)


def reached(mean: Row) -> str:
    """What was kept, as a mean over the decoder layers; everything where nothing was asked to leave."""
    return share(share_kept(mean))


def share_kept(mean: Row) -> float:
    """The share on the axis of a plot: as reached, a mean over the decoder layers; 1 where nothing was asked to leave."""
    return 1.0 if mean["kept_share"] is None else float(mean["kept_share"])


def _budget_order(mean: Row) -> tuple[bool, float]:
    """Dense first, then from much to little; what is equal but for rounding stays in the order in which it ran."""
    return not mean["is_baseline"], -round(share_kept(mean), 2)


def _error(row: Row) -> str:
    return "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"


def _short(task: str) -> str:
    return task.removeprefix("scene_").replace("_", " ")


def _gate_text() -> str:
    return f"A task counts only where dense beats not looking, and guessing among what is there, by {100 * GATE:.0f} points in this very run."
