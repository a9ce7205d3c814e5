"""`accel tune`: from which length a sparse method pays (`crossover`), a search over options, or making what a method needs. Writes a recipe."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import check_model, choose_dtype, load, merge_settings, print_settings, require_least, settle_threads
from accel.cli.options import add_machine_arguments, add_settings_arguments
from accel.errors import OptionError
from accel.tune.search import ACCURACY_AT_LATENCY

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel
    from accel.protocols import Calibration, Method
    from accel.tune.front import FrontResult

HELP = "calibration: from which length a method pays here, or its best options; writes a recipe"

CROSSOVER = "crossover"
DEFAULTS: dict[str, Any] = {
    "what": None, "model": "smollm2", "method": "flexprefill", "lengths": None, "objective": None, "data": None, "trials": None,
    "tasks": "needle,fewshot", "samples": 8, "margin": 0.02, "search": None,
    "dtype": "auto", "device": "cpu", "repeats": 5, "threads": None, "seed": 0, "out": None,
}  # fmt: skip
# settings that say nothing elsewhere
OF_CROSSOVER = ("method", "lengths", "repeats")
OF_SEARCH = ("objective", "trials")
OF_TRADE_OFF = ("tasks", "samples", "margin", "search")
# and that say nothing of a search on tasks
OF_OTHERS = ("method", "repeats", "data")
# prompt lengths of a crossover, and of a search on tasks
LENGTHS, TASK_LENGTHS = "1k,2k,4k,8k", "2k"
TRIALS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no default here: a flag that was not given must not override the settings file
    data = (
        "of a search or a training. For pruning: scenes, a folder of pictures, or a .jsonl with image, text (answer). For hack: classes, of a model "
        "that draws them; a .safetensors file of text features; needle or another text task, a .txt or a .jsonl, of a language model"
    )
    parser.add_argument("what", nargs="?", metavar="WHAT", help="crossover, or METHOD[:OPTION=VALUE,…] to search its other options or train it")
    parser.add_argument("--model", help="an embedded model, a folder, or a hub id (default: smollm2)")
    parser.add_argument("--method", metavar="NAME[:OPTION=VALUE,…]", help="crossover: the sparse method (default: flexprefill)")
    lengths = f"prompt lengths of a crossover (default: {LENGTHS}) or of {ACCURACY_AT_LATENCY} (default: {TASK_LENGTHS})"
    parser.add_argument("--lengths", help=lengths)
    parser.add_argument("--repeats", type=int, help="crossover: timed rounds over all variants in turn (default: 5)")
    objective = f"search: what to optimise (default: the method's only one); {ACCURACY_AT_LATENCY}: of any method, the fastest within a margin"
    parser.add_argument("--objective", help=objective)
    parser.add_argument("--tasks", help=f"{ACCURACY_AT_LATENCY}: tasks as for accel run (default: {DEFAULTS['tasks']})")
    parser.add_argument("--samples", type=int, help=f"{ACCURACY_AT_LATENCY}: prompts per task and length (default: {DEFAULTS['samples']})")
    parser.add_argument("--margin", type=float, help=f"{ACCURACY_AT_LATENCY}: score that may be lost against dense (default: {DEFAULTS['margin']})")
    searched = f"{ACCURACY_AT_LATENCY}: an option to search beyond the method's own, as keep=0.1..0.9 or mode=a|b; repeatable"
    parser.add_argument("--search", action="append", metavar="OPTION=LOW..HIGH", help=searched)
    parser.add_argument("--data", help=data)
    parser.add_argument("--trials", type=int, help=f"search: trials in all; the same call again goes on after a stop (default: {TRIALS})")
    add_machine_arguments(parser)
    parser.add_argument("--seed", type=int, help="of the prompt, the search or the training (default: 0)")
    parser.add_argument("--out", help="crossover: the recipe file; otherwise: the run folder (default: runs/tune-WHAT)")
    add_settings_arguments(parser)
    parser.epilog = (
        "examples:\n  accel tune crossover --model smollm2 --method flexprefill:min_budget=256 --lengths 1k,2k,4k,8k --out recipe.yaml\n"
        "  accel tune vflowopt:keep=0.25 --model small-vlm --data scenes --trials 60\n  accel tune dyvte --model small-vlm --data scenes\n"
        "  accel tune hack:keep=0.3 --model small-var --data classes\n"
        f"  accel tune flexprefill:min_seq_len=0 --objective {ACCURACY_AT_LATENCY} --tasks needle,fewshot --lengths 1k,2k --samples 8 --trials 40\n"
        f"  accel tune fastervlm --objective {ACCURACY_AT_LATENCY} --model small-vlm --tasks scenes --samples 50 --search keep=0.1..0.9"
    )


def main(args: argparse.Namespace) -> int:
    """Lists what can be tuned, or measures and writes a recipe. 0 when that was done."""
    settings = merge_settings(args, DEFAULTS, ("samples", "trials"))
    what, is_trade_off = settings["what"], settings["objective"] == ACCURACY_AT_LATENCY
    if settings["objective"] is not None and not is_trade_off:
        _require_objective(settings["objective"])
    settings["lengths"] = settings["lengths"] or (TASK_LENGTHS if is_trade_off else LENGTHS)
    if not is_trade_off and (given := [f"--{name}" for name in OF_TRADE_OFF if getattr(args, name) is not None]):
        raise OptionError(f"{' and '.join(given)} belong to --objective {ACCURACY_AT_LATENCY}")
    if is_trade_off and (given := [f"--{name}" for name in OF_OTHERS if getattr(args, name) is not None]):
        raise OptionError(f"{' and '.join(given)} say nothing of {ACCURACY_AT_LATENCY}: it runs METHOD on --tasks, each prompt once")
    if what is None and not args.dry_run:
        return _list_all()
    require_least(settings, repeats=1, samples=1, trials=1)
    check_model(settings["model"])
    settle_threads(settings["threads"])
    if what is None or what == CROSSOVER:
        if args.dry_run:
            print_settings({key: value for key, value in settings.items() if what is None or key not in (*OF_SEARCH, *OF_TRADE_OFF, "data")})
            return 0
        return _crossover(settings)
    from accel.cli.options import parse_method

    if difflib.get_close_matches(what, [CROSSOVER]):
        raise OptionError(f"there is nothing to tune that is called {what!r}; did you mean {CROSSOVER!r}?")
    method = parse_method(what)
    if is_trade_off:
        if args.dry_run:
            print_settings({key: value for key, value in settings.items() if key not in OF_OTHERS})
            return 0
        return _trade_off(method, _given(what, method), settings)
    calibration, asked = type(method).calibration(), [f"--{name}" for name in OF_SEARCH if settings[name] is not None]
    if calibration is not None and asked:
        _require_search(method, calibration, what, asked)
    is_calibration = calibration is not None and not asked
    if args.dry_run:
        print_settings({key: value for key, value in settings.items() if key not in OF_CROSSOVER + OF_TRADE_OFF + OF_SEARCH * is_calibration})
        return 0
    if settings["data"] is None and not asked:
        return _list_one(method.method_name())
    if calibration is not None and is_calibration:
        return _calibrate(method, calibration, _given(what, method), settings)
    return _search(method, _given(what, method), settings)


def _require_objective(wanted: str) -> None:
    """Raises OptionError for what is an objective of no method."""
    from accel.registry import did_you_mean, method_class, method_names

    known = list(dict.fromkeys([ACCURACY_AT_LATENCY, *(name for method in method_names() for name in method_class(method).objectives())]))
    if wanted not in known:
        raise OptionError(f"there is no objective {wanted!r}{did_you_mean(wanted, known)} There are: {', '.join(known)}")


def _require_search(method: Method, calibration: Calibration, what: str, asked: Sequence[str]) -> None:
    """Raises OptionError where a search was asked for, by these flags, of a method that has none beside what it can be made."""
    cls = type(method)
    if cls.search_space() and cls.objectives():
        return
    lacks = "has nothing to tune by a search" if not cls.search_space() else "has no objective to search for"
    raise OptionError(
        f"{method.method_name()} {lacks}, which {' and '.join(asked)} asked for. Without, `accel tune {what} --model … --data …` makes "
        f"{calibration.about}"
    )


def _list_all() -> int:
    from accel.registry import method_names

    print("crossover: from which length a sparse-attention method is faster than the best dense attention on this machine")
    print(f"--objective {ACCURACY_AT_LATENCY}: of any method here with options to search, the fastest on tasks within a margin of dense's score\n")
    for name in method_names():
        _list_one(name)
    return 0


def _list_one(name: str) -> int:
    """The options of one method that can be searched, and what for."""
    from accel.registry import method_class
    from accel.tune.search import crossover_hint, tunable_options

    options, objectives, calibration = tunable_options(name), list(method_class(name).objectives()), method_class(name).calibration()
    print("\n".join([f"{name}: {'options to search' if options else 'nothing to search'}", *(f"  {line}" for line in options)]))
    if options:
        print(f"  objectives: {', '.join(objectives) or '; '.join(['none yet', *filter(None, [crossover_hint(name)])])}")
    if calibration is not None:
        print(f"  makes {calibration.about}")
    return 0


def _crossover(settings: Mapping[str, Any]) -> int:
    """Measures, prints the table, writes the recipe and this machine's crossover file."""
    from accel.cli.options import parse_lengths, parse_method
    from accel.crossover import DEFAULT_TOKENS, NEVER_TOKENS, crossover_key, record_crossover
    from accel.patching import host_for
    from accel.protocols import SparseAttention
    from accel.tune.crossover import crossover_recipe, measure_crossover

    method = parse_method(settings["method"])
    if not isinstance(method, SparseAttention):
        raise OptionError(f"a crossover is measured for sparse attention; {method.method_name()} is of kind {method.kind}")
    lengths = parse_lengths(settings["lengths"])
    path = _new_file(settings["out"] or f"runs/crossover-{method.method_name()}.yaml")
    _warn_if_busy()
    loaded = _load(settings)
    info = host_for(loaded.model).describe(loaded.model)
    times = measure_crossover(loaded.model, _prompt(loaded, max(lengths), settings["seed"]), method, lengths, repeats=settings["repeats"])
    _print_times(times)
    recipe = crossover_recipe(method, times, where=f"{loaded.name}, {info.device}, {info.dtype}")
    print(recipe.note)
    print(f"wrote {recipe.save(path)}")
    tokens = recipe.methods[0].options()["min_seq_len"]
    key = crossover_key(method, device=info.device, dtype=info.dtype, head_dim=info.head_dim)
    # beyond the longest prompt nothing was measured: the other models of this machine must not stay dense for ever
    recorded = max(lengths[-1] + 1, DEFAULT_TOKENS.get(info.device, 0)) if tokens == NEVER_TOKENS else tokens
    file = record_crossover(key, recorded)
    name = f"{method.method_name()} with these options and min_seq_len=None"
    if tokens == NEVER_TOKENS:
        print(f"recorded {key}: {recorded} tokens in {file}, although nothing was measured beyond {lengths[-1]}: {name} stays dense below it")
    else:
        print(f"recorded {key}: {recorded} tokens in {file}; {name} runs sparse from there on")
    return 0


