"""Offline calibration: a resumable search over a method's options.

Nothing here knows a method by name: `search_space()` says what may be tuned, `objectives()` what for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.protocols import Choice, Method, Objective, Uniform
from accel.recipe import Recipe
from accel.registry import build, method_class

Space = Mapping[str, Uniform | Choice]


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

    trials: how many must succeed. The first is the method with its defaults, so that the result is never worse than doing nothing.
    Every finished trial is on disk (`study.db`): the same call after a kill goes on, and repeats the trial that was cut short. One process
    per folder.
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
        study = _open_study(folder / "study.db", identity, objective, seed)
        _queue_first(study, space, default)
        attempts = trials - len(_done(study))
        with progress_bar(attempts, f"tune {name}", is_shown=show_progress) as advance:
            for _ in range(attempts):
                _run_trial(study, space, lambda options: objective.score(build(name, {**(fixed or {}), **options}), model, data))
                advance()
        return _finish(study, space, default, identity, folder)


def tunable_options(name: str) -> list[str]:
    """One line per option that `tune` may search, for people."""
    return [f"{option}: {_describe(values)}" for option, values in method_class(name).search_space().items()]


def objective_named(name: str, wanted: str | None) -> Objective:
    """The objective `wanted` of method `name`, or its only one; OptionError says what there is."""
    known = method_class(name).objectives()
    if not known:
        raise OptionError(f"{name} has no objective to tune for. `accel tune crossover` measures from which length a sparse method pays.")
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if wanted is None or wanted not in known:
        raise OptionError(f"{name} is tuned for one of: {', '.join(known)}; got {wanted!r}")
    return known[wanted]


# --- the search ---------------------------------------------------------------------------------------------------------------


def _open_study(path: Path, identity: Mapping[str, Any], objective: Objective, seed: int) -> Any:
    """The stored study, or a new one. Trials that a killed process left unfinished are failed and queued again."""
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
        study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number, **trial.user_attrs})
    # a resumed sampler must not draw its first numbers again
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _queue_first(study: Any, space: Space, default: Method) -> None:
    """Queues the defaults as the first trial of a new study, where the space holds them."""
    values = {option: getattr(default, option) for option in space}
    if not study.trials and all(_holds(space[option], value) for option, value in values.items()):
        stored = {option: _label(value) if isinstance(space[option], Choice) else value for option, value in values.items()}
        study.enqueue_trial(stored, user_attrs={"is_default": True})


def _run_trial(study: Any, space: Space, score: Callable[[dict[str, Any]], float]) -> None:
    """One trial. Options that the method or the model refuses count as failed; any other error ends the search."""
    import optuna

    trial = study.ask()
    try:
        options = {option: _suggest(trial, option, values) for option, values in space.items()}
        value = float(score(options))
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
    options = {option: _value(space[option], stored) for option, stored in best.params.items()}
    method = replace(default, **options)
    default_score = next((trial.value for trial in done if trial.user_attrs.get("is_default")), None)
    rows = [
        {"number": t.number, "state": t.state.name.lower(), "score": t.value, "options": t.params, "error": t.user_attrs.get("error")}
        for t in study.trials
    ]
    result = {"schema": 1, **identity, "score": best.value, "default_score": default_score, "trials": rows}
    (folder / "trials.json").write_text(json.dumps(result, indent=2, default=repr) + "\n", encoding="utf-8")
    note = f"accel tune: {identity['objective']} {best.value:.6g}, best of {len(done)} trials" + (
        f"; defaults {default_score:.6g}" if default_score is not None else ""
    )
    recipe = Recipe.of(method, note=note).save(folder / "recipe.yaml")
    return TuneResult(method, best.value, default_score, len(done), len(errors), recipe)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the study will give them back: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return plain


def _done(study: Any) -> list[Any]:
    import optuna

    return list(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _suggest(trial: Any, option: str, values: Uniform | Choice) -> Any:
    if isinstance(values, Choice):
        return _value(values, trial.suggest_categorical(option, [_label(value) for value in values.values]))
    if values.is_integer:
        return trial.suggest_int(option, int(values.low), int(values.high), log=values.is_log)
    return trial.suggest_float(option, values.low, values.high, log=values.is_log)


# optuna stores plain choices only; a label stands for tuples and the like
def _label(value: Any) -> str:
    return repr(value)


def _value(values: Uniform | Choice, stored: Any) -> Any:
    return next(value for value in values.values if _label(value) == stored) if isinstance(values, Choice) else stored


def _holds(values: Uniform | Choice, value: Any) -> bool:
    if isinstance(values, Choice):
        return value in values.values
    return isinstance(value, (int, float)) and values.low <= value <= values.high


def _describe(values: Uniform | Choice) -> str:
    if isinstance(values, Choice):
        return "one of " + ", ".join(map(repr, values.values))
    kind = (", whole numbers" if values.is_integer else "") + (", logarithmic" if values.is_log else "")
    return f"{values.low:g} to {values.high:g}{kind}"


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
