"""From the finished samples of `accel run` to result.json, tables and reports."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import describe_run
from accel.errors import UnsupportedError

if TYPE_CHECKING:
    from accel.evals.controls import Control
    from accel.evals.models import LoadedModel
    from accel.evals.results import RunFolder, SampleKey, SampleRecord
    from accel.evals.summary.visual_layers import Prices
    from accel.protocols import Method


def finish(
    loaded: LoadedModel, folder: RunFolder, wanted: Sequence[SampleKey], planned: Sequence[Control], variants: Mapping[str, Sequence[Method]],
    settings: Mapping[str, Any], notices: Sequence[str], *, dtype_reason: str,
) -> int:  # fmt: skip
    """Writes the result and the reports and prints the tables; 0 when all wanted samples are there."""
    from accel.evals.runner import head_rows, rows_of
    from accel.evals.summary.caches import cache_notices
    from accel.evals.summary.drawn import summarise_drawn
    from accel.evals.summary.run import summarise_run
    from accel.evals.summary.scores import answer_rows

    rows = rows_of(folder, wanted)
    n_missing = len(wanted) - sum(row["n_prompts"] for row in rows)
    done = [record for key in wanted if (record := folder.get(key)) is not None]
    told = [*notices, *cache_notices(folder.config, rows)]
    if plain := dict.fromkeys(record.task for record in done if record.has_template is False):
        told.append(f"{loaded.name} has no chat template: the prompts of {', '.join(plain)} are plain text.")
    extra = {"answers": answer_rows(done), "notices": told, **_pictures(loaded, done, variants, planned)}
    extra |= summarise_drawn(loaded, done, planned)
    shares_prefill = bool(folder.config.get("shared_prefill"))
    extra |= summarise_run(done, rows, list(variants), planned, extra.get("gates", []), shares_prefill=shares_prefill)
    if heads := head_rows(loaded, variants):
        extra["heads"] = heads
    sections = _report(loaded, folder, rows, extra=extra, settings=settings, dtype_reason=dtype_reason, n_missing=n_missing)
    _draw(loaded, folder, rows, sections, variants, planned, done)
    return 1 if n_missing else 0


def _pictures(
    loaded: LoadedModel, records: Sequence[SampleRecord], variants: Mapping[str, Sequence[Method]], controls: Sequence[Control]
) -> dict[str, Any]:
    """What the result says of questions about pictures; empty without such questions."""
    from accel.evals.summary.pictures import summarise_pictures

    return summarise_pictures(records, list(variants), controls, _prices(loaded))


def _draw(
    loaded: LoadedModel, folder: RunFolder, rows: Sequence[Mapping[str, Any]], sections: Mapping[str, Any],
    variants: Mapping[str, Sequence[Method]], controls: Sequence[Control], done: Sequence[SampleRecord],
) -> None:  # fmt: skip
    """Adds pictures to the finished result, and writes the reports whether or not that works."""
    from accel.evals.drawing.album import draw_grids
    from accel.evals.drawing.judged import image_model
    from accel.evals.pictures.gallery import run_gallery
    from accel.evals.report.page import write_reports
    from accel.evals.summary.run import map_heads

    try:
        passing = [gate["task"] for gate in sections.get("gates", []) if gate["passes"]]
        pictures = {"overlays": run_gallery(loaded, folder, variants, controls, passing)} if passing else {}
        if sections.get("drawn"):
            pictures["grids"] = draw_grids(image_model(loaded), folder, done)
        config = folder.config
        pictures |= {"block_maps": maps} if (maps := map_heads(loaded, variants, config["tasks"], config["lengths"], seed=config["seed"])) else {}
        if pictures:
            folder.finish(rows, **{**sections, **pictures})
    finally:
        print(f"report: {write_reports(folder.path).html}", file=sys.stderr)


def _prices(loaded: LoadedModel) -> Prices | None:
    """What a token costs in this model, or None where the arithmetic does not describe it."""
    from accel.evals.summary.visual_layers import Prices
    from accel.evals.visual_bench.cost import DecoderShape

    try:
        return Prices(DecoderShape.from_config(loaded.model.config), loaded.model.dtype.itemsize)
    # a config that names its sizes otherwise; a finished run must not fail by it
    except (UnsupportedError, AttributeError):
        return None


def _report(
    loaded: LoadedModel, folder: RunFolder, rows: Sequence[Mapping[str, Any]], *, extra: Mapping[str, Any], settings: Mapping[str, Any],
    dtype_reason: str, n_missing: int,
) -> dict[str, Any]:  # fmt: skip
    """Writes result.json, prints the tables and the notices, and returns all sections of the result. extra: some of them, `notices` among them."""
    from accel.evals.report.drawn import drawn_notices

    head = describe_run("run", f"{loaded.name}: accuracy beside dense and controls", loaded, settings, dtype_reason=dtype_reason)
    sections = {key: value for key, value in head.items() if key not in ("schema", "config")}
    missing = f"{n_missing} {'sample is' if n_missing == 1 else 'samples are'} missing: the run stopped at its limit. Go on with `{go_on(folder)}`."
    notices = [*extra["notices"], *_picture_notices(rows, extra), *drawn_notices(extra.get("drawn", [])), *([missing] if n_missing else [])]
    sections |= {**extra, "notices": notices, "limits": _limits(rows), "n_missing": n_missing}
    folder.finish(rows, **sections)
    _print(rows, extra)
    for notice in notices:
        print(notice)
    return sections


def _print(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> None:
    """The tables on stdout: text first, then pictures."""
    from accel.cli.table import print_table
    from accel.evals.report.comparisons import comparison_table
    from accel.evals.report.drawn import drawn_sections
    from accel.evals.report.overview import overview_table
    from accel.evals.report.pictures import gate_table, headline, keep_table, savings_table, text_scores
    from accel.evals.report.sections import accuracy_table
    from accel.evals.summary.scores import BASELINE

    scores = text_scores({"scores": rows})
    tables = [accuracy_table(scores)] if scores else []
    tables += [overview] if (overview := overview_table(scores)) else []
    # the report has all of those with controls; equal bytes of a cache say nothing without them
    told = [row for row in extra.get("comparisons", []) if row["other"] == BASELINE or row.get("bytes") is not None]
    tables += [comparison_table(told)] if told else []
    tables += [table for section in drawn_sections(extra) for table in section.tables]
    if extra.get("gates"):
        tables.append(gate_table(extra["gates"]))
    if extra.get("means"):
        tables.append(keep_table(extra["means"], rows, extra["gates"]))
        tables += [saved] if (saved := savings_table(extra["means"])).rows else []
    for table in tables:
        print_table(table.headers, table.rows, text_columns=table.text_columns)
    if extra.get("paired"):
        print("\n".join(headline(row) for row in extra["paired"]), end="\n\n")


def _picture_notices(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[str]:
    """Tasks that failed the gate, and prompts that were not pruned as asked."""
    from accel.evals.summary.pictures import left_out, unfinished

    notes = dict.fromkeys(f"{row['label']}: {row['note']}" for row in rows if row["kind"] == "picture" and row["note"])
    return [*left_out(extra.get("gates", [])), *unfinished(extra.get("means", [])), *notes]


def _limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of these tasks cannot show."""
    from accel.evals.tasks import load_task

    tasks = [load_task(name) for name in dict.fromkeys(row["task"] for row in rows)]
    found = [task.caveat for task in tasks if task.caveat]
    if any(row["score"]["name"] == "perplexity" for row in rows):
        found.append("Scores named perplexity are better when lower, and do not separate sparse methods: read them beside retrieval.")
    return list(dict.fromkeys(found))


def go_on(folder: RunFolder) -> str:
    return f"accel run --out {folder.path} --resume"
