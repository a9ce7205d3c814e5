"""Whether methods stay within a margin of dense, task by task and length by length: for users' own checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import OptionError
from accel.evals.compare.folders import Source
from accel.evals.results import SampleRecord
from accel.evals.summary.run import log_prob_tasks
from accel.evals.summary.scores import BASELINE
from accel.evals.summary.significance import log_prob_bound, loss_bound, pair_up, unit_differences

# a loss that is the margin but for rounding is within it
_SLACK = 1e-9
ANY_TASK = "*"
# with fewer, one answer moves a score by more than a tenth
FEWEST_PROMPTS = 10


def parse_margins(given: Sequence[str]) -> dict[str, float]:
    """Margins by task from `["0.02"]` or `["needle=0.02,fewshot=0.05"]`; one without a task is for every task that has none of its own (`"*"`)."""
    found: dict[str, float] = {}
    for item in (part.strip() for text in given for part in text.split(",") if part.strip()):
        task, equals, number = item.rpartition("=")
        try:
            margin = float(number)
        except ValueError:
            margin = math.nan
        if not 0 <= margin <= 1 or (equals and not task.strip()):
            raise OptionError(f"a gate is a margin of score in [0, 1], such as 0.02 or needle=0.02,fewshot=0.05; got {item!r}")
        found[task.strip() or ANY_TASK] = margin
    return found


def gate_rows(sources: Sequence[Source], margins: Mapping[str, float], names: Mapping[tuple[str, str], str], *, confidence: float | None = None
              ) -> list[dict[str, Any]]:  # fmt: skip
    """`gate` of a comparison: one row per method, task and length that has a margin.

    A method passes where its loss, dense minus method on the same prompts of its own folder, is at most the margin; with `confidence`, where even the
    one-sided bound of that loss is, so that too few prompts do not pass. Of a perplexity, the loss is its rise as a share of dense's. A prompt
    that the method or dense has not answered fails it, and so does a task of which dense answers nothing, or about pictures that it does not see,
    since nothing can be lost there.
    Each row: label, folder, task, tokens, n (units), dense (its score), loss, bound (None without confidence, or where there is none), margin,
    passes, why. dense is None of a perplexity; dense and loss are None where there is no basis for a gate.
    Raises OptionError where a task with a margin is in no folder, and where there is nothing to be gated.
    """
    if confidence is not None and not 0.5 < confidence < 1:
        raise OptionError(f"the confidence of a gate lies between 0.5 and 1, such as 0.95; got {confidence}")
    runs = [source for source in sources if source.is_run]
    tasks = {row["task"] for source in runs for row in source.result.get("scores", [])}
    if unknown := sorted(set(margins) - tasks - {ANY_TASK}):
        raise OptionError(f"no folder has scores of {', '.join(unknown)}, for which --gate has a margin. There are: {', '.join(sorted(tasks))}")
    rows = [row for source in runs for row in _of_source(source, margins, names, confidence)]
    if not rows:
        raise OptionError("there is nothing to be gated: no folder has scores of a method, beside dense and controls, on a task with a margin")
    return rows


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each row that did not pass."""
    return [f"gate: {row['label']} on {_place(row)}: {row['why']}" for row in rows if not row["passes"]]


def gate_notices(rows: Sequence[Mapping[str, Any]], confidence: float | None = None) -> list[str]:
    """A line for each task and length at which a method did nothing, of which few prompts were gated by their measured loss, or whose margin no loss
    can exceed.
    """
    idle = [f"gate: {row['label']} on {_place(row)}: the method did nothing to these prompts, so that dense was compared with itself."
            for row in rows if row.get("is_idle") and row["loss"] is not None]  # fmt: skip
    if confidence is not None:
        return idle
    measured = [row for row in rows if row["loss"] is not None]
    more = f"--resume --samples {FEWEST_PROMPTS}"
    few = {f"{_place(row)} rests on {_prompts(row['n'])}; fewer than {FEWEST_PROMPTS} tell little of others: take more with `accel run --out "
           f"{row['folder']} {more}`, or say how sure the gate must be with --confidence."
           for row in measured if row["n"] < FEWEST_PROMPTS}  # fmt: skip
    loose = {f"{_place(row)}: dense scores {row['dense']:.3f}, no more than the margin of {row['margin']:g}"
             for row in measured if row["dense"] is not None and row["dense"] <= row["margin"] + _SLACK}  # fmt: skip
    return [*idle, *(f"gate: {what}" for what in sorted(few)), *(f"gate: {what}, so that no loss can fail it." for what in sorted(loose))]


