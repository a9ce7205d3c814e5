"""The contents of a report, from result.json: sections of text, tables and figures that markdown, HTML and stdout all draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.evals.report.plots import short_length

Row = Mapping[str, Any]
_CACHE = (
    " Cache: the most bytes held behind any pass over prompt and answer, keys, values, places and what a method records; of whole: their share of "
    "the keys and values of all these tokens. Compare methods at equal bytes, not at equal names of a budget."
)
METRIC_TITLES = {"ttft_ms": "Time to first token", "tpot_ms": "Time per output token (decode)"}


@dataclass(frozen=True)
class Table:
    """Cells as text. text_columns: set flush left. quiet_rows: baselines, drawn paler. group_starts: rows with a line above them.

    caption: what the columns mean.
    """

    headers: list[str]
    rows: list[list[str]]
    text_columns: tuple[int, ...] = (0,)
    quiet_rows: frozenset[int] = frozenset()
    group_starts: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One heading with its paragraphs, bullets and tables. `name` is the anchor and tells the HTML page which figures belong here.

    drawn_tables: what the figures of this section show, for markdown, which has none.
    """

    name: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    bullets: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    drawn_tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A picture for the HTML page: SVG text, or the data address of an image. `title` stands above it, `caption` below.

    starts_row: the figure is the first of its row.
    """

    section: str
    title: str
    caption: str
    svg: str = ""
    image: str = ""
    is_square: bool = False
    starts_row: bool = False


@dataclass(frozen=True)
class Card:
    """One key figure at the top of the page."""

    value: str
    label: str
    detail: str


def sections(result: Mapping[str, Any]) -> list[Section]:
    """Everything that the result holds, in reading order; what it lacks is left out."""
    from accel.evals.compare.report import compare_sections
    from accel.evals.report.comparisons import comparison_sections
    from accel.evals.report.trials import trial_sections

    built = [
        *compare_sections(result),
        *([_facts_section(result["facts"])] if result.get("facts") else []),
        *_accuracy_sections(result),
        *comparison_sections(result),
        *trial_sections(result),
        *(_latency_section(metric, result["latency"]) for metric in METRIC_TITLES if _with_metric(result, metric)),
        *([_cache_section(result["cache_memory"])] if result.get("cache_memory") else []),
        *([_operator_section(result)] if result.get("operator") else []),
        *([_maps_section(result["block_maps"])] if result.get("block_maps") else []),
        *([Section("layers", "Layers", tables=[layer_table(result["layers"])])] if result.get("layers") else []),
    ]
    limits = [*result.get("limits", []), *_standing_limits(result)]
    return [*built, *([Section("limits", "What this run cannot claim", bullets=limits)] if limits else [])]


# --- accuracy -----------------------------------------------------------------------------------------------------------------


def accuracy_table(scores: Sequence[Row]) -> Table:
    """One row per task and variant. scores: task, label, tokens, score {value, stderr}, n, and where known log_prob, density, cache, note.

    Where some have a cache that a method compressed, its bytes stand beside the score, and of dense those of a whole one.
    """
    whole = {(s["task"], s.get("tokens")): s["cache"]["whole_bytes"] for s in scores if s.get("cache")}
    rows = [
        [s["task"], short_length(s["tokens"]) if s.get("tokens") else "", s["label"], score_cell(s["score"]), str(s["n"]),
         _log_prob(s, has_error=bool(whole)), number(s.get("density"), 2, missing="1.00" if s.get("is_baseline") else "–"),
         *_cache_cells(s, whole), s.get("note", "")]
        for s in scores
    ]  # fmt: skip
    headers = ["task", "tokens", "method", "score ± s.e.", "n", "log-prob", "density", *(["cache", "of whole"] if whole else []), ""]
    return Table(
        headers,
        rows,
        text_columns=(0, 2, len(headers) - 1),
        quiet_rows=frozenset(i for i, s in enumerate(scores) if s.get("is_baseline")),
        group_starts=_changes([(s["task"], s.get("tokens")) for s in scores]),
        caption=f"n: answers.{_perplexities(scores)} Log-prob: mean log-probability of the right answer, in nats; nearer to 0 is better. "
        f"Density: share of the causal tiles that were computed, as reached and not as asked for.{_CACHE if whole else ''}",
    )


def _perplexities(scores: Sequence[Row]) -> str:
    """Which tasks have another score than shares of right answers."""
    graded = dict.fromkeys(s["task"] for s in scores if s["score"].get("name") == "perplexity")
    return f" Of {', '.join(graded)} the score is a perplexity of their tokens, the answers: lower is better." if graded else ""


def _log_prob(s: Row, *, has_error: bool) -> str:
    found = number(s.get("log_prob"), 2)
    return found if not has_error or s.get("log_prob_stderr") is None else f"{found} ± {s['log_prob_stderr']:.2f}"


def _cache_cells(s: Row, whole: Mapping[Any, float]) -> list[str]:
    if not whole:
        return []
    if s.get("cache"):
        return [kibibytes(s["cache"]["peak_bytes"]), percent(s["cache"]["peak_bytes"] / s["cache"]["whole_bytes"])]
    n_bytes = whole.get((s["task"], s.get("tokens"))) if s.get("is_baseline") else None
    return [kibibytes(n_bytes), "–" if n_bytes is None else percent(1.0)]


def answer_table(answers: Sequence[Row]) -> Table:
    """One row per question, one column per method. answers: task, question, expected, label, answer, log_prob."""
    labels = list(dict.fromkeys(a["label"] for a in answers))
    by_question: dict[tuple[str, str, str], dict[str, Row]] = {}
    for a in answers:
        by_question.setdefault((a["task"], a["question"], a["expected"]), {})[a["label"]] = a
    rows = [
        [question, expected, *(_answer_cell(given.get(label), expected) for label in labels)]
        for (_, question, expected), given in by_question.items()
    ]
    caption = "The first prompt of each task and length. ✓ right, ✗ wrong; in brackets the log-probability of the right answer."
    return Table(["question", "expected", *labels], rows, text_columns=tuple(range(len(labels) + 2)), caption=caption)


def _answer_cell(answer: Row | None, expected: str) -> str:
    if answer is None:
        return "–"
    given = answer["answer"].strip() or "(nothing)"
    mark = "✓" if answer["answer"].strip() == expected.strip() else "✗"
    return f"{mark} {given} ({number(answer.get('log_prob'), 1)})"


def _accuracy_sections(result: Mapping[str, Any]) -> list[Section]:
    from accel.evals.report.overview import overview_table

    found = []
    if result.get("scores"):
        overview = overview_table(result["scores"])
        found.append(Section("accuracy", "Accuracy", tables=[*([overview] if overview else []), accuracy_table(result["scores"])]))
    if result.get("answers"):
        found.append(Section("answers", "Answers", tables=[answer_table(result["answers"])]))
    return found


# --- latency ------------------------------------------------------------------------------------------------------------------


def latency_table(rows: Sequence[Row]) -> Table:
    """One row per variant and length, with a column per dense baseline. rows: `LatencyRow.as_dict()` of one metric."""
    base = list(dict.fromkeys(b for r in rows for b in r["speedup"]))
    has_memory = any(r.get("peak_bytes") is not None for r in rows)
    memory = ["peak memory"] if has_memory else []
    headers = ["method", "tokens", "median", "p20–p80", "runs", *(f"× {b}" for b in base), "density", "selection", *memory, ""]
    cells = [
        [r["label"], short_length(r["tokens"]), milliseconds(r["ms"]["median"]), _span(r["ms"]), str(r["ms"]["n"]),
         *(ratio(r["speedup"].get(b)) for b in base), number(r["density"], 2), percent(r["selection_share"]),
         *([mebibytes(r["peak_bytes"])] if has_memory else []), r["note"]]
        for r in rows
    ]  # fmt: skip
    return Table(
        headers,
        cells,
        text_columns=(0, len(headers) - 1),
        quiet_rows=frozenset(i for i, r in enumerate(rows) if r["is_baseline"]),
        group_starts=_changes([r["tokens"] for r in rows]),
        caption="× baseline: how many times faster than that dense baseline, the median of the ratios round by round. "
        "Selection: share of the time spent choosing blocks, contained in the median.",
    )


def _latency_section(metric: str, rows: Sequence[Row]) -> Section:
    mine = [r for r in rows if r["metric"] == metric]
    return Section(metric, METRIC_TITLES[metric], paragraphs=headlines(mine), tables=[latency_table(mine)])


def headlines(rows: Sequence[Row]) -> list[str]:
    """One sentence on the first method at the greatest length, both ratios in it; none where every method ran dense."""
    longest = max((r["tokens"] for r in rows if not r["is_baseline"]), default=None)
    first = next((r for r in rows if r["tokens"] == longest and not r["is_baseline"]), None)
    if first is None or first["density"] is None:
        return []
    ratios = " and ".join(f"{ratio(value)} {label}" for label, value in first["speedup"].items())
    return [f"At {short_length(first['tokens'])} tokens {first['label']} takes {milliseconds(first['ms']['median'])}: {ratios}, "
            f"computing {number(first['density'], 2)} of the causal tiles."]  # fmt: skip


def _with_metric(result: Mapping[str, Any], metric: str) -> bool:
    return any(r["metric"] == metric for r in result.get("latency", []))


# --- operator, maps, layers ---------------------------------------------------------------------------------------------------


def operator_table(rows: Sequence[Row]) -> Table:
    """The attention operator alone. rows: as `operator_bench.operator_table` returns them."""
    headers = ["tokens", "density", "sparse", "p20–p80", "of dense (sdpa)", "of dense (accel)", "dense (sdpa)", "dense (accel)", "plan"]
    cells = [
        [short_length(r["tokens"]), number(r["true_density"], 3), milliseconds(r["sparse_ms"]),
         f"{milliseconds(r['sparse_p20_ms'])} – {milliseconds(r['sparse_p80_ms'])}", number(r["to_sdpa"], 3), number(r["to_dense"], 3),
         milliseconds(r["sdpa_ms"]), milliseconds(r["dense_ms"]), milliseconds(r["plan_ms"])]
        for r in rows
    ]  # fmt: skip
    return Table(
        headers,
        cells,
        text_columns=(),
        group_starts=_changes([r["tokens"] for r in rows]),
        caption="Of dense: the sparse operator's time as a share of that baseline's, the median of the ratios round by round; below 1 is faster. "
        "Plan: building the gather lists, part of the time. On this machine "
        f"sparse tiles run {_both(rows, 'path')}, our dense path {_both(rows, 'dense_path')}.",
    )


def layer_table(layers: Sequence[Row]) -> Table:
    """One row per group of equal layers. layers: method, layers, type, patched (bool), reason."""
    rows = [[r["method"], r["layers"], r["type"], "yes" if r["patched"] else "no", r["reason"]] for r in layers]
    return Table(["method", "layers", "attention", "patched", "why not"], rows, text_columns=(0, 1, 2, 3, 4))


def _both(rows: Sequence[Row], key: str) -> str:
    """The values of a column, each once."""
    return " or ".join(dict.fromkeys(str(r[key]) for r in rows))


def _operator_section(result: Mapping[str, Any]) -> Section:
    about = result.get("operator_about")
    return Section("operator", "Attention operator alone", paragraphs=[about] if about else [], tables=[operator_table(result["operator"])])


def _cache_section(rows: Sequence[Row]) -> Section:
    from accel.evals.report.caches import bench_table

    return Section("cache_memory", "Cache and memory", tables=[bench_table(rows)])


def _facts_section(facts: Mapping[str, str]) -> Section:
    return Section("model", "The model", tables=[Table(["", ""], [list(pair) for pair in facts.items()], text_columns=(0, 1))])


def maps_table(maps: Sequence[Row]) -> Table:
    """One row per method: how many layers it ran sparse in, and the density of its heads."""
    rows = []
    for m in maps:
        per_head = sorted(d for heads in m["density"].values() for d in heads)
        mean, low, high = sum(per_head) / len(per_head), per_head[len(per_head) // 10], per_head[len(per_head) * 9 // 10]
        n_sparse = f"{len(m['density'])} of {m['n_layers']}"
        rows.append([m["label"], short_length(m["tokens"]), str(m["block_size"]), n_sparse, number(mean, 2), f"{low:.2f} – {high:.2f}"])
    return Table(["method", "tokens", "block", "sparse layers", "mean density", "p10–p90 of heads"], rows)


def _maps_section(maps: Sequence[Row]) -> Section:
    intro = ("Each square is the causal half of one head's attention: query blocks from top to bottom, key blocks from left to right. "
             "Coloured tiles were computed, pale ones skipped.")  # fmt: skip
    return Section("maps", "What the heads read", paragraphs=[intro], tables=[maps_table(maps)])


# --- what it cannot claim -----------------------------------------------------------------------------------------------------


def _standing_limits(result: Mapping[str, Any]) -> list[str]:
    """Limits that follow from what was run."""
    found = []
    if result.get("latency"):
        fewest = min(r["ms"]["n"] for r in result["latency"])
        found.append(
            f"Times belong to this machine as it was, and the fewest timed runs of a row are {fewest}. Ratios come from interleaved "
            "rounds and carry over better than milliseconds; neither is a promise for other hardware."
        )
        if any(len(r["speedup"]) > 1 for r in result["latency"]):
            found.append(
                "A ratio against the stock attention holds the gain of a better dense kernel as well; only the ratio against the faster "
                "of the two dense baselines is the gain of sparsity."
            )
    if how := result.get("memory_how"):
        found.append(f"Peak memory is {how}, without weights and whatever an earlier pass had already allocated for good.")
    if result.get("block_maps"):
        found.append("Block maps show one prompt: another text is read differently by methods that look at it.")
    if result.get("scores") or result.get("means"):
        found.append("Scores come from few samples and one seed: differences within two standard errors are noise, in either direction.")
    return found


# --- cells --------------------------------------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    """A time with three digits and the unit that suits it."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 3}f} ms"


def _span(ms: Row) -> str:
    # the spread of a single run is no spread
    return "–" if ms["n"] == 1 else f"{milliseconds(ms['p20'])} – {milliseconds(ms['p80'])}"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def number(value: float | None, digits: int, *, missing: str = "–") -> str:
    return missing if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def mebibytes(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 2**20:.0f} MiB"


def kibibytes(n_bytes: float | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 2**10:.0f} KiB" if n_bytes < 2**20 else f"{n_bytes / 2**20:.1f} MiB"


def score_cell(score: Row) -> str:
    """ "0.98 ± 0.02"; without a standard error only the value."""
    return number(score["value"], 2) if score.get("stderr") is None else f"{number(score['value'], 2)} ± {score['stderr']:.2f}"


def _changes(keys: Sequence[Any]) -> frozenset[int]:
    """Rows whose key differs from that of the row above."""
    return frozenset(i for i in range(1, len(keys)) if keys[i] != keys[i - 1])
