"""The part of a report that shows many text tasks at once: a row per task and length, a column per variant."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.plots import short_length
from accel.evals.report_sections import Row, Table, number

# with fewer tasks or variants, the table of scores shows the same
FEWEST = 3


def overview_table(scores: Sequence[Row]) -> Table | None:
    """Scores alone, and for each length their mean and the mean density; None for fewer than `FEWEST` tasks or variants.

    scores: of `summary.summarise`; those of pictures and of drawings are left out.
    """
    mine = [s for s in scores if s.get("tokens")]
    labels, tasks = list(dict.fromkeys(s["label"] for s in mine)), {s["task"] for s in mine}
    if min(len(labels), len(tasks)) < FEWEST:
        return None
    cells: list[list[str]] = []
    starts, quiet = [], []
    for tokens in sorted({s["tokens"] for s in mine}):
        at = [s for s in mine if s["tokens"] == tokens]
        starts.append(len(cells))
        found = {(s["task"], s["label"]): s for s in at}
        for task in dict.fromkeys(s["task"] for s in at):
            row = [found.get((task, label)) for label in labels]
            cells.append([short_length(tokens), task, *("–" if s is None else number(s["score"]["value"], 2) for s in row)])
        quiet += [len(cells), len(cells) + 1]
        cells.append([short_length(tokens), "mean score", *_means(at, labels, _score)])
        cells.append([short_length(tokens), "mean density", *_means(at, labels, _density)])
    perplexities = ", ".join(sorted({s["task"] for s in mine if _is_perplexity(s)}))
    return Table(
        ["tokens", "task", *short_labels(mine).values()],
        cells,
        text_columns=(1,),
        quiet_rows=frozenset(quiet),
        group_starts=frozenset(starts[1:]),
        caption="Scores, of 1, by the rule of each task; standard errors and numbers of prompts stand in the long table. Means: over the tasks that "
        f"every variant has.{f' Lower is better of perplexities ({perplexities}), which are in no mean score.' if perplexities else ''}",
    )


def short_labels(scores: Sequence[Row]) -> dict[str, str]:
    """By label, the methods with those of their options in which variants of the same methods differ; labels of controls and of dense as they are."""
    options: dict[str, Sequence[Mapping[str, Mapping[str, Any]]]] = {}
    for s in scores:
        options.setdefault(s["label"], s.get("options", []))
    is_own = {label: bool(given) and " (" not in label for label, given in options.items()}
    seen: dict[tuple[str, str], set[str]] = {}
    for label, given in options.items():
        if is_own[label]:
            for name, option, value in _flat(given, options):
                seen.setdefault((name, option), set()).add(value)
    found = {}
    for label, given in options.items():
        parts = []
        for entry in given:
            [(name, own)] = entry.items()
            told = ", ".join(f"{option}={value}" for option, value in own.items() if len(seen.get((name, option), ())) > 1)
            parts.append(f"{name}({told})" if told else name)
        found[label] = " + ".join(parts) if is_own[label] else label
    # two that differ in the order of methods only
    return found if len(set(found.values())) == len(found) else {label: label for label in options}


def _flat(
    given: Sequence[Mapping[str, Mapping[str, Any]]], every: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]
) -> list[tuple[str, str, str]]:  # fmt: skip
    """(method, option, value) of one variant, an option that only others give having the value "" here."""
    names = {(name, option) for entries in every.values() for entry in entries for name, own in entry.items() for option in own}
    return [
        (name, option, json.dumps(own[option], sort_keys=True, default=str) if option in own else "")
        for entry in given for name, own in entry.items() for other, option in sorted(names) if other == name
    ]  # fmt: skip


def _means(scores: Sequence[Row], labels: Sequence[str], value: Any) -> list[str]:
    """The mean of each label over the tasks of which every label has a value."""
    by_label = {label: {s["task"]: v for s in scores if s["label"] == label and (v := value(s)) is not None} for label in labels}
    common = set.intersection(*map(set, by_label.values()))
    return [number(statistics.fmean(by_label[label][task] for task in common) if common else None, 2) for label in labels]


def _is_perplexity(score: Row) -> bool:
    return bool(score["score"].get("name") == "perplexity")


def _score(score: Row) -> float | None:
    return None if _is_perplexity(score) else float(score["score"]["value"])


def _density(score: Row) -> float | None:
    return 1.0 if score.get("is_baseline") else score.get("density")
