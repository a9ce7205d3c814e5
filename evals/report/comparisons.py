"""The part of a report that compares: paired tests, accuracy against time, and right answers by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.report import plot_grids, plots
from accel.evals.report.plots import short_length
from accel.evals.report.sections import Figure, Row, Section, Table, kibibytes, milliseconds, number, ratio
from accel.evals.summary.fronts import CLEAN
from accel.evals.summary.significance import FEWEST_UNITS, describe_p

TIMES = {"ttft_ms": "time to first token", "prefill_ms": "prefill while it was scored"}
_TIMED_WHILE_SCORED = (
    "Times were taken while prompts were scored, each prompt once: accel bench takes them in turns, several times over, beside both dense baselines."
)

_HOW_COMPARED = (
    "First minus second on the same prompts; “all”: over every length and every task with a score, perplexities left out, prompts made from one draw "
    "counted once. Better : worse: prompts on which the first scored above, and below, the second; only these tell anything. p: how often a "
    "difference as large, in either direction, would be seen if there were none; exact McNemar test where a prompt is one hit or miss, otherwise "
    "over all ways to flip the signs of whole prompts. "
    f"Interval: paired bootstrap over prompts, from {FEWEST_UNITS} of them on."
)
_LOG_PROBS = "Log-prob: the difference in nats ± s.e., where the score is another."
_ONE_DENSE = "Dense is the model's own attention; on a CPU our dense kernel may be faster: accel bench shows both. "
_BYTES = "Cache: how many bytes more the first held at its peak, where neither holds a whole one."


def comparison_sections(result: Mapping[str, Any]) -> list[Section]:
    """Sections for whatever of `comparisons`, `depths`, `positions` and `fronts` the result holds."""
    found = []
    if rows := result.get("comparisons"):
        found.append(Section("comparisons", "Differences, prompt by prompt", tables=[comparison_table(rows)]))
    if result.get("depths"):
        tables = [depth_table(rows) for rows in _by_task(result["depths"]).values()]
        found.append(Section("depths", "Right answers by length and depth", paragraphs=[_depth_text()], drawn_tables=tables))
    if rows := result.get("positions"):
        found.append(Section("positions", "Perplexity by position", tables=[position_table(mine) for mine in _by_task(rows).values()]))
    if rows := result.get("fronts"):
        text = [_TIMED_WHILE_SCORED] if any(row["time"] != CLEAN for row in rows) else []
        found.append(Section("fronts", "Accuracy against time", paragraphs=text, tables=[front_table(rows)]))
    return found


def comparison_table(rows: Sequence[Row]) -> Table:
    """One row per comparison. rows: of `significance.compared`."""
    starts = frozenset(i for i in range(len(rows)) if not i or _pair(rows[i]) != _pair(rows[i - 1]))
    has_log_probs, has_bytes = (any(row.get(name) is not None for row in rows) for name in ("log_prob", "bytes"))
    cells = [
        [*(_pair(row) if i in starts else ("", "")), _task(row), _length(row), _difference(row), _interval(row),
         f"{row['better']} : {row['worse']}", str(row["n"]), row["test"], describe_p(row), *([_log_prob(row)] if has_log_probs else []),
         *([_bytes(row)] if has_bytes else [])]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    units = "/".join(dict.fromkeys(row["unit"] for row in rows))
    return Table(
        ["method", "against", "task", "tokens", "difference ± s.e.", "95 % interval", "better : worse", units, "test", "p",
         *(["log-prob"] if has_log_probs else []), *(["cache, difference"] if has_bytes else [])],
        cells,
        text_columns=(0, 1, 2, 8),
        group_starts=starts - {0},
        caption=" ".join(filter(None, [_HOW_COMPARED, _LOG_PROBS if has_log_probs else "", _BYTES if has_bytes else "", _count(rows)])),
    )


def depth_table(rows: Sequence[Row]) -> Table:
    """Shares of right answers, a row per length and label and a column per depth. rows: of `depths.depth_rows`, of one task."""
    cells = [
        [short_length(tokens), row["label"], *(number(shares[row["lengths"].index(tokens)], 2) for shares in row["share"])]
        for tokens in sorted({n for row in rows for n in row["lengths"]}) for row in rows if tokens in row["lengths"]
    ]  # fmt: skip
    headers = ["tokens", "method", *rows[0]["depths"]]
    return Table(headers, cells, text_columns=(1,), caption=f"{rows[0]['task']}, by depth of the answer.")


def position_table(rows: Sequence[Row]) -> Table:
    """A row per length and label and a column per place. rows: of `positions.position_rows`, of one task."""
    depths = rows[0]["depths"]
    cells = [[short_length(row["tokens"]), row["label"], *(number(value, 1) for value in row["perplexity"])] for row in rows]
    n = " or ".join(dict.fromkeys(str(n) for row in rows for n in row["n"]))
    caption = f"{rows[0]['task']}: perplexity of the tokens before each share of the prompt, {n} tokens a cell; lower is better."
    starts = frozenset(i for i in range(1, len(rows)) if rows[i]["tokens"] != rows[i - 1]["tokens"])
    return Table(["tokens", "method", *(f"{depth:.0%}" for depth in depths)], cells, text_columns=(1,), group_starts=starts, caption=caption)


def front_table(rows: Sequence[Row]) -> Table:
    """One row per length and label. rows: of `fronts.front_rows`."""
    by_place: dict[Any, list[Row]] = {}
    for row in rows:
        by_place.setdefault(_place(row), []).append(row)
    cells = []
    for mine in by_place.values():
        dense = min((row["ms"] for row in mine if row["is_baseline"] and row["ms"] is not None), default=None)
        cells += [
            [_where(row), row["label"], number(row["score"], 3) + ("" if row["stderr"] is None else f" ± {row['stderr']:.3f}"),
             milliseconds(row["ms"]), ratio(dense / row["ms"] if dense and row["ms"] else None), "yes" if row["is_front"] else ""]
            for row in mine
        ]  # fmt: skip
    has_several = any(sum(row["is_baseline"] and row["ms"] is not None for row in mine) > 1 for mine in by_place.values())
    dense_name = "fastest dense" if has_several else "dense"
    starts = [sum(len(mine) for mine in list(by_place.values())[:i]) for i in range(1, len(by_place))]
    meant: dict[str, dict[str, None]] = {}
    for row in rows:
        meant.setdefault(f"{_score_name(row)}; {TIMES[row['time']]}", {})[_where(row)] = None
    if len(meant) == 1:
        # what is the same everywhere needs no names of machines and folders
        meant = {what: dict.fromkeys(map(_size, rows)) for what in meant}
    captions = [f"{('; ' if len(meant) > 1 else ', ').join(places)}: {what}." for what, places in meant.items()]
    return Table(
        ["tokens", "method", "score ± s.e.", "time", f"× {dense_name}", "on the front"],
        cells,
        text_columns=(1,),
        quiet_rows=frozenset(i for i, row in enumerate(rows) if row["is_baseline"]),
        group_starts=frozenset(starts),
        caption=f"× {dense_name}: its time over that of the row, above 1 is faster. {'' if has_several else _ONE_DENSE}"
        f"On the front: no other is at least as good and as fast, and better in one of the two. {' '.join(captions)}",
    )


def comparison_figures(result: Mapping[str, Any], colours: Mapping[str, str]) -> list[Figure]:
    """The pictures of these sections: one per task with depths, one per length of a front."""
    return [*_depth_figures(result.get("depths", [])), *front_figures(result.get("fronts", []), colours)]


def front_figures(fronts: Sequence[Row], colours: Mapping[str, str]) -> list[Figure]:
    """One picture per length. rows: of `fronts.front_rows`."""
    known = {**plots.colour_by_label(fronts), **colours}
    found = []
    for place in dict.fromkeys(map(_place, fronts)):
        mine = [row for row in fronts if _place(row) == place and row["ms"] is not None]
        unit = 1e3 if max(row["ms"] for row in mine) >= 1e3 else 1.0
        points = [{**row, "cost": row["ms"] / unit} for row in mine]
        x_label = f"{TIMES[mine[0]['time']]}, {'s' if unit > 1 else 'ms'}"
        svg = plots.pareto_plot(points, known, x_label=x_label, y_label=_score_name(mine[0], most=2))
        caption = "Up and to the left is better. Filled: on the front, which the steps follow; squares: dense."
        found.append(Figure("fronts", _where(mine[0], unit=" tokens"), caption, svg=svg))
    return found


def prefill_rows(scores: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for `plots.time_plot` from the timed passes of scored prompts, where no latency was measured: a mean over tasks by length and label."""
    found = []
    for label, tokens in dict.fromkeys((row["label"], row["tokens"]) for row in scores if row.get("prefill_ms") and row.get("tokens")):
        mine = [row for row in scores if (row["label"], row["tokens"]) == (label, tokens) and row.get("prefill_ms")]
        ms = {key: sum(row["prefill_ms"][key] for row in mine) / len(mine) for key in ("median", "p20", "p80")}
        found.append({"metric": "prefill_ms", "label": label, "tokens": tokens, "ms": ms, "is_baseline": bool(mine[0].get("is_baseline"))})
    return found


