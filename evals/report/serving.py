"""The part of a report about servers: what vLLM's benchmark client measured of each, and what ran in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.report.sections import Row, Section, Table, milliseconds, number, percent, ratio

_METRICS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "E2EL"}


def serving_table(rows: Sequence[Row]) -> Table:
    """One row per server. rows: of `accel bench serve` (result.json, `serving`)."""
    pictures = any(row.get("visual_tokens") for row in rows)
    headers = [
        "server", "answered", *(f"{title}, median" for title in _METRICS.values()), "TTFT p20–p80", "TTFT p99", "× dense", "requests/s", "tokens/s",
        "density", *(["visual tokens kept"] if pictures else []), "same text",
    ]  # fmt: skip
    cells = [
        [
            row["label"], f"{row['completed']} of {row['asked']}", *(milliseconds(row[metric]["median"]) for metric in _METRICS),
            f"{milliseconds(row['ttft_ms']['p20'])}–{milliseconds(row['ttft_ms']['p80'])}", milliseconds(row["ttft_ms"]["p99"]),
            ratio(row.get("ttft_ratio")), number(row["request_throughput"], 2), number(row["output_throughput"], 1), number(row.get("density"), 2),
            *([_kept(row)] if pictures else []), "" if row["is_baseline"] else f"{row['same_texts']} of {row['asked']}",
        ]
        for row in rows
    ]  # fmt: skip
    return Table(
        headers, cells, quiet_rows=frozenset(i for i, row in enumerate(rows) if row["is_baseline"]),
        caption="As vLLM's client measures: time to first token, per output token behind it, between tokens, and of the whole request. × dense: how "
        "many times faster the median TTFT is than the dense server's. Density: share of the causal tiles that sparse calls computed, warm-ups "
        "included. Same text: answers that are letter by letter those of the dense server.",
    )  # fmt: skip


def serving_sections(result: Mapping[str, Any]) -> list[Section]:
    """The servers of a result, and what of them ran dense and why; nothing without servers."""
    rows = result.get("serving")
    if not rows:
        return []
    calls = [_calls(row) for row in rows if "sparse_calls" in row]
    return [Section("serving", "Serving", bullets=calls, tables=[serving_table(rows)])]


def _calls(row: Row) -> str:
    """Attention calls of a server: how many sparse, how many dense and why."""
    dense = [f"{n} dense ({reason})" for reason, n in row["dense_calls"].items()]
    return ", ".join([f"{row['label']}: {row['sparse_calls']} attention calls ran sparse", *dense])


def _kept(row: Row) -> str:
    if not row.get("visual_tokens"):
        return ""
    return f"{row['kept_tokens']} of {row['visual_tokens']} ({percent(row['kept_tokens'] / row['visual_tokens'])})"
