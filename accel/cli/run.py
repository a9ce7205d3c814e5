"""`accel run`: accuracy of methods beside dense attention and controls of equal density, on tasks made by code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import choose_dtype, describe_run, merge_settings, new_folder, print_settings, settle_threads
from accel.cli.options import parse_lengths, read_variants, split_items
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel
    from accel.evals.results import RunFolder
    from accel.protocols import Method

HELP = "accuracy of methods, beside dense attention and controls of equal density; can be resumed"

CONTROLS = "streaming,random_blocks"
DEFAULTS: dict[str, Any] = {
    "model": "smollm2", "method": None, "recipe": None, "tasks": "needle,fewshot", "lengths": "4k", "samples": 1, "controls": None, "seed": 0,
    "dtype": "auto", "device": "cpu", "threads": None, "out": None, "resume": None, "limit": None,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no default here: a flag that was not given must not override the settings file
    parser.add_argument("--model", help="an embedded model, a folder, or a hub id (default: smollm2)")
    parser.add_argument("--method", action="append", metavar="NAME[:OPTION=VALUE,…]", help="repeatable (default: the model's recipe, or flexprefill)")
    parser.add_argument("--recipe", help="a recipe file, measured as one more variant")
    parser.add_argument("--tasks", help=f"task names, ruler, or all; {', '.join(_task_files())} (default: {DEFAULTS['tasks']})")
    parser.add_argument("--lengths", help="prompt lengths in tokens, such as 2k,4k (default: 4k)")
    parser.add_argument("--samples", type=int, help="prompts per task and length (default: 1)")
    parser.add_argument("--controls", help=f"methods to run at the density that the first one reached on each prompt, or none (default: {CONTROLS})")
    parser.add_argument("--seed", type=int, help="of the prompts (default: 0)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: whichever this machine is fast in")
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-run)")
    parser.add_argument("--resume", action="store_const", const=True, help="go on with the run in --out; finished samples are not run again")
    parser.add_argument("--limit", type=int, help="stop after so many new samples; the exit code is 1 while some are missing")
    parser.add_argument("--config", help="a YAML file with any of these settings; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print the merged settings and stop")
    parser.epilog = "example:\n  accel run --model smollm2 --method flexprefill:gamma=0.9,min_budget=256,min_seq_len=0 --tasks needle --lengths 2k"


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
    from accel.evals.models import load_model
    from accel.evals.results import RunFolder
    from accel.evals.runner import reference_label, run_accuracy

    dtype, reason = choose_dtype(settings["dtype"], settings["device"])
    plain = {label: [{m.method_name(): m.changed_options()} for m in methods] for label, methods in variants.items()}
    config = {
        "command": "run", **{key: settings[key] for key in ("model", "device", "seed", "samples")}, "dtype": dtype, "tasks": list(tasks),
        # through JSON: YAML files hold no tuples
        "lengths": list(lengths), "controls": list(controls), "reference": reference_label(variants), "methods": json.loads(json.dumps(plain)),
    }  # fmt: skip
    path = Path(settings["out"]) if settings["resume"] else new_folder("run", settings["out"])
    folder = RunFolder.create(path, config, resume=bool(settings["resume"]))
    print(f"results: {folder.path}; loading {settings['model']} in {dtype} ({reason})", file=sys.stderr)
    loaded = load_model(settings["model"], dtype=dtype, device=settings["device"])
    notices = check_variants(loaded.model, variants)
    rows = run_accuracy(
        loaded, variants, tasks, lengths, n=settings["samples"], seed=settings["seed"], folder=folder, controls=controls, limit=settings["limit"]
    )
    n_missing = len(tasks) * len(lengths) * settings["samples"] * (1 + len(variants) + len(controls)) - sum(row["n_prompts"] for row in rows)
    _report(loaded, folder, rows, notices=notices, settings=settings, dtype_reason=reason, n_missing=n_missing)
    return 1 if n_missing else 0


def _report(
    loaded: LoadedModel, folder: RunFolder, rows: Sequence[Mapping[str, Any]], *, notices: Sequence[str], settings: Mapping[str, Any],
    dtype_reason: str, n_missing: int,
) -> None:  # fmt: skip
    """Prints the table and the notices, and writes result.json and the reports."""
    from accel.cli.table import print_table
    from accel.evals.report import write_reports
    from accel.evals.report_sections import accuracy_table
    from accel.evals.summary import answer_rows

    head = describe_run("run", f"{loaded.name}: accuracy beside dense attention and controls", loaded, settings, dtype_reason=dtype_reason)
    sections = {key: value for key, value in head.items() if key not in ("schema", "config")}
    limits = ["Scores named perplexity are better when lower, and do not separate sparse methods: read them beside retrieval."]
    unfinished = [f"{n_missing} samples are missing: the run stopped at its limit. Go on with `--out {folder.path} --resume`."] if n_missing else []
    folder.finish(
        rows,
        **sections,
        answers=answer_rows(folder.records),
        notices=[*notices, *unfinished],
        limits=limits if any(row["score"]["name"] == "perplexity" for row in rows) else [],
        n_missing=n_missing,
    )
    table = accuracy_table(rows)
    print_table(table.headers, table.rows, text_columns=table.text_columns)
    for notice in [*notices, *unfinished]:
        print(notice)
    print(f"report: {write_reports(folder.path).html}", file=sys.stderr)


def _controls(asked: Any, variants: Mapping[str, Sequence[Method]]) -> list[str]:
    """Names of the controls. Without a sparse-attention method there is no density to compare at, and by default none runs."""
    from accel.protocols import SparseAttention

    if asked is None:
        has_sparse = any(isinstance(m, SparseAttention) for methods in variants.values() for m in methods)
        return split_items(CONTROLS) if has_sparse else []
    return [] if asked == "none" else split_items(asked)


def _task_files() -> list[str]:
    """Names of the tasks, from their files: the help must not import what loading them would."""
    from accel.evals.tasks import task_names

    return task_names()