def _given(text: str, method: Method) -> dict[str, Any]:
    """The options that stand in `vflowopt:keep=0.25,alpha=0`, also those that are given their default."""
    names = re.findall(r"(?:^|,)\s*(\w+)\s*=", text.partition(":")[2])
    return {name: value for name, value in method.options().items() if name in names}


def _search(method: Method, given: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Runs or resumes a search. Options given with the method's name stay as they are."""
    from accel.tune.search import objective_named, tune

    name, data = method.method_name(), settings["data"]
    objective = objective_named(name, settings["objective"])
    loaded = _load(settings)
    about = {"model": loaded.name, "dtype": str(loaded.model.dtype), "data": str(data)}
    if objective.prepare is not None:
        data = objective.prepare(loaded, data, settings["seed"])
        about["samples"] = str(data)
    trials = TRIALS if settings["trials"] is None else settings["trials"]
    result = tune(
        name, objective, model=loaded.model, data=data, trials=trials, fixed=given, about=about, seed=settings["seed"],
        folder=Path(settings["out"] or f"runs/tune-{name}"),
    )  # fmt: skip
    default = "outside the search" if result.default_score is None else f"{result.default_score:.6g}"
    print(f"{objective.name}: {result.score:.6g} (defaults: {default}); {result.n_done} trials, {result.n_failed} failed")
    print(f"wrote {result.recipe}")
    return 0


def _trade_off(method: Method, given: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Runs or resumes a search for accuracy against latency, and reports it. 1 where none came within the margin, or dense answers nothing."""
    from accel.cli.measuring import describe_run, finish_run
    from accel.cli.options import parse_lengths, split_items
    from accel.evals.report.page import require_packages
    from accel.evals.runner import check_run
    from accel.evals.tasks import expand_names, load_task
    from accel.evals.trade_off import TRIED, TradeOff, require_answers, tuning_result
    from accel.tune.front import check_margin, parse_search, search_space, tune_front

    require_packages()
    name, tasks, lengths = method.method_name(), expand_names(split_items(settings["tasks"])), parse_lengths(settings["lengths"])
    added = parse_search(split_items(settings["search"]) if settings["search"] else [])
    search_space(name, given, added)
    check_margin(settings["margin"])
    if not tasks:
        raise OptionError("--tasks names no task; name one or more, such as needle,fewshot")
    require_answers(tasks)
    folder = Path(settings["out"] or f"runs/tune-{name}")
    loaded = _load(settings)
    check_run(loaded, {TRIED: [method]}, tasks, lengths, settings["samples"])
    measure = TradeOff(loaded, tasks, lengths, settings["samples"], settings["seed"], folder / "samples")
    has_text = any(load_task(task).kind == "text" for task in tasks)
    about = {"model": loaded.name, "dtype": str(loaded.model.dtype), "device": settings["device"], "tasks": ", ".join(tasks),
             **({"lengths": ", ".join(map(str, lengths))} if has_text else {}), "samples": str(settings["samples"]),
             "seed": str(settings["seed"])}  # fmt: skip
    found = tune_front(
        name, measure, trials=TRIALS if settings["trials"] is None else settings["trials"], folder=folder, margin=settings["margin"], fixed=given,
        added=added, about=about, seed=settings["seed"],
    )  # fmt: skip
    _, reason = choose_dtype(settings["dtype"], settings["device"])
    said = {key: value for key, value in settings.items() if key not in OF_OTHERS}
    head = describe_run("tune", f"{settings['what']}: accuracy against latency", loaded, said, dtype_reason=reason)
    result = tuning_result(found, margin=settings["margin"], tasks=tasks)
    _print_trials(result)
    print("\n".join([_chosen(found, settings["margin"]), *result["notices"]]))
    print(f"wrote {found.recipe}")
    finish_run(folder, {**head, **result})
    return 0 if found.within_margin and found.has_basis else 1


def _print_trials(result: Mapping[str, Any]) -> None:
    from accel.cli.table import print_table
    from accel.evals.report.trials import trial_table

    table = trial_table(result["trials"])
    print_table(table.headers, table.rows, title="Trials, the fastest first", text_columns=table.text_columns)


def _chosen(found: FrontResult, margin: float) -> str:
    reached = found.measured
    line = f"score {reached.score:.3f} (dense {reached.dense_score:.3f}) in {reached.time_share:.2f} of dense's prefill time"
    if not found.has_basis:
        return f"chosen: {line}, the fastest of {len(found.rows)} trials"
    if found.within_margin:
        return f"chosen: {line}, the fastest of {len(found.rows)} trials within {margin:g} of dense"
    return f"chosen: {line}, the highest score of {len(found.rows)} trials"


def _calibrate(method: Method, calibration: Calibration, given: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Makes what the method needs beyond its options, or goes on where that was stopped. Options given with the method's name stay as they are."""
    from accel.recipe import Recipe

    folder = Path(settings["out"] or f"runs/tune-{method.method_name()}")
    loaded = _load(settings)
    made = calibration.run(loaded, settings["data"], folder, fixed=given, seed=settings["seed"])
    recipe = folder / "recipe.yaml"
    print(Recipe.load(recipe).note)
    print(f"wrote {recipe}, and beside it the {calibration.name} of {made.method_name()}")
    return 0


def _load(settings: Mapping[str, Any]) -> LoadedModel:
    return load(settings, *choose_dtype(settings["dtype"], settings["device"]))


def _prompt(loaded: LoadedModel, n_tokens: int, seed: int) -> Any:
    """Ids (1, n_tokens) of real text, as `accel bench` uses it: what a method selects depends on it."""
    import torch

    from accel.evals.tasks import load_text_task

    if loaded.max_positions is not None and n_tokens > loaded.max_positions:
        raise OptionError(f"{loaded.name} has {loaded.max_positions} positions, asked for {n_tokens} tokens; pass --lengths up to that")
    sample = load_text_task("needle").samples(loaded.tokenizer, n_tokens, 1, seed)[0]
    return torch.tensor([sample.input_ids], device=loaded.model.device)


def _new_file(name: str) -> Path:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise OptionError(f"--out must be a .yaml or .json file, got {name}")
    if path.exists():
        raise OptionError(f"{path} exists already: choose another with --out")
    return path


def _warn_if_busy() -> None:
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.5 * cores:
        print(f"other processes keep this machine busy (load {busy:.1f} on {cores} cores); measure again when it is quiet", file=sys.stderr)


def _print_times(times: list[Any]) -> None:
    from accel.cli.table import print_table

    labels = list(times[0].ms)
    headers = ["tokens", *(f"{label} ms" for label in labels), *(f"× {base}" for base in times[0].speedup), "× best dense"]
    rows = [
        [str(row.tokens), *(f"{row.ms[label]:.0f}" for label in labels), *(f"{x:.2f}" for x in row.speedup.values()), f"{row.against_best_dense:.2f}"]
        for row in times
    ]
    print_table(headers, rows, title="Time to first token, sparse from the first token on", text_columns=())
