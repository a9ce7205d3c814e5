"""`accel run`: accuracy of methods beside dense and controls of equal budget, on tasks made by code: text prompts, or pictures with a question."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import choose_dtype, describe_run, merge_settings, new_folder, print_settings, settle_threads
from accel.cli.options import parse_keeps, parse_lengths, read_variants, split_items
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.evals.controls import Control
    from accel.evals.models import LoadedModel
    from accel.evals.results import RunFolder, SampleRecord
    from accel.protocols import Method

HELP = "accuracy of methods on text or pictures, beside dense and controls of equal budget; can be resumed"

# what runs beside methods of each kind
CONTROLS = {"sparse_attention": "streaming,random_blocks", "token_pruning": "random_tokens,uniform_tokens,downsample"}
DEFAULTS: dict[str, Any] = {
    "model": "smollm2", "method": None, "recipe": None, "tasks": "needle,fewshot", "lengths": "4k", "samples": 1, "controls": None, "keeps": None,
    "seed": 0, "dtype": "auto", "device": "cpu", "threads": None, "out": None, "resume": None, "limit": None,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no default here: a flag that was not given must not override the settings file
    parser.add_argument("--model", help="an embedded model, a folder, or a hub id (default: smollm2)")
    parser.add_argument("--method", action="append", metavar="NAME[:OPTION=VALUE,…]", help="repeatable (default: the model's recipe, or flexprefill)")
    parser.add_argument("--recipe", help="a recipe file, measured as one more variant")
    names = ", ".join(_task_files())
    parser.add_argument("--tasks", help=f"task names, ruler, scenes (pictures), or all (all text tasks); {names} (default: {DEFAULTS['tasks']})")
    parser.add_argument("--lengths", help="lengths of text prompts in tokens, such as 2k,4k (default: 4k)")
    parser.add_argument("--samples", type=int, help="prompts per task and length (default: 1)")
    usual = " or ".join(CONTROLS.values())
    parser.add_argument("--controls", help=f"methods to run at the density, or with the tokens, of those asked for; none (default: {usual}, by kind)")
    parser.add_argument("--keeps", help="run each token-pruning method once per share or count of visual tokens, such as 1.0,0.5,0.25,0.1,0.05")
    parser.add_argument("--seed", type=int, help="of the prompts (default: 0)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: whichever this machine is fast in")
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-run)")
    parser.add_argument("--resume", action="store_const", const=True, help="go on with the run in --out; finished samples are not run again")
    parser.add_argument("--limit", type=int, help="stop after so many new samples; the exit code is 1 while some are missing")
    parser.add_argument("--config", help="a YAML file with any of these settings; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print the merged settings and stop")
    parser.epilog = (
        "examples:\n  accel run --model smollm2 --method flexprefill:gamma=0.9,min_budget=256,min_seq_len=0 --tasks needle --lengths 2k\n"
        "  accel run --model small-vlm --method fastervlm --tasks scenes --keeps 0.5,0.25,0.1 --samples 100"
    )


def main(args: argparse.Namespace) -> int:
    """Runs what is missing, prints the table and writes the run folder. 0 when every sample asked for is there, 1 when the limit came first."""
    settings = merge_settings(args, DEFAULTS)
    if settings["resume"] and not settings["out"]:
        raise OptionError("--resume needs the folder of the run: give it with --out")
    if settings["limit"] is not None and settings["limit"] < 1:
        raise OptionError(f"--limit must be at least 1, got {settings['limit']}")
    settle_threads(settings["threads"])
    from accel.evals.tasks import expand_names

    variants = read_variants(settings)
    if settings["keeps"]:
        from accel.evals.controls import swept

        variants = swept(variants, parse_keeps(settings["keeps"]))
    tasks, lengths = expand_names(split_items(settings["tasks"])), parse_lengths(settings["lengths"])
    controls = _controls(settings["controls"], variants)
    if args.dry_run:
        print_settings(settings)
        return 0
    return _run(settings, variants, tasks, lengths, controls)


def _run(
    settings: Mapping[str, Any], variants: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], controls: Sequence[str]
) -> int:
    from accel.cli.bench import check_variants
    from accel.evals.controls import plan_controls, reference_label
    from accel.evals.models import load_model
    from accel.evals.results import RunFolder
    from accel.evals.runner import run_accuracy, wanted_samples

    dtype, reason = choose_dtype(settings["dtype"], settings["device"])
    plain = {label: [{m.method_name(): m.changed_options()} for m in methods] for label, methods in variants.items()}
    config = {
        "command": "run", **{key: settings[key] for key in ("model", "device", "seed", "samples")}, "dtype": dtype, "tasks": list(tasks),
        # through JSON: YAML files hold no tuples
        "lengths": list(lengths), "controls": list(controls), "reference": reference_label(variants), "methods": json.loads(json.dumps(plain)),
        **({"keeps": parse_keeps(settings["keeps"])} if settings["keeps"] else {}),
    }  # fmt: skip
    path = Path(settings["out"]) if settings["resume"] else new_folder("run", settings["out"])
    folder = RunFolder.create(path, config, resume=bool(settings["resume"]))
    print(f"results: {folder.path}; loading {settings['model']} in {dtype} ({reason})", file=sys.stderr)
    loaded = load_model(settings["model"], dtype=dtype, device=settings["device"])
    notices = check_variants(loaded.model, variants)
    rows = run_accuracy(
        loaded, variants, tasks, lengths, n=settings["samples"], seed=settings["seed"], folder=folder, controls=controls, limit=settings["limit"]
    )
    planned = plan_controls(controls, variants)
    wanted = wanted_samples(variants, tasks, lengths, n=settings["samples"], controls=planned)
    n_missing = len(wanted) - sum(row["n_prompts"] for row in rows)
    done = [record for key in wanted if (record := folder.get(key)) is not None]
    about_pictures = _pictures(loaded, folder, done, variants, planned)
    extra = {"notices": notices, **about_pictures}
    _report(loaded, folder, rows, extra=extra, settings=settings, dtype_reason=reason, n_missing=n_missing)
    return 1 if n_missing else 0


def _pictures(
    loaded: LoadedModel, folder: RunFolder, records: Sequence[SampleRecord], variants: Mapping[str, Sequence[Method]], controls: Sequence[Control]
) -> dict[str, Any]:
    """What the result says of questions about pictures, the drawn pictures included; empty without such questions."""
    from accel.evals.gallery import run_gallery
    from accel.evals.picture_summary import summarise_pictures

    found = summarise_pictures(records, list(variants), controls)
    passing = [gate["task"] for gate in found.get("gates", []) if gate["passes"]]
    return {**found, "overlays": run_gallery(loaded, folder, variants, controls, passing)} if passing else found


def _report(
    loaded: LoadedModel, folder: RunFolder, rows: Sequence[Mapping[str, Any]], *, extra: Mapping[str, Any], settings: Mapping[str, Any],
    dtype_reason: str, n_missing: int,
) -> None:  # fmt: skip
    """Prints the tables and the notices, and writes result.json and the reports. extra: sections of the result, `notices` among them."""
    from accel.evals.report import write_reports
    from accel.evals.summary import answer_rows

    head = describe_run("run", f"{loaded.name}: accuracy beside dense and controls", loaded, settings, dtype_reason=dtype_reason)
    sections = {key: value for key, value in head.items() if key not in ("schema", "config")}
    unfinished = [f"{n_missing} samples are missing: the run stopped at its limit. Go on with `--out {folder.path} --resume`."] if n_missing else []
    notices = [*extra["notices"], *_picture_notices(rows, extra), *unfinished]
    folder.finish(
        rows,
        **sections,
        **{key: value for key, value in extra.items() if key != "notices"},
        answers=answer_rows(folder.records),
        notices=notices,
        limits=_limits(rows),
        n_missing=n_missing,
    )
    _print(rows, extra)
    for notice in notices:
        print(notice)
    print(f"report: {write_reports(folder.path).html}", file=sys.stderr)


def _print(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> None:
    """The tables on stdout: text first, then pictures."""
    from accel.cli.table import print_table
    from accel.evals.report_pictures import gate_table, headline, keep_table, text_scores
    from accel.evals.report_sections import accuracy_table

    scores = text_scores({"scores": rows})
    tables = [accuracy_table(scores)] if scores else []
    if extra.get("gates"):
        tables.append(gate_table(extra["gates"]))
    if extra.get("means"):
        tables.append(keep_table(extra["means"], rows, extra["gates"]))
    for table in tables:
        print_table(table.headers, table.rows, text_columns=table.text_columns)
    if extra.get("paired"):
        print("\n".join(headline(row) for row in extra["paired"]), end="\n\n")


def _picture_notices(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[str]:
    """Tasks that failed the gate, and prompts that were not pruned as asked."""
    from accel.evals.picture_summary import left_out

    notes = dict.fromkeys(f"{row['label']}: {row['note']}" for row in rows if row["kind"] == "picture" and row["note"])
    return [*left_out(extra.get("gates", [])), *notes]


def _limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of these tasks cannot show."""
    from accel.evals.tasks import PictureTask, load_task

    tasks = [load_task(name) for name in dict.fromkeys(row["task"] for row in rows)]
    found = [task.caveat for task in tasks if isinstance(task, PictureTask) and task.caveat]
    if any(row["score"]["name"] == "perplexity" for row in rows):
        found.append("Scores named perplexity are better when lower, and do not separate sparse methods: read them beside retrieval.")
    return list(dict.fromkeys(found))


def _controls(asked: Any, variants: Mapping[str, Sequence[Method]]) -> list[str]:
    """Names of the controls: those asked for, or the usual ones of each kind of method; a method is no control of itself."""
    if asked is not None:
        return [] if asked == "none" else split_items(asked)
    found = []
    for kind, usual in CONTROLS.items():
        present = {m.method_name() for methods in variants.values() for m in methods if m.kind == kind}
        found += [name for name in split_items(usual) if present - {name}]
    return found


def _task_files() -> list[str]:
    """Names of the tasks, from their files: the help must not import what loading them would."""
    from accel.evals.tasks import task_names

    return task_names()
