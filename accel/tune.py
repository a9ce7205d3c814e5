"""Offline calibration: a resumable search over a method's options.

Nothing here knows a method by name: `search_space()` says what may be tuned, `objectives()` what for.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.protocols import Method, Objective, SparseAttention
from accel.recipe import Recipe
from accel.registry import build, method_class
from accel.tune_space import Space, describe, holds, options_at, stored_value, suggest

# trials drawn at random before the sampler learns from them; the published search begins with 27 (visual-token-pruning.md §4.7)
N_SPREAD = 16
_SEEDS = 10_000     # trials of one search before the seeds of the next one begin


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
    identity = _as_json({"method": name, "objective": objective.name, "fixed": fixed or {}, "space": repr(space), **(about or {})})
    with _quiet_optuna():
        study = _open_study(folder / "study.db", identity, objective)
        _queue_first(study, space, default)
        attempts = max(0, trials - len(_ended(study)))
        with progress_bar(attempts, f"tune {name}", is_shown=show_progress) as advance:
            for _ in range(attempts):
                study.sampler = _sampler(study, seed)
                _run_trial(study, space, default, lambda options: objective.score(build(name, {**(fixed or {}), **options}), model, data))
                advance(f"best {study.best_value:.6g}" if _done(study) else "none succeeded yet")
        return _finish(study, space, default, identity, folder)


def tunable_options(name: str) -> list[str]:
    """One line per option that `tune` may search, for people."""
    return [f"{option}: {describe(values)}" for option, values in method_class(name).search_space().items()]


def objective_named(name: str, wanted: str | None) -> Objective:
    """The objective `wanted` of method `name`, or its only one; OptionError says what there is."""
    known = method_class(name).objectives()
    if not known:
        raise OptionError(f"{name} has no objective to tune for{f'; {hint}' if (hint := crossover_hint(name)) else ''}")
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if wanted is None or wanted not in known:
        raise OptionError(f"{name} is tuned for one of: {', '.join(known)}; got {wanted!r}")
    return known[wanted]


def crossover_hint(name: str) -> str:
    """What else can be calibrated, for methods that have a crossover; empty for others."""
    is_sparse = issubclass(method_class(name), SparseAttention)
    return "`accel tune crossover` measures from which length a sparse method pays" if is_sparse else ""


# --- the search ---------------------------------------------------------------------------------------------------------------


def _open_study(path: Path, identity: Mapping[str, Any], objective: Objective) -> Any:
    """The stored study, or a new one. A trial that a killed process left unfinished is failed; its point is chosen again."""
    import optuna

    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name="accel", direction="minimize" if objective.minimize else "maximize", load_if_exists=True
    )
    if "search" not in study.user_attrs:
        study.set_user_attr("search", dict(identity))
    there = study.user_attrs["search"]
    differs = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
    wrong = [f"{key}: {there.get(key)!r} there, {identity.get(key)!r} asked" for key in differs]
    if wrong:
        raise UnsupportedError(f"{path.parent} holds another search; choose another folder, or delete that one:", wrong)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _queue_first(study: Any, space: Space, default: Method) -> None:
    """Queues the defaults as the first trial that ends. Where the space does not hold them, the trial has no parameters to learn from."""
    if _ended(study) or _is_queued(study):
        return
    options = default.options()
    is_outside = not all(holds(values, options[option], options) for option, values in space.items())
    stored = {} if is_outside else {option: stored_value(values, options[option], options) for option, values in space.items()}
    study.enqueue_trial(stored, user_attrs={"is_default": True, "is_outside": is_outside})


def _sampler(study: Any, seed: int) -> Any:
    """A sampler that knows nothing but the seed and the trials that ended, so that a kill changes nothing.

    optuna's GP needs SciPy, which nothing else here does; on spaces whose scales are right TPE found as much (§4.7's objective: 29.93 of 30).
    """
    import optuna

    with warnings.catch_warnings():
        # multivariate sampling is marked experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed * _SEEDS + len(_ended(study)), n_startup_trials=N_SPREAD, multivariate=True)


def _run_trial(study: Any, space: Space, default: Method, score: Callable[[dict[str, Any]], float]) -> None:
    """One trial. Options that the method or the model refuses count as failed; any other error ends the search."""
    import optuna

    trial = study.ask()
    try:
        if not trial.user_attrs.get("is_outside"):
            for option, values in space.items():
                suggest(trial, option, values)
        value = float(score(_options_of(trial, space, default)))
        if not math.isfinite(value):
            raise AccelError(f"the score is {value}")
    except AccelError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    except Exception:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    else:
        study.tell(trial, value)


def _finish(study: Any, space: Space, default: Method, identity: Mapping[str, Any], folder: Path) -> TuneResult:
    """Writes the outcome; AccelError where no trial succeeded."""
    done = _done(study)
    errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
    if not done:
        raise UnsupportedError(f"none of {len(study.trials)} trials of {identity['method']} succeeded:", sorted(set(errors)))
    best = study.best_trial
    method = replace(default, **_options_of(best, space, default))
    default_score = next((trial.value for trial in done if trial.user_attrs.get("is_default")), None)
    rows = [
        {
            "number": t.number, "state": t.state.name.lower(), "score": t.value, "options": _options_of(t, space, default),
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


def _options_of(trial: Any, space: Space, default: Method) -> dict[str, Any]:
    """The searched options of a trial. The first one's are exactly the defaults, whatever the study could store of them."""
    if trial.user_attrs.get("is_default"):
        return {option: default.options()[option] for option in space}
    return options_at(space, trial.params, default)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the study will give them back: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return plain


def _done(study: Any) -> list[Any]:
    import optuna

    return list(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _is_queued(study: Any) -> bool:
    import optuna

    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


def _ended(study: Any) -> list[Any]:
    """The trials that succeeded or were refused, without those that were cut short."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return [trial for trial in study.get_trials(deepcopy=False, states=states) if trial.value is not None or "error" in trial.user_attrs]


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Our progress bar instead of one log line per trial."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


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
