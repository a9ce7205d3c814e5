"""What questions about pictures show of methods that drop visual tokens: which tasks may speak, scores by budget, and paired differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.evals.controls import Control
from accel.evals.results import SampleRecord
from accel.evals.summary.scores import BASELINE, asked_of, kept_share_of, kept_tokens_of
from accel.evals.summary.visual_layers import Prices, exit_row, mean_last_layer, savings
from accel.evals.tasks import PictureTask, load_task

# a task speaks for a model only where the whole picture beats not looking, and guessing among what is there, by so much (small-models.md §9.5)
GATE = 0.20
# a sum of shares such as 0.3 + 0.2 may lie a rounding above what it stands for
_SLACK = 1e-9
# below so many questions, a gate is decided by chance more than by the model
FEW = 50
# the bootstrap of fewer pictures gives intervals that are far too narrow
FEWEST_PICTURES = 20
N_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over questions. stderr: over pictures, since questions about one picture depend on each other; None for a single picture."""

    value: float
    stderr: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


def summarise_pictures(
    records: Iterable[SampleRecord], methods: Sequence[str], controls: Sequence[Control], prices: Prices | None = None
) -> dict[str, Any]:
    """Sections of a result.json: `gates`, `means`, `exits` and `paired`; empty without questions about pictures.

    methods: labels in the order of the tables; controls: what they are paired with, beside dense. prices: of the model, to tell what was saved.
    """
    mine = [r for r in records if r.picture_hash is not None]
    if not mine:
        return {}
    gates = gate_rows(mine)
    passing = {gate["task"] for gate in gates if gate["passes"]}
    by_label: dict[str, list[SampleRecord]] = {}
    for record in mine:
        if record.task in passing:
            by_label.setdefault(record.label, []).append(record)
    labels = [BASELINE, *methods, *(control.label for control in controls)]
    n_asked = len({(r.task, r.sample) for rows in by_label.values() for r in rows})
    pairs = [(label, BASELINE) for label in methods]
    pairs += [(label, control.label) for control in controls for label in control.references]
    in_order = sorted(pairs, key=lambda pair: labels.index(pair[0]))
    return {
        "gates": gates,
        "means": _in_series([_mean_row(by_label[label], n_asked, prices) for label in labels if label in by_label]),
        "exits": [row for label in labels if (row := exit_row(by_label.get(label, []))) is not None],
        "paired": [row for a, b in in_order if (row := paired_row(by_label.get(a, []), by_label.get(b, []))) is not None],
    }