def _depth_figures(depths: Sequence[Row]) -> list[Figure]:
    return [Figure("depths", task, "", svg=plot_grids.depth_plot(rows)) for task, rows in _by_task(depths).items()]


def _by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row)
    return found


def _depth_text() -> str:
    return ("Share of right answers by the length of the prompt and by where in it the answer stands; the stronger the colour, the more were right, "
            "and – where none was asked there.")  # fmt: skip


def _count(rows: Sequence[Row]) -> str:
    return f"These are {len(rows)} tests, and none is corrected for their number." if len(rows) > 1 else ""


def _task(row: Row) -> str:
    return "all" if row["task"] is None else str(row["task"])


def _length(row: Row) -> str:
    return short_length(row["tokens"]) if row["tokens"] else ""


def _difference(row: Row) -> str:
    value = _signed(row["difference"])
    error = "" if not row["stderr"] else f" ± {row['stderr']:.3f}"
    return f"{value}{error}{' nats' if row['metric'] == 'log_prob' else ''}"


def _log_prob(row: Row) -> str:
    found = row.get("log_prob")
    if found is None:
        return "–"
    error = "" if not found["stderr"] else f" ± {found['stderr']:.2f}"
    return f"{found['value']:+.2f}".replace("-", "−") + error


def _bytes(row: Row) -> str:
    n = row.get("bytes")
    if n is None:
        return "–"
    return "0" if abs(n) < 512 else f"{'+' if n > 0 else '−'}{kibibytes(abs(n))}"


