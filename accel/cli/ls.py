"""`accel ls`: the methods, what each does, and where it runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from accel.cli.table import print_table

if TYPE_CHECKING:
    from accel.protocols import ModelInfo

HELP = "the methods, what each does, where it runs, and what was never tried"


@dataclass(frozen=True)
class MethodRow:
    """One method. `hosts`: by host, the reasons against it; empty where it runs."""

    name: str
    kind: str
    summary: str
    needs_training: str | None
    hosts: dict[str, list[str]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.epilog = "example:\n  accel ls"


def main(args: argparse.Namespace) -> int:
    """Prints methods × hosts and the notes of each host."""
    rows, notes = method_rows(), host_notes()
    if args.json:
        print(json.dumps({"methods": [asdict(row) for row in rows], "notes": notes}, indent=2, ensure_ascii=False))
        return 0
    hosts = list(rows[0].hosts) if rows else []
    headers = ["method", "kind", *hosts, "training"]
    cells = []
    for row in rows:
        runs_on = ["no" if row.hosts[host] else "yes" for host in hosts]
        cells.append([row.name, row.kind.replace("_", " "), *runs_on, "wanted" if row.needs_training else "none"])
    print_table(headers, cells, text_columns=range(len(headers)))
    _print_list("What they do", {row.name: row.summary for row in rows})
    _print_list("Training", {row.name: " ".join(row.needs_training.split()) for row in rows if row.needs_training})
    refused = {f"{row.name} on {host}": "; ".join(reasons) for row in rows for host, reasons in row.hosts.items() if reasons}
    _print_list("Does not run", refused)
    for host, lines in notes.items():
        _print_list(f"On {host}", lines)
    return 0


def method_rows() -> list[MethodRow]:
    """Every registered method against every host, for a plain model of the host's kind: a text model unless the host says otherwise."""
    from accel.patching import hosts
    from accel.registry import build, method_names

    rows = []
    for name in method_names():
        method = build(name)
        summary = (type(method).__doc__ or "").strip().split("\n", 1)[0]
        against = {
            _host_name(host): [*host.refusals(method), *method.supports(getattr(host, "plain_model", _plain_model)(), _host_name(host), [])]
            for host in hosts()
        }
        rows.append(MethodRow(name, method.kind, summary, method.needs_training, against))
    return rows


def host_notes() -> dict[str, dict[str, str]]:
    """What each host's `notes` module says of combinations (quantised weights, pipelines, …), tried or not."""
    from accel.patching import hosts

    found = {}
    for host in hosts():
        module = host.__name__.rpartition(".")[0] + ".notes"
        if importlib.util.find_spec(module):
            found[_host_name(host)] = dict(importlib.import_module(module).HOST_NOTES)
    return found


def _host_name(host: Any) -> str:
    return str(host.__name__.split(".")[-2])


def _plain_model() -> ModelInfo:
    """A text model without any speciality: what a method refuses here, it refuses everywhere."""
    from accel.protocols import ModelInfo

    return ModelInfo("llama", 32, 32, 8, 128, ("full_attention",) * 32, "cpu", "bfloat16", 131072)


def _print_list(title: str, lines: dict[str, str]) -> None:
    if lines:
        print(title)
        for key, text in lines.items():
            print(textwrap.fill(f"{key}: {text}", width=118, initial_indent="  ", subsequent_indent="      "))
        print()
