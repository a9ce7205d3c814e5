"""The part of a report about pictures that a model drew: methods beside dense from the same seeds, and what the cache and the process held."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.report import plots
from accel.evals.report.sections import Card, Figure, Row, Section, Table, kibibytes, milliseconds, number, percent

_MANY = 6                       # figures of a card's detail line
_DIGITS = 4                     # of a perceptual distance
_DISTANCE = "perceptual distance to dense"
_X_LABEL = "cache entries read at the last scale"
_QUALITY = (
    "Right: the judge sees the class that was asked for; − dense: the difference on the same seeds, in points. Fréchet: distance of the judge's "
    "features to those of 2000 held-out real pictures; the last row is what as many other real pictures reach. PSNR (100 where a picture is the "
    "same) and perceptual distance (0 where it is): to what dense draws from the same seed, over all pictures, as 8-bit files. Read: share of all "
    "cache entries that attention reads at the last scale. Cache: its peak, measured between attention calls; for dense, what the keys and values "
    "of all scales but the last take, by arithmetic. Per picture: the median time; one method ran after the other, so a machine that was busy "
    "at times is unfair to some. ±: standard error over pictures."
)
_HELD = (
    "Entries: tokens, as a mean over heads and layers, stored at most behind a scale, and read at the last. Cache: bytes of keys, values, positions "
    "and what a method records. Allocated and reserved: peaks of the CUDA allocator with the weights, – on a CPU, where the growth of resident "
    "memory is all there is, coarse and noisy. Of one picture, drawn once more; measured as: "
)


def drawn_sections(result: Mapping[str, Any]) -> list[Section]:
    """Sections for whatever of `drawn`, `drawn_paired` and `grids` the result holds."""
    rows = result.get("drawn")
    if not rows:
        return []
    paired = result.get("drawn_paired")
    found = [Section("drawn", "Drawn pictures", tables=[drawn_table(rows), *([paired_table(paired)] if paired else [])])]
    if (memory := memory_table(rows)).rows:
        found.append(Section("cache", "What the cache and the process held", tables=[memory]))
    if result.get("heads"):
        found.append(Section("heads", "The heads", paragraphs=["What the methods know of each head, and what they give it."]))
    if result.get("grids"):
        where = "The first pictures of each, the same seeds in the same places."
        found.append(Section("grids", "The pictures", paragraphs=[where]))
    return found


def drawn_table(rows: Sequence[Row]) -> Table:
    """One row per method, those of one budget together, and one for real pictures. rows: of `summarise_drawn`."""
    rows, starts = _by_budget(rows)
    cells = [
        [row["label"], str(row["n"]), _points(row), _points(row["to_dense"], is_signed=True), number(row["frechet"], 2), _figure(row["psnr"], 1),
         _figure(row["perceptual"], _DIGITS), percent(row["cache"] and row["cache"]["kept_share"]), _cache(row), milliseconds(row["ms"])]
        for row in rows
    ]  # fmt: skip
    return Table(
        ["method", "n", "right, %", "− dense", "Fréchet", "PSNR, dB", "perceptual distance", "read", "cache, KiB", "per picture"],
        cells,
        quiet_rows=frozenset(i for i, row in enumerate(rows) if row["is_baseline"]),
        group_starts=starts,
        caption=_QUALITY,
    )


def paired_table(paired: Sequence[Row]) -> Table:
    """One row per method and control of the same budget. paired: of `summarise_drawn`."""
    rows = [
        [f"{row['label']} − {row['other']}", _points(row["right"], is_signed=True), _figure(row["perceptual"], _DIGITS, is_signed=True),
         str(row["right"]["n"])]
        for row in paired
    ]  # fmt: skip
    return Table(
        ["difference", "right, points", "perceptual distance", "n"],
        rows,
        group_starts=frozenset(i for i in range(1, len(paired)) if paired[i]["label"] != paired[i - 1]["label"]),
        caption="Method minus control on the same seeds, ± standard error over pictures; below 0 in distance: nearer to dense than the control. "
        "“keep”: the control reads as many entries at the last scale. “cache of”: it stores as many entries, and so as many bytes, as that method.",
    )


def memory_table(rows: Sequence[Row]) -> Table:
    """One row per method: entries of the cache, its bytes, and what the process took; four figures of which none stands for another."""
    known, starts = _by_budget([row for row in rows if row["cache"] or row["memory"]])
    cells = [
        [row["label"], _most(row, "retained"), _last(row, "attended"), _cache(row),
         *(kibibytes(row["memory"] and row["memory"][key]) for key in ("allocated_bytes", "reserved_bytes", "resident_bytes"))]
        for row in known
    ]  # fmt: skip
    how = dict.fromkeys(row["memory"]["how"] for row in known if row["memory"])
    return Table(
        ["method", "entries per head, stored", "read at the last scale", "cache, KiB", "peak allocated", "peak reserved", "peak resident growth"],
        cells,
        quiet_rows=frozenset(i for i, row in enumerate(known) if row["is_baseline"]),
        group_starts=starts,
        caption=f"{_HELD}{'; '.join(how) or 'not at all'}.",
    )


def drawn_figures(rows: Sequence[Row]) -> list[Figure]:
    """Distance to dense and right classes against what was read, and the entries by scale."""
    task = next((row["task"] for row in rows), "")
    mine = [row for row in rows if row["task"] == task and row["cache"]]
    methods = [row for row in mine if not row["is_baseline"]]
    colours = plots.colour_by_label([{"label": row["series"], "is_baseline": row["is_baseline"]} for row in mine])
    found = []
    if far := [_against_share(row, row["perceptual"]) for row in methods if row["perceptual"]]:
        own = {row["series"]: colours[row["series"]] for row in far}
        svg = plots.keep_plot(far, own, x_label=_X_LABEL, y_label=_DISTANCE, width=5.2)
        found.append(Figure("drawn", "Distance against keep", "Mean over pictures of the same seeds, with standard errors; 0 is dense.", svg=svg))
        held = [_against_bytes(row, row["perceptual"]) for row in methods if row["perceptual"] and row["cache"]["whole_bytes"]]
    if far and held:
        svg = plots.keep_plot(held, own, x_label="cache bytes, share of a whole cache", y_label=_DISTANCE, width=5.2, is_measured=True)
        caption = "As before, but against what the cache holds at most: methods that are far apart here are not compared at equal memory."
        found.append(Figure("drawn", "Distance against memory", caption, svg=svg))
    if methods:
        right = [_against_share(row, row) for row in mine]
        # a figure from 0 would hide differences among models that are nearly always right
        lowest = min(row["score"] - (row["stderr"] or 0.0) for row in right)
        limits = (max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.02)
        svg = plots.keep_plot(right, colours, x_label=_X_LABEL, y_label="share of right classes", y_limits=limits, width=5.2)
        found.append(Figure("drawn", "Right classes against keep", "With standard errors. Dashed: dense.", svg=svg))
        for title, key, what in (
            ("Cache entries against scale", "retained", "Stored behind each scale; behind the last nothing stays."),
            ("Entries read against scale", "attended", "Read by attention at each scale."),
        ):
            caption = f"{what} Tokens per head, as a mean over heads and layers. Methods of the same numbers share a line."
            found.append(Figure("cache", title, caption, svg=plots.entries_plot(entry_lines(mine, key), width=5.2)))
    return found


def head_figures(heads: Sequence[Row]) -> list[Figure]:
    """What methods know of the model's heads. heads: the fields of `HeadNumbers` and the label of the method; equal ones are shown once."""
    labels: dict[str, list[str]] = {}
    shown: dict[str, Row] = {}
    for row in heads:
        key = json.dumps([row["title"], row["values"], row["kinds"]])
        labels.setdefault(key, []).append(row["label"])
        shown[key] = row
    return [
        Figure("heads", row["title"], f"{', '.join(labels[key])}: {row['caption']}", svg=plots.heads_plot(row)) for key, row in shown.items()
    ]


