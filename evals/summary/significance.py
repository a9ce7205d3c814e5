"""Whether a method differs from dense, or from a control, on the same prompts by more than chance: a test, an interval, and bounds for gates.

One unit is a prompt with all its answers, or a picture with all its questions, since answers of one prompt depend on each other; of several lengths
also the prompts that are made from the same draw. Where every unit is one hit or miss, the test is McNemar's, exact: among the units that only one
of the two got right, each is as likely to be the first's. Where a unit is more than that, the same null hypothesis is tested on its difference:
with no effect its sign could as well be the other one (a permutation test, which for single hits and misses is McNemar's).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.results import SampleRecord
from accel.evals.summary.pictures import bootstrap, clustered
from accel.evals.summary.scores import BASELINE

if TYPE_CHECKING:
    from accel.evals.controls import Control

MCNEMAR, SIGNS = "exact McNemar", "sign flips"
# below so many units, the bootstrap gives intervals that are far too narrow
FEWEST_UNITS = 20
# sign patterns: all of them up to 13 units that differ, so many drawn ones beyond
N_PATTERNS = 9999


def planned_pairs(methods: Iterable[str], controls: Sequence[Control]) -> list[tuple[str, str]]:
    """Labels to be compared: each method with dense, and with the controls of its budget."""
    return [
        pair
        for label in methods
        for pair in [(label, BASELINE), *((label, control.label) for control in controls if label in control.references)]
    ]


def compared(
    records: Sequence[SampleRecord], pairs: Sequence[tuple[str, str]], *, log_prob_tasks: Collection[str] = (), left_out: Collection[str] = ()
) -> list[dict[str, Any]]:
    """`comparisons` of a result.json: one row per pair, task and length, and one over all of them where there are several.

    log_prob_tasks: scored by the log-probability of their answers; they stay out of the row over all. left_out: tasks that no table shows. The row
    over all has no bytes, which grow with the length.
    Each row: task and tokens (None for the row over all, whose `tasks` are named), label, other, and the fields of `paired_test`. Pairs without a
    common prompt have no row.
    """
    mine = [r for r in records if r.task not in left_out]
    by_label: dict[str, list[SampleRecord]] = {}
    for record in mine:
        by_label.setdefault(record.label, []).append(record)
    rows = []
    for label, other in pairs:
        both = pair_up(by_label.get(label, []), by_label.get(other, []))
        tasks = list(dict.fromkeys(a.task for a, _ in both))
        for task, tokens in sorted({(a.task, a.tokens) for a, _ in both}, key=lambda cell: (tasks.index(cell[0]), cell[1])):
            cell = [pair for pair in both if (pair[0].task, pair[0].tokens) == (task, tokens)]
            rows.append({"task": task, "tokens": tokens, "label": label, "other": other, **paired_test(cell, is_log_prob=task in log_prob_tasks)})
        scored = [pair for pair in both if pair[0].task not in log_prob_tasks]
        if len({(a.task, a.tokens) for a, _ in scored}) > 1:
            tasks = list(dict.fromkeys(a.task for a, _ in scored))
            rows.append({"task": None, "tasks": tasks, "tokens": None, "label": label, "other": other, **paired_test(scored), "bytes": None})
    return rows


def pair_up(method: Sequence[SampleRecord], other: Sequence[SampleRecord]) -> list[tuple[SampleRecord, SampleRecord]]:
    """The samples of both on the same prompts, by task, length and number; those whose prompts differ are no pair."""
    by_place = {(r.task, r.tokens, r.sample): r for r in other}
    found = [(r, by_place[r.task, r.tokens, r.sample]) for r in method if (r.task, r.tokens, r.sample) in by_place]
    return [(a, b) for a, b in found if a.prompt_hash == b.prompt_hash]


def paired_test(pairs: Sequence[tuple[SampleRecord, SampleRecord]], *, is_log_prob: bool = False) -> dict[str, Any]:
    """The difference of two labels on the same prompts, first minus second, and how likely one as large is by chance.

    metric: "score", or "log_prob" (nats, a mean over answers). difference, stderr: over units. interval: 95 %, paired bootstrap over units; None
    below `FEWEST_UNITS`. log_prob: mean and standard error of its difference where that is not the metric and all pairs have one, else None. bytes:
    the mean difference of the most bytes that their caches held, None where a prompt had a whole one. n: units; better, worse: those on which the
    first is above or below the second. test, p: two-sided; 1 where none differs.
    """
    values = [_value(a, is_log_prob) - _value(b, is_log_prob) for a, b in pairs]
    groups = [unit_of(a) for a, _ in pairs]
    sums = _sums(values, groups)
    is_single = not is_log_prob and len(sums) == len(pairs) and all(len(r.hits) == 1 and r.exact in (0.0, 1.0) for pair in pairs for r in pair)
    found = clustered(values, groups)
    better, worse = sum(d > 0 for d in sums), sum(d < 0 for d in sums)
    return {
        "metric": "log_prob" if is_log_prob else "score", "difference": found.value, "stderr": found.stderr,
        "interval": bootstrap(values, groups) if len(sums) >= FEWEST_UNITS else None,
        "log_prob": None if is_log_prob else _log_prob_difference(pairs), "bytes": _bytes_difference(pairs),
        "unit": "prompts" if pairs[0][0].picture_hash is None else "pictures", "n": len(sums), "better": better, "worse": worse,
        "test": MCNEMAR if is_single else SIGNS, "p": _mcnemar(better, worse) if is_single else _sign_flips(sums),
    }  # fmt: skip


def _log_prob_difference(pairs: Sequence[tuple[SampleRecord, SampleRecord]]) -> dict[str, Any] | None:
    known = [a.log_prob - b.log_prob for a, b in pairs if a.log_prob is not None and b.log_prob is not None]
    return clustered(known, [unit_of(a) for a, _ in pairs]).as_dict() if len(known) == len(pairs) else None


def _bytes_difference(pairs: Sequence[tuple[SampleRecord, SampleRecord]]) -> float | None:
    sizes = [a.cache["peak_bytes"] - b.cache["peak_bytes"] for a, b in pairs if a.cache is not None and b.cache is not None]
    return statistics.fmean(sizes) if len(sizes) == len(pairs) else None


def unit_of(record: SampleRecord) -> str:
    """What this sample shares with others that it does not stand apart from: its picture, or the draw that prompts of every length are made from."""
    return record.picture_hash or f"{record.task} {record.sample}"


def unit_differences(pairs: Sequence[tuple[SampleRecord, SampleRecord]], *, is_log_prob: bool = False) -> list[float]:
    """The mean difference of each unit, first minus second."""
    values, groups = [_value(a, is_log_prob) - _value(b, is_log_prob) for a, b in pairs], [unit_of(a) for a, _ in pairs]
    sizes = _sums([1.0] * len(groups), groups)
    return [total / size for total, size in zip(_sums(values, groups), sizes, strict=True)]


def loss_bound(differences: Sequence[float], confidence: float) -> float:
    """The most that the first may lose against the second, with this confidence (one-sided).

    differences: first minus second per unit, in [−1, 1]. Tango's score bound for paired proportions (Statistics in Medicine 1998): n units without
    a single loss still leave z²/(n + z²) open. A unit of several answers counts as parts of a hit and of a miss, which has the same mean and no
    smaller variance, so the bound holds for it as well.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    n, z = len(differences), float(norm.ppf(confidence))
    lost, won = math.fsum(max(-d, 0.0) for d in differences), math.fsum(max(d, 0.0) for d in differences)
    found = (lost - won) / n

    def excess(loss: float) -> float:
        # won share that fits best where the true loss is `loss`
        b, c = (2 * n - lost + won) * loss - lost - won, -won * loss * (1 - loss)
        p_won = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        spread = math.sqrt(max(n * (2 * p_won + loss * (1 - loss)), 1e-300))
        return n * (loss - found) / spread - z

    return 1.0 if excess(1 - 1e-9) < 0 else float(brentq(excess, found + 1e-12, 1 - 1e-9))


def log_prob_bound(differences: Sequence[float], confidence: float) -> float | None:
    """The lowest mean difference that fits, one-sided, by Student's t over units; None for a single one."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean - float(t.ppf(confidence, n - 1)) * error


def _value(record: SampleRecord, is_log_prob: bool) -> float:
    if not is_log_prob:
        return record.exact
    assert record.log_prob is not None
    return record.log_prob


def _sums(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    found: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        found[group] = found.get(group, 0.0) + value
    return list(found.values())


def _mcnemar(better: int, worse: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0


def _sign_flips(sums: Sequence[float]) -> float:
    import numpy as np
    from scipy.stats import permutation_test

    # units that do not differ are the same with either sign
    moved = np.array([d for d in sums if d])
    if not len(moved):
        return 1.0
    if len(moved) == 1:
        # scipy asks for two observations; both signs are as far from nothing
        return 1.0
    found = permutation_test(
        (moved,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=N_PATTERNS, vectorized=True, rng=0,
    )  # fmt: skip
    return float(min(found.pvalue, 1.0))


def describe_p(row: Mapping[str, Any]) -> str:
    """ "0.31", or "< 0.001" where it is smaller."""
    return "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}" if row["p"] < 0.1 else f"{row['p']:.2f}"