def gate_rows(records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    """One row per task that ran dense: its score beside both baselines on the same questions, and whether it stays in the tables."""
    found = []
    for name in dict.fromkeys(r.task for r in records):
        dense = [r for r in records if r.task == name and r.label == BASELINE]
        task = load_task(name)
        if not dense or not isinstance(task, PictureTask):
            continue
        score = mean_of(dense)
        chances = dict(task.baselines([r.sample for r in dense], dense[0].seed))
        passes = score.value >= max(chances.values()) + GATE - _SLACK
        found.append({"task": name, "dense": score.as_dict(), "baselines": chances, "passes": passes})
    return found


def mean_of(records: Sequence[SampleRecord]) -> Estimate:
    """Share of right answers."""
    return clustered([r.exact for r in records], [_picture(r) for r in records])


def clustered(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Mean of all values with a standard error that lets values of one group depend on each other."""
    n, mean = len(values), math.fsum(values) / len(values)
    residuals: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        residuals[group] = residuals.get(group, 0.0) + value - mean
    g = len(residuals)
    error = math.sqrt(g / (g - 1) * math.fsum(r * r for r in residuals.values())) / n if g > 1 else None
    return Estimate(mean, error, n)


def paired_row(method: Sequence[SampleRecord], other: Sequence[SampleRecord]) -> dict[str, Any] | None:
    """How much more often the method is right than the other on the questions that both answered; None where there is none.

    interval: 95 % by resampling pictures, the pairs kept together; None below `FEWEST_PICTURES`. only_method, only_other: questions that one of them
    alone got right.
    """
    pairs = _pairs(method, other)
    if not pairs:
        return None
    differences, pictures = [a.exact - b.exact for a, b in pairs], [_picture(a) for a, _ in pairs]
    found, n_pictures = clustered(differences, pictures), len(set(pictures))
    interval = bootstrap(differences, pictures) if n_pictures >= FEWEST_PICTURES else None
    return {
        "label": method[0].label, "other": other[0].label, "keep": asked_of(method), "difference": found.value, "stderr": found.stderr, "n": found.n,
        "n_pictures": n_pictures, "interval": interval, "only_method": sum(d > 0 for d in differences),
        "only_other": sum(d < 0 for d in differences),
    }  # fmt: skip


def bootstrap(values: Sequence[float], groups: Sequence[str], *, seed: int = 0) -> list[float] | None:
    """The 95 % interval of the mean when whole groups are drawn with replacement; None for a single group."""
    import numpy as np

    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        return None
    place = np.array([names[group] for group in groups])
    sums, sizes = np.bincount(place, weights=np.asarray(values, float)), np.bincount(place)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=N_DRAWS)
    low, high = np.quantile((times @ sums) / (times @ sizes), (0.025, 0.975))
    return [float(low), float(high)]


def left_out(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each task that failed the gate, and one where so few questions decided that it says little."""
    lines = [
        f"{gate['task']} is left out of every table: dense answers {gate['dense']['value']:.1%} right, which is not {100 * GATE:.0f} points above "
        f"{max(gate['baselines'].values()):.1%} ({_best(gate['baselines'])})"
        for gate in gates
        if not gate["passes"]
    ]
    fewest = min((gate["dense"]["n"] for gate in gates), default=FEW)
    few = f"the gate was decided on {fewest} {'question' if fewest == 1 else 'questions'} per task: --samples {FEW} or more make it worth something"
    return [*lines, few] if fewest < FEW else lines


def unfinished(means: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row of `means` without a score."""
    return [f"{mean['label']}: no mean yet, {mean['note']}" for mean in means if mean["score"] is None]


def _mean_row(records: Sequence[SampleRecord], n_asked: int, prices: Prices | None) -> dict[str, Any]:
    """Score over all passing tasks, what was kept, and the series that the label belongs to when the budget varies.

    n_asked: questions that any label answered. A label that misses some has no score, and a note says so: its mean would be one of other questions.
    """
    first, n = records[0], len(records)
    return {
        "label": first.label, "series": series_of(first), "keep": asked_of(records), "is_baseline": first.label == BASELINE,
        "score": mean_of(records).as_dict() if n == n_asked else None, "note": "" if n == n_asked else f"{n} of {n_asked} questions answered",
        "kept_share": kept_share_of(records), "kept_tokens": kept_tokens_of(records),
        "visual_tokens": sum(r.visual_tokens for r in records) / n, "last_visual_layer": mean_last_layer(records), **savings(records, prices),
    }  # fmt: skip


def _in_series(means: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those that are alone in their series named by their label: the options of a recipe are no name."""
    members = Counter(mean["series"] for mean in means)
    return [mean if members[mean["series"]] > 1 else {**mean, "series": mean["label"]} for mean in means]


def series_of(record: SampleRecord) -> str:
    """The methods of a sample with those options that are neither the budget nor a seed: one line of a plot."""
    names = []
    for [(name, options)] in (entry.items() for entry in record.options):
        # of a file its name, as in labels
        kept = ", ".join(
            f"{option}={Path(value).name if isinstance(value, str) and '/' in value else value}"
            for option, value in options.items() if option not in ("keep", "seed")
        )  # fmt: skip
        names.append(f"{name}({kept})" if kept else name)
    return " + ".join(names) or BASELINE


def _pairs(method: Sequence[SampleRecord], other: Sequence[SampleRecord]) -> list[tuple[SampleRecord, SampleRecord]]:
    by_place = {(r.task, r.sample): r for r in other}
    return [(r, by_place[r.task, r.sample]) for r in method if (r.task, r.sample) in by_place]


def _picture(record: SampleRecord) -> str:
    assert record.picture_hash is not None
    return record.picture_hash


def _best(baselines: Mapping[str, float]) -> str:
    return max(baselines, key=lambda name: baselines[name])
