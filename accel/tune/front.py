"""A resumable search over a method's options for accuracy against latency: the Pareto front of what was tried, and one method chosen from it.

Two values are optimised at once: the score, to be large, and the time as a share of dense's on the same prompts, to be small. The chosen method is
the fastest whose score is at most `margin` below dense's; the front holds what else could have been chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accel.errors import OptionError, UnsupportedError
from accel.evals.summary.fronts import on_front
from accel.protocols import Choice, Method, Uniform
from accel.recipe import Recipe
from accel.registry import build, did_you_mean, method_class
from accel.tune.search import ACCURACY_AT_LATENCY, progress_bar
from accel.tune.space import Space
from accel.tune.study import as_json, ended, open_study, options_of, queue_first, quiet_optuna, run_trial, sampler, succeeded


@dataclass(frozen=True)
class Measured:
    """One method on the prompts of a search. score, dense_score: means over tasks and lengths. stderr: of the score, None where there is none.

    time_share: its time as a share of dense's, on the same prompts in turn; below 1 is faster.
    """

    score: float
    dense_score: float
    time_share: float
    stderr: float | None = None


@dataclass(frozen=True)
class FrontResult:
    """Outcome of a search. within_margin: whether the chosen method is; if none was, the one with the highest score is chosen.

    rows: the trials that succeeded, in order: number, options, the fields of `Measured`, is_default, is_front, is_chosen.
    """

    best: Method
    measured: Measured
    within_margin: bool
    rows: list[dict[str, Any]]
    n_failed: int
    recipe: Path

    @property
    def has_basis(self) -> bool:
        """Whether dense answers anything: otherwise nothing can be lost, and every trial is within the margin."""
        return self.measured.dense_score > 0


def tune_front(
    name: str, measure: Callable[[Method], Measured], *, trials: int, folder: Path, margin: float, fixed: Mapping[str, Any] | None = None,
    added: Mapping[str, Uniform | Choice] | None = None, about: Mapping[str, str] | None = None, seed: int = 0, show_progress: bool = True,
) -> FrontResult:  # fmt: skip
    """Searches the options of method `name`; writes `recipe.yaml` and `trials.json` to `folder`.

    measure: the method → what it reached; AccelError for options that do not work. trials: how many are run, failed ones included; the first is the
    method with its defaults, as in `tune`, and the same call after a kill goes on. fixed: options that are given, not searched. added: options to be
    searched beyond the method's own space, or within other limits. about: what the results depend on. The margin may differ when a search goes on.
    """
    if trials < 1:
        raise OptionError(f"trials must be at least 1, got {trials}")
    check_margin(margin)
    space = search_space(name, fixed or {}, added or {})
    default = build(name, dict(fixed or {}))
    folder.mkdir(parents=True, exist_ok=True)
    identity = as_json({"method": name, "objective": ACCURACY_AT_LATENCY, "fixed": fixed or {}, "space": repr(space), **(about or {})})

    def score(options: Mapping[str, Any]) -> tuple[Sequence[float], Mapping[str, Any]]:
        found = measure(replace(default, **options))
        return (found.score, found.time_share), {"measured": asdict(found)}

    with quiet_optuna():
        study = open_study(folder / "study.db", identity, ["maximize", "minimize"])
        queue_first(study, space, default)
        attempts = max(0, trials - len(ended(study)))
        with progress_bar(attempts, f"tune {name}", is_shown=show_progress) as advance:
            for _ in range(attempts):
                study.sampler = sampler(study, seed)
                run_trial(study, space, default, score)
                rows = front_of(study, space, default, margin)
                advance(_so_far(rows))
        return _finish(study, space, default, margin, identity, folder)


def check_margin(margin: float) -> None:
    """Raises OptionError for what is no part of a score."""
    if not 0 <= margin <= 1:
        raise OptionError(f"the margin is what may be lost of the score, between 0 and 1; got {margin}")


def search_space(name: str, fixed: Mapping[str, Any], added: Mapping[str, Uniform | Choice]) -> dict[str, Uniform | Choice]:
    """The options to be searched. Those that were asked for come first, since the limits of others may depend on them. OptionError for none."""
    known = build(name).options()
    for option in added:
        if option not in known:
            raise OptionError(f"{name} has no option {option!r} to search{did_you_mean(option, list(known))} It has: {', '.join(known)}")
        if option in fixed:
            raise OptionError(f"{name}: {option} is given as {fixed[option]!r} and cannot be searched as well")
    own = {option: values for option, values in method_class(name).search_space().items() if option not in fixed and option not in added}
    if not added and not own:
        raise OptionError(f"{name} has nothing to tune; name an option and its limits with --search, such as --search keep=0.1..0.9")
    return {**added, **own}


def parse_search(given: Sequence[str]) -> dict[str, Uniform | Choice]:
    """Options to be searched, from `["keep=0.1..0.9", "window=16..128", "mode=a|b"]`: a range (whole numbers where both ends are), or choices."""
    return dict(map(_searched, given))


def _searched(text: str) -> tuple[str, Uniform | Choice]:
    import yaml

    option, _, values = (part.strip() for part in text.partition("="))
    low, dots, high = values.partition("..")
    first, last = _number(low), _number(high)
    if option and dots and first is not None and last is not None and first < last:
        return option, Uniform(first, last, is_integer=isinstance(first, int) and isinstance(last, int))
    if option and not dots and "|" in values:
        try:
            return option, Choice(tuple(yaml.safe_load(value) for value in values.split("|")))
        except yaml.YAMLError as error:
            raise OptionError(f"--search {text}: cannot read one of the values of {option}") from error
    raise OptionError(f"--search takes OPTION=LOW..HIGH or OPTION=A|B, such as keep=0.1..0.9; got {text!r}")


def _number(word: str) -> int | float | None:
    """The finite number that a word is; None for any other word."""
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None


def front_of(study: Any, space: Space, default: Method, margin: float) -> list[dict[str, Any]]:
    """The trials that succeeded as `FrontResult.rows`."""
    rows = [
        {"number": t.number, "options": options_of(t, space, default), **t.user_attrs["measured"], "is_default": bool(t.user_attrs.get("is_default"))}
        for t in succeeded(study)
    ]
    chosen = choose(rows, margin)
    front = on_front([row["score"] for row in rows], [row["time_share"] for row in rows])
    return [{**row, "is_front": is_best, "is_chosen": row is chosen} for row, is_best in zip(rows, front, strict=True)]


def choose(rows: Sequence[Mapping[str, Any]], margin: float) -> Mapping[str, Any] | None:
    """The fastest row whose score is at most `margin` below dense's, of equally fast ones the best; without any, the one with the highest score."""
    fit = [row for row in rows if is_within(row, margin)]
    if fit:
        return min(fit, key=lambda row: (row["time_share"], -row["score"]))
    return max(rows, key=lambda row: (row["score"], -row["time_share"]), default=None)


