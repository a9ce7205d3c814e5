"""The part of a report about decoders whose caches methods compress: scores against bytes, the cache benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from accel.evals.report import plots
from accel.evals.report.plots import short_length
from accel.evals.report.sections import Figure, Row, Table, kibibytes, percent


def bench_table(rows: Sequence[Row]) -> Table:
    """One row per variant and length. rows: `decoder_bench.CacheRow.as_dict()`."""
    cells = [
        [r["label"], short_length(r["tokens"]), kibibytes(r["held_bytes"]), kibibytes(r["predicted_bytes"]),
         percent(r["held_bytes"] / r["whole_bytes"]), kibibytes(r["left_bytes"]), kibibytes(r["peak_bytes"]), kibibytes(r["chunked_peak_bytes"]),
         kibibytes(r["chunked_held_bytes"]), str(r["n"])]
        for r in rows
    ]  # fmt: skip
    chunk = rows[0]["chunk"]
    return Table(
        ["method", "tokens", "cache", "predicted", "of whole", "left behind", "peak", f"peak, chunks of {chunk}", "cache, chunks", "runs"],
        cells,
        quiet_rows=frozenset(i for i, r in enumerate(rows) if r["is_baseline"]),
        group_starts=frozenset(i for i in range(1, len(rows)) if rows[i]["tokens"] != rows[i - 1]["tokens"]),
        caption="Cache: bytes behind the prompt, by its tensors; predicted: keys, values and places by the budgets, without what a method records. "
        "Left behind, peak: growth of the memory in use behind the prompt and at most, medians. Chunks: entries may leave behind each, which is not "
        "the same choice as behind the whole prompt.",
    )


def cache_figures(scores: Sequence[Row]) -> list[Figure]:
    """Score against cache bytes, a figure per task and length; none where no cache was compressed."""
    found = []
    for task, tokens in dict.fromkeys((s["task"], s.get("tokens")) for s in scores):
        mine = [s for s in scores if (s["task"], s.get("tokens")) == (task, tokens) and (s.get("cache") or s.get("is_baseline"))]
        if not any(s.get("cache") for s in mine):
            continue
        rows = [
            {"series": series_of(s), "share": s["cache"]["peak_bytes"] / s["cache"]["whole_bytes"] if s.get("cache") else 1.0,
             "score": s["score"]["value"], "stderr": s["score"]["stderr"], "is_baseline": bool(s.get("is_baseline"))}
            for s in mine
        ]  # fmt: skip
        colours = plots.colour_by_label([{"label": row["series"], "is_baseline": row["is_baseline"]} for row in rows])
        name = mine[0]["score"].get("name", "exact")
        is_share = name == "exact"
        svg = plots.keep_plot(
            rows, colours, x_label="cache bytes at their peak, share of a whole cache", y_label="share of right answers" if is_share else name,
            y_limits=(-0.03, 1.05) if is_share else (0, None), width=5.2,
        )  # fmt: skip
        title = f"{task} at {short_length(tokens)}" if tokens else task
        found.append(Figure("accuracy", title, "Against the most that the cache holds, with standard errors. Dashed: dense, a whole one.", svg=svg))
    return found


def series_of(score: Row) -> str:
    """The methods of a row with those options that are neither the budget nor a seed: one line of a plot."""
    names = []
    for entry in score["options"]:
        for name, options in entry.items():
            kept = ", ".join(f"{option}={value}" for option, value in options.items() if option not in ("keep", "seed"))
            names.append(f"{name}({kept})" if kept else name)
    return " + ".join(names) or str(score["label"])