def _interval(row: Row) -> str:
    if row["interval"] is None:
        return "–"
    return " … ".join(map(_signed, row["interval"]))


def _signed(value: float) -> str:
    return "0" if abs(value) < 5e-4 else f"{value:+.3f}".replace("-", "−")


def _pair(row: Row) -> tuple[str, str]:
    return row["label"], row["other"]


def _place(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["tokens"], row.get("machine"), row.get("prompts")


def _where(row: Row, *, unit: str = "") -> str:
    where = _size(row, unit=unit)
    return ", ".join([where, *([row["machine"]] if row.get("machine") else []), *([f"prompts of {row['prompts']}"] if row.get("prompts") else [])])


def _size(row: Row, *, unit: str = "") -> str:
    return f"{short_length(row['tokens'])}{unit}" if row["tokens"] else {"class": "drawn"}.get(row["kind"], "pictures")


def _score_name(row: Row, *, most: int = 99) -> str:
    """ "mean score of needle and fewshot", or how many there are."""
    tasks = row["tasks"]
    names = " and ".join(filter(None, [", ".join(tasks[:-1]), tasks[-1]])) if len(tasks) <= most else f"{len(tasks)} tasks"
    what = "score" if row["metric"] == "score" else "log-probability (nats)"
    return f"{what} of {names}" if len(tasks) == 1 else f"mean {what} of {names}"
