"""The part of a report that shows many text tasks at once: a row per task and length, a column per variant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from accel.evals.report.plots import short_length
from accel.evals.report.sections import Row, Table, number

# with fewer tasks or variants, the table of scores shows the same
FEWEST = 3


def overview_table(scores: Sequence[Row]) -> Table | None:
    """Scores alone, and for each length their mean and the mean density; None for fewer than `FEWEST` tasks or variants.

    scores: of `summary.scores.summarise`; those of pictures and of drawings are left out.
    """
    mine = [s for s in scores if s.get("tokens")]
    names = short_labels(mine)
    if min(len(names), len({s["task"] for s in mine})) < FEWEST:
        return None
    cells: list[list[str]] = []
    starts, quiet = [], []
    for tokens in sorted({s["tokens"] for s in mine}):
        starts.append(len(cells))
        found = {(s["task"], s["label"]): s for s in mine if s["tokens"] == tokens}
        tasks, labels = ({key[i]: None for key in found} for i in (0, 1))
        for task in tasks:
            row = [found.get((task, label)) for label in names]
            cells.append([short_length(tokens), task, *("–" if s is None else number(s["score"]["value"], 2) for s in row)])
        common = [task for task in tasks if all((task, label) in found for label in labels) and not _is_perplexity(found[task, next(iter(labels))])]
        if common:
            quiet += [len(cells), len(cells) + 1]
            by_label = {label: [found[task, label] for task in common] if label in labels else [] for label in names}
            cells.append([short_length(tokens), "mean score", *(_mean([s["score"]["value"] for s in own]) for own in by_label.values())])
            cells.append([short_length(tokens), "mean density", *(_mean([_density(s) for s in own]) for own in by_label.values())])
    perplexities = ", ".join(dict.fromkeys(s["task"] for s in mine if _is_perplexity(s)))
    return Table(
        ["tokens", "task", *names.values()],
        cells,
        text_columns=(1,),
        quiet_rows=frozenset(quiet),
        group_starts=frozenset(starts[1:]),
        caption=f"Scores by the rule of each task; standard errors and numbers of prompts stand in the long table.{_means_text(perplexities)}"
        f"{_shared_text(mine, names)}",
    )


def short_labels(scores: Sequence[Row]) -> dict[str, str]:
    """By label, the methods with those of their options in which variants of one method differ; other labels, such as of controls, as they are."""
    own = _own_options(scores)
    differing = _differing(own)
    found = {}
    for label in dict.fromkeys(s["label"] for s in scores):
        parts = [_written(name, {k: v for k, v in options.items() if (name, k) in differing}) for name, options in own.get(label, [])]
        found[label] = " + ".join(parts) or label
    # two variants that differ in the order of methods, or in nothing that options tell
    return found if len(set(found.values())) == len(found) else {label: label for label in found}


def _own_options(scores: Sequence[Row]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """By label, (method, changed options) of what is labelled by them; a control is labelled by its budget, a recipe by its name."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for s in scores:
        entries = [(name, options) for entry in s.get("options", []) for name, options in entry.items()]
        if entries and s["label"].startswith(entries[0][0]) and " (" not in s["label"]:
            found.setdefault(s["label"], entries)
    return found


def _differing(own: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]) -> set[tuple[str, str]]:
    """(method, option) where not all variants with this method have the same value."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for entries in own.values():
        for name, options in entries:
            by_method.setdefault(name, []).append(options)
    return {
        (name, option)
        for name, every in by_method.items() for option in {key for options in every for key in options}
        if any(option not in options or options[option] != every[0].get(option) for options in every)
    }  # fmt: skip


def _shared_text(scores: Sequence[Row], names: Mapping[str, str]) -> str:
    """What the short names leave out."""
    own = _own_options(scores)
    differing = _differing(own)
    shared = {
        name: told
        for label, entries in own.items() if names[label] != label for name, options in entries
        if (told := {k: v for k, v in options.items() if (name, k) not in differing})
    }  # fmt: skip
    return f" In all of that name: {', '.join(_written(name, told) for name, told in shared.items())}." if shared else ""


def _means_text(perplexities: str) -> str:
    without = f", without perplexities ({perplexities}), of which lower is better" if perplexities else ""
    return (
        f" Means: over the tasks that all columns have at this length, each of the same weight{without}. "
        "Density: of the calls that ran sparse, 1 where none did."
    )


def _written(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{option}={value}' for option, value in options.items())})" if options else name


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.fmean(known), 2) if known and len(known) == len(values) else "–"


def _is_perplexity(score: Row) -> bool:
    return bool(score["score"].get("name") == "perplexity")


def _density(score: Row) -> float | None:
    calls = score.get("calls") or {"sparse": 0, "dense": {}}
    ran_dense = bool(calls["dense"]) and not calls["sparse"]
    return 1.0 if score.get("is_baseline") or ran_dense else score.get("density")