def _of_source(source: Source, margins: Mapping[str, float], names: Mapping[tuple[str, str], str], confidence: float | None) -> list[dict[str, Any]]:
    graded = log_prob_tasks(source.scores)
    cells = dict.fromkeys((row["task"], row.get("tokens") or 0) for row in source.result.get("scores", []))
    shown = {row["task"] for row in source.scores}
    rows = []
    for label in source.methods:
        for task, tokens in cells:
            margin = margins.get(task, margins.get(ANY_TASK))
            if margin is None:
                continue
            mine, dense = (_at(source, task, tokens, name) for name in (label, BASELINE))
            row = {"label": names.get((source.name, label), label), "folder": str(source.path), "task": task, "tokens": tokens, "margin": margin}
            if task in shown:
                found = _verdict(mine, dense, margin, confidence, is_log_prob=task in graded, wanted=source.config.get("samples"))
                found["is_idle"] = all(r.density is None and r.kept_share is None and r.cache is None for r in mine)
            else:
                found = _without_basis(len(pair_up(mine, dense)), "dense itself does not see these pictures well enough: it failed the task's gate")
            rows.append({**row, **found})
    return rows


def _at(source: Source, task: str, tokens: int, label: str) -> list[SampleRecord]:
    return [r for r in source.records if (r.task, r.tokens, r.label) == (task, tokens, label)]


def _verdict(
    mine: Sequence[SampleRecord], dense: Sequence[SampleRecord], margin: float, confidence: float | None, *, is_log_prob: bool, wanted: int | None
) -> dict[str, Any]:  # fmt: skip
    pairs = pair_up(mine, dense)
    n_wanted = max(len(mine), len(dense), wanted or 1)
    if len(pairs) < n_wanted:
        why = f"it and dense have both answered {len(pairs)} of {n_wanted} prompts, which is no basis for a gate"
        return _without_basis(len(pairs), why)
    differences = unit_differences(pairs, is_log_prob=is_log_prob)
    n, mean = len(differences), math.fsum(differences) / len(differences)
    score = None if is_log_prob else math.fsum(b.exact for _, b in pairs) / len(pairs)
    if score == 0:
        return _without_basis(n, f"dense answers none of {_prompts(n)}: no method can be told from it; choose a task it can do")
    loss = math.expm1(-mean) if is_log_prob else 0.0 - mean
    bound = None
    if confidence is not None and is_log_prob:
        lowest = log_prob_bound(differences, confidence)
        bound = None if lowest is None else math.expm1(-lowest)
    elif confidence is not None:
        bound = loss_bound(differences, confidence)
    decisive = loss if confidence is None else math.inf if bound is None else bound
    passes = decisive <= margin + _SLACK
    why = "" if passes else _why(loss, bound, margin, n, confidence, is_log_prob)
    return {"n": n, "dense": score, "loss": loss, "bound": bound, "passes": passes, "why": why}


def _without_basis(n: int, why: str) -> dict[str, Any]:
    return {"n": n, "dense": None, "loss": None, "bound": None, "passes": False, "why": why}


def _why(loss: float, bound: float | None, margin: float, n: int, confidence: float | None, is_log_prob: bool) -> str:
    what = "of perplexity" if is_log_prob else "of score"
    on = _prompts(n)
    moved = f"it loses {loss:.3f} {what}" if loss > 0 else f"it loses nothing ({0.0 - loss:+.3f} {what})"
    if confidence is None:
        return f"{moved} against dense, more than the margin of {margin:g} ({on})"
    if bound is None:
        return f"{moved} against dense, and {on} give no bound for a margin of {margin:g}"
    return f"{moved} against dense, and up to {bound:.3f} cannot be ruled out ({confidence:.0%}, one-sided, {on}), more than the margin of {margin:g}"


def _prompts(n: int) -> str:
    return f"{n} {'prompt' if n == 1 else 'prompts'}"


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['task']} at {row['tokens']} tokens" if row["tokens"] else str(row["task"])