def is_within(row: Mapping[str, Any], margin: float) -> bool:
    # a loss that is the margin but for rounding is within it
    return bool(row["dense_score"] - row["score"] <= margin + 1e-9)


def _so_far(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = next((row for row in rows if row["is_chosen"]), None)
    return "none succeeded yet" if chosen is None else f"score {chosen['score']:.3f} at {chosen['time_share']:.2f} of dense's time"


def _finish(study: Any, space: Space, default: Method, margin: float, identity: Mapping[str, Any], folder: Path) -> FrontResult:
    """Writes the outcome; UnsupportedError where no trial succeeded."""
    errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
    rows = front_of(study, space, default, margin)
    if not rows:
        raise UnsupportedError(f"none of {len(study.trials)} trials of {identity['method']} succeeded:", sorted(set(errors)))
    chosen = next(row for row in rows if row["is_chosen"])
    method = replace(default, **chosen["options"])
    measured = Measured(**{key: chosen[key] for key in ("score", "dense_score", "time_share", "stderr")})
    failed = [{"number": t.number, "options": options_of(t, space, default), "error": t.user_attrs["error"]}
              for t in study.trials if "error" in t.user_attrs]  # fmt: skip
    written = {"schema": 1, **identity, "margin": margin, "within_margin": is_within(chosen, margin), "trials": rows, "failed": failed}
    (folder / "trials.json").write_text(json.dumps(written, indent=2, default=repr) + "\n", encoding="utf-8")
    recipe = Recipe.of(method, note=_note(measured, margin, rows, identity)).save(folder / "recipe.yaml")
    return FrontResult(method, measured, is_within(chosen, margin), rows, len(errors), recipe)


def _note(measured: Measured, margin: float, rows: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]) -> str:
    rule = "the fastest of" if is_within(asdict(measured), margin) else "none was within the margin, this has the highest score of"
    if measured.dense_score <= 0:
        rule = f"dense answers nothing, so that accuracy chose nothing: {rule}"
    known = {"method", "objective", "fixed", "space"}
    where = ", ".join(f"{key} {value}" for key, value in identity.items() if key not in known)
    return (
        f"accel tune: {ACCURACY_AT_LATENCY}: score {measured.score:.3f} (dense {measured.dense_score:.3f}, margin {margin:g}) in "
        f"{measured.time_share:.2f} of dense's time; {rule} {len(rows)} trials{f' ({where})' if where else ''}"
    )
