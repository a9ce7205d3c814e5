"""Offline calibration: a resumable search over a method's options.

Nothing here knows a method by name: `search_space()` says what may be tuned, `objectives()` what for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.errors import OptionError, UnsupportedError
from accel.protocols import Method, Objective, SparseAttention
from accel.recipe import Recipe
from accel.registry import build, method_class
from accel.tune.space import Space, describe
from accel.tune.study import as_json, ended, open_study, options_of, queue_first, quiet_optuna, run_trial, sampler, succeeded

# an objective of any method, which needs tasks instead of data (front.py)
ACCURACY_AT_LATENCY = "accuracy@latency"


@dataclass(frozen=True)
class TuneResult:
    """Outcome of a search. `default_score` is the score of the method's own defaults, None where they lie outside the space."""

    best: Method
    score: float
    default_score: float | None
    n_done: int
    n_failed: int
    recipe: Path


def tune(
    name: str,
    objective: Objective,
    *,
    model: Any,
    data: Any,
    trials: int,
    folder: Path,
    fixed: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> TuneResult:
    """Searches the options of method `name` for the best `objective`; writes `recipe.yaml` and `trials.json` to `folder`.

    trials: how many are run, failed ones included. The first is the method with its defaults, inside the space or not, so that the result is never
    worse than doing nothing; then come random points; the rest is chosen by optuna (TPE).
    Every finished trial is on disk (`study.db`): the same call after a kill goes on, repeats the trial that was cut short, and ends with the
    same result. One process per folder.
    fixed: options that are given, not searched. about: what the scores depend on (model, data). A folder of another search is refused.
    """
    if trials < 1:
        raise OptionError(f"trials must be at least 1, got {trials}")
    space = {option: values for option, values in method_class(name).search_space().items() if option not in (fixed or {})}
    if not space:
        raise OptionError(f"{name} has nothing to tune")
    default = build(name, dict(fixed or {}))
    folder.mkdir(parents=True, exist_ok=True)
    identity = as_json({"method": name, "objective": objective.name, "fixed": fixed or {}, "space": repr(space), **(about or {})})
    with quiet_optuna():
        study = open_study(folder / "study.db", identity, ["minimize" if objective.minimize else "maximize"])
        queue_first(study, space, default)
        attempts = max(0, trials - len(ended(study)))
        with progress_bar(attempts, f"tune {name}", is_shown=show_progress) as advance:
            for _ in range(attempts):
                study.sampler = sampler(study, seed)
                run_trial(
                    study, space, default, lambda options: ([float(objective.score(build(name, {**(fixed or {}), **options}), model, data))], {})
                )
                advance(f"best {study.best_value:.6g}" if succeeded(study) else "none succeeded yet")
        return _finish(study, space, default, identity, folder)


def tunable_options(name: str) -> list[str]:
    """One line per option that `tune` may search, for people."""
    return [f"{option}: {describe(values)}" for option, values in method_class(name).search_space().items()]


def objective_named(name: str, wanted: str | None) -> Objective:
    """The objective `wanted` of method `name`, or its only one; OptionError says what there is."""
    known = method_class(name).objectives()
    if not known:
        hints = [crossover_hint(name), f"--objective {ACCURACY_AT_LATENCY} searches on tasks" if method_class(name).search_space() else ""]
        raise OptionError("; ".join([f"{name} has no objective to tune for", *filter(None, hints)]))
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if wanted is None or wanted not in known:
        raise OptionError(f"{name} is tuned for one of: {', '.join(known)}; got {wanted!r}")
    return known[wanted]


def crossover_hint(name: str) -> str:
    """What else can be calibrated, for methods that have a crossover; empty for others."""
    is_sparse = issubclass(method_class(name), SparseAttention)
    return "`accel tune crossover` measures from which length a sparse method pays" if is_sparse else ""


def _finish(study: Any, space: Space, default: Method, identity: Mapping[str, Any], folder: Path) -> TuneResult:
    """Writes the outcome; AccelError where no trial succeeded."""
    done = succeeded(study)
    errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
    if not done:
        raise UnsupportedError(f"none of {len(study.trials)} trials of {identity['method']} succeeded:", sorted(set(errors)))
    best = study.best_trial
    method = replace(default, **options_of(best, space, default))
    default_score = next((trial.value for trial in done if trial.user_attrs.get("is_default")), None)
    rows = [
        {
            "number": t.number, "state": t.state.name.lower(), "score": t.value, "options": options_of(t, space, default),
            "error": t.user_attrs.get("error"),
        }
        for t in study.trials
    ]  # fmt: skip
    result = {"schema": 1, **identity, "score": best.value, "default_score": default_score, "trials": rows}
    (folder / "trials.json").write_text(json.dumps(result, indent=2, default=repr) + "\n", encoding="utf-8")
    note = f"accel tune: {identity['objective']} {best.value:.6g}, best of {len(done)} trials" + (
        f"; defaults {default_score:.6g}" if default_score is not None else ""
    )
    known = {"method", "objective", "fixed", "space"}
    where = ", ".join(f"{key} {value}" for key, value in identity.items() if key not in known)
    recipe = Recipe.of(method, note=f"{note} ({where})" if where else note).save(folder / "recipe.yaml")
    return TuneResult(method, best.value, default_score, len(done), len(errors), recipe)


@contextmanager
def progress_bar(total: int, what: str, *, is_shown: bool) -> Iterator[Callable[..., None]]:
    """A function that moves a progress bar on stderr by one step, and may name what is done next."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr, disable=not is_shown, leave=False) as bar:

        def advance(what: str | None = None) -> None:
            if what:
                bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield advance
