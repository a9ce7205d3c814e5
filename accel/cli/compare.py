"""`accel compare`: finished runs side by side: paired differences, accuracy against time, and a gate for one's own checks."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.errors import OptionError

HELP = "finished runs side by side: paired differences, accuracy against time; --gate fails on a loss"

EXIT_GATE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of `accel run` (scores) and `accel bench` (times), of one model")
    gate = "fail with exit code 1 where a method loses more than this margin of score to dense: 0.02 for every task, or needle=0.02,fewshot=0.05"
    parser.add_argument("--gate", action="append", metavar="MARGIN|TASK=MARGIN,…", help=gate)
    confidence = "gate on what the loss may be with this confidence (one-sided), such as 0.95, instead of on the measured one"
    parser.add_argument("--confidence", type=float, metavar="SHARE", help=confidence)
    parser.add_argument("--out", help="folder for compare.json, compare.md and compare.html with its plots")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.epilog = (
        "examples:\n  accel compare runs/flexprefill runs/flexprefill-bench --out runs/compare\n"
        "  accel compare runs/nightly --gate needle=0.02,fewshot=0.05 --confidence 0.95"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the comparison and writes it where asked. 1 where the gate fails, else 0; folders that cannot be compared raise."""
    from accel.evals.compare.folders import compare, display_names, read_sources
    from accel.evals.compare.gate import failures, gate_notices, gate_rows, parse_margins
    from accel.evals.report.page import require_packages

    if args.confidence is not None and not args.gate:
        raise OptionError("--confidence says how sure --gate has to be; give a margin with --gate")
    margins = parse_margins(args.gate or [])
    if args.gate and not margins:
        raise OptionError(f"--gate {' '.join(map(repr, args.gate))} names no margin; give one, such as 0.02 or needle=0.02,fewshot=0.05")
    require_packages("scipy")
    if args.out:
        _check_folder(Path(args.out))
    sources = read_sources(args.folders)
    result = compare(sources)
    failed: list[str] = []
    if margins:
        result["gate"] = gate_rows(sources, margins, display_names(sources), confidence=args.confidence)
        result["config"] |= {"gate": margins, **({"confidence": args.confidence} if args.confidence else {})}
        failed = failures(result["gate"])
        result["notices"] = [*gate_notices(result["gate"], args.confidence), *result["notices"]]
    _show(result, as_json=args.json)
    for line in failed:
        print(line, file=sys.stderr)
    if args.out:
        from accel.evals.compare.report import write_comparison

        result["notices"] = [*failed, *result["notices"]]
        print(f"report: {write_comparison(result, Path(args.out)).html}", file=sys.stderr)
    return EXIT_GATE if failed else 0


def _show(result: Mapping[str, Any], *, as_json: bool) -> None:
    from accel.cli.table import format_table
    from accel.evals.compare.report import titled_tables

    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    for title, table in titled_tables(result):
        caption = [textwrap.fill(table.caption, 120)] if table.caption else []
        print(title, format_table(table.headers, table.rows, text_columns=table.text_columns), *caption, sep="\n", end="\n\n")
    for notice in result["notices"]:
        print(notice)


def _check_folder(folder: Path) -> None:
    """Raises OptionError for a folder that holds anything but an earlier comparison."""
    from accel.evals.compare.report import FILES

    if folder.exists() and (not folder.is_dir() or any(file.name not in FILES for file in folder.iterdir())):
        raise OptionError(f"{folder} holds other files than those of a comparison: choose another with --out")
