"""The stored study behind `accel tune`: trials that outlive a kill, the defaults first, and a sampler that knows nothing but seed and trials."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel.errors import NotFiniteError, OptionError, UnsupportedError
from accel.protocols import Method
from accel.tune.space import Space, holds, options_at, stored_value, suggest

# trials drawn at random before the sampler learns from them; the published search begins with 27 (visual-token-pruning.md §4.7)
N_SPREAD = 16
_SEEDS = 10_000     # trials of one search before the seeds of the next one begin


def open_study(path: Path, identity: Mapping[str, Any], directions: Sequence[str]) -> Any:
    """The stored study, or a new one. A trial that a killed process left unfinished is failed; its point is chosen again.

    directions: "maximize" or "minimize" for each value of a trial. identity: what the scores depend on; UnsupportedError for a study of another.
    """
    import optuna

    study = optuna.create_study(storage=f"sqlite:///{path}", study_name="accel", directions=list(directions), load_if_exists=True)
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


def queue_first(study: Any, space: Space, default: Method) -> None:
    """Queues the defaults as the first trial that ends. Where the space does not hold them, the trial has no parameters to learn from."""
    if ended(study) or _is_queued(study):
        return
    options = default.options()
    is_outside = not all(holds(values, options[option], options) for option, values in space.items())
    stored = {} if is_outside else {option: stored_value(values, options[option], options) for option, values in space.items()}
    study.enqueue_trial(stored, user_attrs={"is_default": True, "is_outside": is_outside})


def sampler(study: Any, seed: int) -> Any:
    """A sampler that knows nothing but the seed and the trials that ended, so that a kill changes nothing.

    On spaces whose scales are right TPE found as much as optuna's GP (§4.7's objective: 29.93 of 30), and it knows several objectives too.
    """
    import optuna

    with warnings.catch_warnings():
        # multivariate sampling is marked experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed * _SEEDS + len(ended(study)), n_startup_trials=N_SPREAD, multivariate=True)


def run_trial(study: Any, space: Space, default: Method, score: Callable[[dict[str, Any]], tuple[Sequence[float], Mapping[str, Any]]]) -> None:
    """One trial. Options that the method or the model refuses, or that give NaN, count as failed. Any other error, such as a full disk, ends the
    search.

    score(options) → a value per direction of the study, and plain values to keep with the trial.
    """
    import optuna

    trial = study.ask()
    try:
        if not trial.user_attrs.get("is_outside"):
            for option, values in space.items():
                suggest(trial, option, values)
        found, kept = score(options_of(trial, space, default))
        if wrong := [value for value in found if not math.isfinite(value)]:
            raise NotFiniteError(f"the score is {wrong[0]}")
        for name, value in kept.items():
            trial.set_user_attr(name, value)
    except (OptionError, UnsupportedError, NotFiniteError) as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    except Exception:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    else:
        study.tell(trial, list(found))


def options_of(trial: Any, space: Space, default: Method) -> dict[str, Any]:
    """The searched options of a trial. The first one's are exactly the defaults, whatever the study could store of them."""
    if trial.user_attrs.get("is_default"):
        return {option: default.options()[option] for option in space}
    return options_at(space, trial.params, default)


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the study will give them back: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return plain


def succeeded(study: Any) -> list[Any]:
    import optuna

    return list(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _is_queued(study: Any) -> bool:
    import optuna

    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


def ended(study: Any) -> list[Any]:
    """The trials that succeeded or were refused, without those that were cut short."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return [trial for trial in study.get_trials(deepcopy=False, states=states) if trial.values is not None or "error" in trial.user_attrs]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Our progress bar instead of one log line per trial."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
