"""`accel ls`: the methods, what each does, and where it runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from accel.cli.table import print_table

if TYPE_CHECKING:
    from accel.protocols import ModelInfo

HELP = "the methods, what each does, its options, where it runs, and what was never tried"


@dataclass(frozen=True)
class MethodRow:
    """One method. hosts: by host, the reasons against it; empty where it runs. text: what its class says, by paragraph. defaults: of its options."""

    name: str
    kind: str
    summary: str
    needs_training: str | None
    hosts: dict[str, list[str]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="tell all of these: their options and defaults, and what speaks against a host")
    parser.add_argument("--notes", action="store_true", help="also what was tried on each host, and what was not")
    parser.add_argument("--json", action="store_true", help="print JSON, which has all of it, instead of text")
    parser.epilog = "example:\n  accel ls flexprefill"


def main(args: argparse.Namespace) -> int:
    """Prints methods × hosts, or all there is to say of some methods, and with `--notes` those of each host."""
    rows, notes = method_rows(args.methods), host_notes()
    if args.json:
        print(json.dumps({"methods": [asdict(row) for row in rows], "notes": notes}, indent=2, ensure_ascii=False, default=repr))
        return 0
    if args.methods:
        for row in rows:
            _print_card(row)
    else:
        _print_methods(rows)
    if args.notes:
        for host, lines in notes.items():
            _print_list(f"On {host}", lines)
    elif not args.methods:
        print("accel ls METHOD tells its options and what speaks against a host, accel ls --notes what was tried with each host.")
    return 0


def _print_methods(rows: Sequence[MethodRow]) -> None:
    hosts = list(rows[0].hosts) if rows else []
    headers = ["method", "kind", *hosts, "training"]
    cells = []
    for row in rows:
        runs_on = ["no" if row.hosts[host] else "yes" for host in hosts]
        cells.append([row.name, row.kind.replace("_", " "), *runs_on, "wanted" if row.needs_training else "none"])
    print_table(headers, cells, text_columns=range(len(headers)))
    _print_list("What they do", {row.name: row.summary for row in rows})
    _print_list("Training", {row.name: " ".join(row.needs_training.split()) for row in rows if row.needs_training})


def _print_card(row: MethodRow) -> None:
    """One method: its own words about itself and its options, their defaults, and each host with the reasons against it."""
    print(f"{row.name}: {row.kind.replace('_', ' ')}")
    for paragraph in row.text:
        print(textwrap.fill(paragraph, width=118, initial_indent="  ", subsequent_indent="      "))
    defaults = ", ".join(f"{name}={value!r}" for name, value in row.defaults.items())
    lines = {"defaults": defaults, "training": row.needs_training or "none"}
    lines |= {f"on {host}": "; ".join(reasons) if reasons else "runs" for host, reasons in row.hosts.items()}
    _print_list("", lines)


def method_rows(names: Sequence[str] = ()) -> list[MethodRow]:
    """These methods, or all there are, against every host, for a plain model of the host's kind: a text model unless the host says otherwise."""
    from accel.patching import hosts
    from accel.registry import build, method_names

    rows = []
    for name in dict.fromkeys(names) or method_names():
        method = build(name)
        summary = _docstring(type(method)).split("\n", 1)[0] or "(says nothing of itself)"
        against = {
            _host_name(host): [*host.refusals(method), *method.supports(getattr(host, "plain_model", _plain_model)(), _host_name(host), [])]
            for host in hosts()
        }
        rows.append(MethodRow(name, method.kind, summary, method.needs_training, against, _told(type(method), method.options()), method.options()))
    return rows


def _docstring(cls: type) -> str:
    """What was written of a class; not the signature that `dataclass` puts where nothing was."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _told(cls: type, options: Collection[str]) -> list[str]:
    """Paragraphs: what a class says of itself and of its options, and what those classes say that it has other options from."""
    found: list[str] = []
    known: set[str] = set()
    for base in cls.__mro__:
        for names, text in _paragraphs(_docstring(base), options):
            # what a base says of itself is for those who write methods
            if text and (names - known or (base is cls and not names)):
                found.append(text)
                known |= names
    return found


def _paragraphs(docstring: str, options: Collection[str]) -> Iterator[tuple[set[str], str]]:
    """(the options it begins with, the text) of each paragraph; what is said of one option ends where the next begins."""
    for block in docstring.split("\n\n"):
        starts = [i for i, line in enumerate(block.split("\n")) if not i or _named(line, options)]
        lines = block.split("\n")
        for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield _named(lines[start], options), " ".join(map(str.strip, lines[start:stop]))


def _named(line: str, options: Collection[str]) -> set[str]:
    head = re.match(r"\w+(, \w+)*:", line)
    return {name for name in head[0][:-1].split(", ") if name in options} if head else set()


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
        if title:
            print(title)
        for key, text in lines.items():
            print(textwrap.fill(f"{key}: {text}", width=118, initial_indent="  ", subsequent_indent="      "))
        print()