def entry_lines(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    """Entries by scale, "retained" or "attended", rows of the same numbers in one line: label, entries, is_baseline."""
    groups: dict[tuple[float, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(round(n, 3) for n in row["cache"][key]), []).append(row)
    return [{"label": _joined(group), "entries": list(entries), "is_baseline": group[0]["is_baseline"]} for entries, group in groups.items()]


def drawn_cards(result: Mapping[str, Any]) -> list[Card]:
    """The distance to dense of the first series at each budget, beside its controls."""
    rows = [row for row in result.get("drawn", []) if row["perceptual"]]
    by_label, pairs = {row["label"]: row for row in rows}, result.get("drawn_paired", [])
    found = []
    for row in rows:
        if row["series"] == rows[0]["series"]:
            others = [by_label[pair["other"]] for pair in pairs if pair["label"] == row["label"] and pair["other"] in by_label]
            beside = " · ".join(f"{other['series']} {number(other['perceptual']['value'], 3)}" for other in others[:_MANY])
            what = f", {percent(row['cache']['kept_share'])} of the cache read" if row["cache"] else ""
            found.append(Card(number(row["perceptual"]["value"], 3), f"{row['series']}{what}: distance to dense", beside or f"n = {row['n']}"))
    return found


def drawn_notices(rows: Sequence[Row]) -> list[str]:
    """A line where compressed caches are no smaller than a whole one."""
    large = [row for row in rows if not row["is_baseline"] and row["cache"] and row["cache"]["peak_bytes"] >= row["cache"]["whole_bytes"] > 0]
    if not large:
        return []
    by_keep: dict[Any, list[Row]] = {}
    for row in large:
        by_keep.setdefault(row["keep"], []).append(row)
    held, cache = "; ".join(f"{_joined(group)} ({_span(group)} KiB)" for group in by_keep.values()), large[0]["cache"]
    stored = f"{max(cache['whole'][:-1], default=0):.0f} of {cache['whole'][-1]:.0f} entries per head"
    return [f"No smaller than a whole cache of {cache['whole_bytes'] / 2**10:.0f} KiB: {held}. A whole cache never stores the last scale, so it "
            f"holds {stored}; these save reading, not memory."]  # fmt: skip


def _by_budget(rows: Sequence[Row]) -> tuple[list[Row], frozenset[int]]:
    """Task by task dense first, then from much to little that is read, rows of equal shares in the order in which they ran; real pictures last.

    Also the numbers of the rows with which another share begins.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def place(row: Row) -> tuple[int, bool, float]:
        share = row["cache"]["kept_share"] if row["cache"] else 1.0
        return tasks.index(row["task"]), not row["is_baseline"], -round(share, 3)

    found = sorted(rows, key=place)
    return found, frozenset(i for i in range(1, len(found)) if place(found[i]) != place(found[i - 1]))


def _against_share(row: Row, estimate: Row) -> dict[str, Any]:
    return {"series": row["series"], "share": row["cache"]["kept_share"], "score": estimate["value"], "stderr": estimate["stderr"],
            "is_baseline": row["is_baseline"]}  # fmt: skip


def _against_bytes(row: Row, estimate: Row) -> dict[str, Any]:
    return {**_against_share(row, estimate), "share": row["cache"]["peak_bytes"] / row["cache"]["whole_bytes"]}


def _span(rows: Sequence[Row]) -> str:
    """The cache bytes of several methods in KiB: "792–804"."""
    ordered = sorted(rows, key=lambda row: float(row["cache"]["peak_bytes"]))
    return "–".join(dict.fromkeys((_cache(ordered[0]), _cache(ordered[-1]))))


def _joined(group: Sequence[Row]) -> str:
    """ "dense", "h2o(keep=0.3)", or "keep 0.3: h2o, snapkv" where several are one line."""
    if len(group) == 1:
        return str(group[0]["label"])
    keeps = {row["keep"] for row in group}
    names = [row["series" if len(keeps) == 1 else "label"] for row in group]
    return f"keep {keeps.pop()}: {', '.join(names)}" if len(keeps) == 1 else ", ".join(names)


def _points(estimate: Row | None, *, is_signed: bool = False) -> str:
    """A share, or a difference of shares, in per cent: "97.2 ± 0.4"."""
    if estimate is None:
        return "–"
    return _figure({key: estimate[key] and 100 * estimate[key] for key in ("value", "stderr")}, 1, is_signed=is_signed)


def _figure(estimate: Row | None, digits: int, *, is_signed: bool = False) -> str:
    if estimate is None:
        return "–"
    value = f"{estimate['value']:{'+' if is_signed else ''}.{digits}f}".replace("-", "−")
    return value if estimate["stderr"] is None else f"{value} ± {estimate['stderr']:.{digits}f}"


def _cache(row: Row) -> str:
    return number(row["cache"] and row["cache"]["peak_bytes"] / 2**10, 0)


def _most(row: Row, name: str) -> str:
    return number(row["cache"] and max(row["cache"][name]), 0)


def _last(row: Row, name: str) -> str:
    return f"{row['cache'][name][-1]:.0f} of {row['cache']['whole'][-1]:.0f}" if row["cache"] else "–"
