"""`accel run`: accuracy of methods beside dense and controls of equal budget, on tasks made by code: text prompts, or pictures with a question."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import (
    check_model,
    choose_dtype,
    describe_run,
    free_folder,
    merge_settings,
    print_settings,
    require_least,
    settle_threads,
)
from accel.cli.options import (
    add_machine_arguments,
    add_method_argument,
    add_settings_arguments,
    by_content,
    parse_keeps,
    parse_lengths,
    read_variants,
    split_items,
)
from accel.cli.run_result import finish, go_on
from accel.errors import AccelError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel
    from accel.evals.parallel import Team
    from accel.evals.results import RunFolder
    from accel.protocols import Method

HELP = "accuracy of methods on text or pictures, beside dense and controls of equal budget; can be resumed"

# what runs beside methods of each kind
CONTROLS = {"sparse_attention": "streaming,random_blocks", "token_pruning": "random_tokens,uniform_tokens,downsample",
            "kv_compression": "random_kv,streaming_kv"}  # fmt: skip
# by kind of task: which model runs where none was named
MODELS = {"text": "smollm2", "picture": "small-vlm", "class": "small-var"}
# asked about pictures, where nothing else was named
PRUNING, PICTURES = "fastervlm", 50
# offered where a model draws
COMPRESSION = "h2o"
DEFAULTS: dict[str, Any] = {
    "model": None, "method": None, "recipe": None, "tasks": "needle,fewshot", "lengths": "4k", "samples": None, "controls": None, "keeps": None,
    "shared_prefill": None, "seed": 0, "dtype": "auto", "device": "cpu", "threads": None, "out": None, "resume": None, "limit": None,
    "batch_size": 1, "warmup": 1,
}  # fmt: skip
WHOLE = ("samples", "threads", "limit")
# settings that a run folder keeps
KEPT = ("model", "device", "seed", "samples", "dtype", "tasks", "lengths", "controls", "keeps", "shared_prefill", "threads", "batch_size", "warmup")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no default here: a flag that was not given must not override the settings file
    usual = f"{MODELS['text']}, {MODELS['picture']} for questions about pictures, {MODELS['class']} for pictures to be drawn"
    parser.add_argument("--model", help=f"an embedded model, a folder, or a hub id (default: {usual})")
    default = f"the model's recipe, or flexprefill, or {PRUNING} on pictures; none where pictures are drawn"
    add_method_argument(parser, f"repeatable (default: {default})")
    parser.add_argument("--recipe", help="a recipe file, measured as one more variant")
    names = ", ".join(_task_files())
    groups = "task names, ruler, infinitebench, scenes (questions about pictures), all (all text tasks), or data:FILE (prompts of your own)"
    parser.add_argument("--tasks", help=f"{groups}; {names} (default: {DEFAULTS['tasks']})")
    parser.add_argument("--lengths", help="lengths of text prompts in tokens, such as 2k,4k (default: 4k)")
    usual = f"1, or {PICTURES} pictures, or all rows of data:FILE where nothing else is asked"
    parser.add_argument("--samples", type=int, help=f"prompts per task and length, or pictures per task (default: {usual})")
    usual = " or ".join(CONTROLS.values())
    parser.add_argument("--controls", help=f"methods to run at the budget of those asked for; none (default: {usual}, by kind)")
    swept = "run each method that prunes tokens or compresses the cache once per share or count of visual tokens or cache entries"
    parser.add_argument("--keeps", help=f"{swept}, such as 1.0,0.5,0.25,0.1,0.05")
    shared = "prefill each text prompt once for all that drop cache entries, where they need no more than its last queries"
    parser.add_argument("--shared-prefill", action="store_const", const=True, help=shared)
    parser.add_argument("--seed", type=int, help="of the prompts (default: 0)")
    add_machine_arguments(parser)
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-run)")
    more = "finished samples stay, and --samples may ask for more of them, but not for fewer"
    parser.add_argument("--resume", action="store_const", const=True, help=f"go on with the run in --out by its own settings; {more}")
    parser.add_argument("--limit", type=int, help="stop after so many new samples; the exit code is 1 while some are missing")
    together = "text prompts read together, padded; scores stay those of single prompts, times are of the batch (default: 1)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=together)
    warm = "untimed passes before the first sample of each label and length, with a reply and without; they tell peak memory on a CPU (default: 1)"
    parser.add_argument("--warmup", type=int, help=warm)
    add_settings_arguments(parser, ", or the config.yaml of a run, which is then run again in --out, sample for sample")
    parser.epilog = (
        "several GPUs, or with --device cpu several processes on CPUs, share out the prompts of one run:\n"
        "  accelerate launch --multi_gpu --num_processes 4 -m accel run --device cuda --tasks ruler --out runs/a\n"
        "examples:\n  accel run --model smollm2 --method flexprefill:gamma=0.9,min_budget=256,min_seq_len=0 --tasks needle --lengths 2k\n"
        "  accel run --model small-vlm --method fastervlm --tasks scenes --keeps 0.5,0.25,0.1 --samples 100\n"
        "  accel run --model smollm2 --method snapkv --tasks key_value,needle --lengths 2k --keeps 0.5,0.3,0.1 --samples 10\n"
        f"  accel run --model small-var --method {COMPRESSION} --tasks images --keeps 0.7,0.5,0.3,0.1 --samples 200"
    )


def main(args: argparse.Namespace) -> int:
    """Runs what is missing, prints the table and writes the run folder. 0 when every sample asked for is there, 1 when the limit came first."""
    args, earlier = _with_recorded(args)
    settings = merge_settings(args, DEFAULTS, WHOLE)
    if settings["resume"] and not settings["out"]:
        raise OptionError("--resume needs the folder of the run: give it with --out")
    if settings["resume"]:
        earlier = _earlier(Path(settings["out"]))
    if settings["resume"] and not earlier:
        raise OptionError(f"there is no run in {settings['out']} to go on with; without --resume a new one begins there")
    settings = merge_settings(args, {**DEFAULTS, **{key: earlier[key] for key in KEPT if key in earlier}}, WHOLE)
    require_least(settings, limit=1, samples=1, batch_size=1, warmup=0)
    settle_threads(settings["threads"])
    from accel.evals.tasks import expand_names, load_task

    tasks, lengths = expand_names(split_items(settings["tasks"])), parse_lengths(settings["lengths"])
    if not tasks:
        raise OptionError(f"--tasks names no task; name one or more, such as {DEFAULTS['tasks']}")
    kinds = {load_task(task).kind for task in tasks}
    is_about_pictures, is_drawing = kinds == {"picture"}, kinds == {"class"}
    if settings["model"] is None:
        # tasks of several kinds have no model of their own: the usual one refuses them, and says why
        settings["model"] = MODELS[kinds.pop() if len(kinds) == 1 else "text"]
        if settings["model"] != MODELS["text"] and _is_first():
            print(f"no --model was given: taking {settings['model']}, which can run {', '.join(tasks)}", file=sys.stderr)
    check_model(settings["model"])
    if settings["samples"] is None:
        settings["samples"] = PICTURES if is_about_pictures or is_drawing else _usual_samples(tasks)
    variants = _variants(settings, earlier, usual=PRUNING if is_about_pictures else None, is_drawing=is_drawing)
    controls = _controls(settings["controls"], variants)
    if args.dry_run:
        print_settings(settings)
        return 0
    return _run(settings, _Asked(variants, list(tasks), lengths, controls), earlier)


def _usual_samples(tasks: Sequence[str]) -> int:
    """Samples of text tasks where nobody gave a number: all rows of one's own data, of several files as many as each has; beside other tasks, 1."""
    from accel.evals.tasks import own_rows

    rows = [own_rows(task) for task in tasks]
    return min((n or 1 for n in rows), default=1)


def _own_data_notices(tasks: Sequence[str], lengths: Sequence[int], n: int) -> list[str]:
    """What a reader must know of one's own data: rows that were left out, and lengths that change no prompt."""
    from accel.evals.tasks import own_rows

    rows = {task: found for task in tasks if (found := own_rows(task))}
    notices = [f"{task}: {n} of {found} rows used; --samples says how many." for task, found in rows.items() if n < found]
    if rows and len(lengths) > 1:
        notices.append(f"{', '.join(rows)}: the prompts of all lengths are the same; a length is only the room that they have.")
    return notices


def _with_recorded(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments without a --config that is the config.yaml of a run, and what that file says; the same arguments and nothing for all others."""
    if args.config and Path(args.config).is_dir():
        recorded = Path(args.config) / "config.yaml"
        raise OptionError(f"--config is a file, and {args.config} a folder" + (f"; did you mean {recorded}?" if recorded.exists() else ""))
    if not args.config or Path(args.config).name != "config.yaml":
        return args, {}
    import yaml

    try:
        found = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        # told where settings are merged
        return args, {}
    if not isinstance(found, dict) or found.get("command") != "run":
        return args, {}
    if args.resume:
        raise OptionError(f"--resume goes by the settings in --out, and {args.config} are those of a run: give one of the two")
    return argparse.Namespace(**{**vars(args), "config": None}), found


def _is_first() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def _earlier(path: Path) -> dict[str, Any]:
    """The settings of the run in this folder; empty where there is none yet."""
    import yaml

    file = path / "config.yaml"
    if not file.exists():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"cannot read the settings in {file}: {error}") from error
    if not isinstance(found, dict) or found.get("command", "run") != "run":
        raise OptionError(f"{path} holds no run that can be resumed: its config.yaml is not one of `accel run`")
    return found


def _variants(settings: dict[str, Any], earlier: Mapping[str, Any], *, usual: str | None, is_drawing: bool) -> dict[str, list[Method]]:
    """Methods by label, once for each of the keeps: those named, else those of the run that is resumed, else the usual ones.

    Where a model draws there are no usual ones: it runs dense then.
    """
    from accel.evals.controls import swept
    from accel.evals.models import embedded_recipe
    from accel.registry import build

    is_named = bool(settings["method"] or settings["recipe"])
    if not is_named and earlier.get("methods"):
        groups = earlier["methods"].items()
        variants = {label: [build(name, options) for entry in group for name, options in entry.items()] for label, group in groups}
        if settings["keeps"] == earlier.get("keeps"):
            # they are in these methods already
            return variants
    elif is_drawing and not is_named:
        variants = {}
    else:
        if usual and not is_named and embedded_recipe(settings["model"]) is None:
            settings["method"] = [usual]
        variants = read_variants(settings)
    if not settings["keeps"]:
        return variants
    keeps = parse_keeps(settings["keeps"])
    try:
        return swept(variants, keeps)
    except OptionError as error:
        raise OptionError(f"{error}: add one, such as --method {COMPRESSION if is_drawing else PRUNING}") from error


@dataclass(frozen=True)
class _Asked:
    """What is measured: methods by label, names of tasks, lengths of text prompts in tokens, names of controls."""

    variants: dict[str, list[Method]]
    tasks: list[str]
    lengths: list[int]
    controls: list[str]


def _run(settings: Mapping[str, Any], asked: _Asked, earlier: Mapping[str, Any]) -> int:
    """Measures what is missing, shared out among the processes of a launcher; the first of them puts it together and reports."""
    from accel.evals.parallel import join_team, launcher_trap
    from accel.evals.report.page import require_packages
    from accel.evals.runner import run_accuracy

    require_packages("scipy")
    team = join_team(settings["device"])
    tell = _Teller(team.is_main)
    if trap := launcher_trap():
        tell(f"accel: {trap}")
    device = team.device(settings["device"])
    dtype, reason = choose_dtype(settings["dtype"], device)
    if dtype == earlier.get("dtype"):
        reason = "as the run's config.yaml says"
    config = _config(asked, settings, dtype=dtype)
    # what is wrong without the model is told before it is loaded, and what is wrong with it before a folder is made
    path = _agreed_folder(settings, config, earlier, team, tell)
    _check_without_model(settings, asked)
    tell(f"results: {path}; loading {settings['model']} in {dtype} ({reason})")
    loaded, notices = _load(settings, asked, dtype, device, tell)
    folder, changes = _open_folder(path, config, team, loaded, resume=bool(settings["resume"]))
    with _saying_what_is_saved(folder, tell):
        run_accuracy(
            loaded, asked.variants, asked.tasks, asked.lengths, n=settings["samples"], seed=settings["seed"], folder=folder, controls=asked.controls,
            limit=settings["limit"], shares_prefill=bool(settings["shared_prefill"]), batch_size=settings["batch_size"], warmup=settings["warmup"],
            team=team,
        )  # fmt: skip
        team.wait()
        team.leave()
        if not team.is_main:
            return 0
        notices += [*changes, *_time_notices(team.size, settings["batch_size"], device)]
        return _finish(loaded, folder, asked, settings, notices, dtype_reason=reason)


def _agreed_folder(settings: Mapping[str, Any], config: Mapping[str, Any], earlier: Mapping[str, Any], team: Team, tell: _Teller) -> Path:
    """The folder that all processes write to; OptionError or AccelError where it holds what this run cannot go on with."""
    from accel.evals.results import LOCK, MACHINE, SAMPLES, RunFolder

    resume = bool(settings["resume"])
    changes = _changes(earlier, config, settings)
    if settings["out"]:
        RunFolder.check(settings["out"], config, resume=resume)
    tell(changes)
    may_hold = ("config.yaml", SAMPLES, MACHINE, LOCK)
    path: Path = team.agree(Path(settings["out"]) if resume else free_folder("run", settings["out"], may_hold=may_hold))
    RunFolder.check(path, config, resume=resume)
    return path


def _check_without_model(settings: Mapping[str, Any], asked: _Asked) -> None:
    from accel.evals.controls import plan_controls
    from accel.evals.models import reads_ahead
    from accel.evals.runner import require_batches, require_kinds

    plan_controls(asked.controls, asked.variants)
    require_batches(asked.variants, asked.tasks, asked.controls, settings["batch_size"])
    if (kinds := reads_ahead(settings["model"])) is not None:
        require_kinds(settings["model"], kinds, asked.tasks)


def _load(settings: Mapping[str, Any], asked: _Asked, dtype: str, device: str, tell: _Teller) -> tuple[LoadedModel, list[str]]:
    """The model, and what a reader must know of it and the methods on it. Raises where it cannot do what was asked."""
    from accel.cli.bench import check_variants
    from accel.evals.models import load_model
    from accel.evals.runner import check_run, require_samples

    loaded = load_model(settings["model"], dtype=dtype, device=device)
    own_data = _own_data_notices(asked.tasks, asked.lengths, settings["samples"])
    tell("\n".join(own_data))
    short = _dense_notices(loaded, asked)
    tell("\n".join(short))
    notices = [*own_data, *short, *check_variants(loaded.model, asked.variants)]
    check_run(loaded, asked.variants, asked.tasks, asked.lengths, settings["samples"], controls=asked.controls, batch_size=settings["batch_size"])
    require_samples(loaded, asked.tasks, asked.lengths, settings["samples"], settings["seed"])
    return loaded, notices


def _dense_notices(loaded: LoadedModel, asked: _Asked) -> list[str]:
    """Which sparse methods do nothing to text prompts of which lengths: there dense is compared with dense."""
    from accel.evals.latency import SHORT
    from accel.evals.runner import model_info
    from accel.evals.tasks import load_task
    from accel.protocols import SparseAttention

    if not any(load_task(task).kind == "text" for task in asked.tasks):
        return []
    info = model_info(loaded)
    idle: dict[tuple[str, str], list[int]] = {}
    for label, methods in asked.variants.items():
        for method in methods:
            if not isinstance(method, SparseAttention):
                continue
            for tokens in asked.lengths:
                # a method that is dense whatever the length was asked to be
                if (why := method.why_always_dense(info, tokens) or "").startswith(SHORT):
                    idle.setdefault((label, why), []).append(tokens)
    return [
        f"{label}: prompts of {', '.join(map(str, tokens))} tokens run dense ({why}), so that dense is compared with itself there; longer --lengths, "
        "or another min_seq_len, make them sparse."
        for (label, why), tokens in idle.items()
    ]


def _open_folder(path: Path, config: Mapping[str, Any], team: Team, loaded: LoadedModel, *, resume: bool) -> tuple[RunFolder, list[str]]:
    """This process's view of the run folder, and how the machine differs from the one that the run was begun on."""
    from accel.evals.results import RunFolder

    # all have looked at the folder as it was before it is made, and read it before one of them adds to it
    team.wait()
    folder = RunFolder.create(path, config, resume=resume) if team.is_main else None
    team.wait()
    changes = [] if folder is None else folder.changes_since_begun(_machine(loaded))
    folder = folder or RunFolder.join(path, config, part=team.index)
    team.wait()
    return folder, changes


def _time_notices(n_processes: int, batch_size: int, device: str) -> list[str]:
    """What a reader must know of the times."""
    notices = []
    if n_processes > 1:
        shared = ", which share the processor, and times are those of that" if device == "cpu" else ""
        notices.append(f"Measured by {n_processes} processes at once{shared}.")
    if batch_size > 1:
        notices.append(f"Prompts were read in batches of {batch_size}: prefill times, memory and densities are those of a batch.")
    return notices


def _finish(
    loaded: LoadedModel, folder: RunFolder, asked: _Asked, settings: Mapping[str, Any], notices: Sequence[str], *, dtype_reason: str
) -> int:
    """Collects what all processes have measured, and reports it."""
    from accel.evals.controls import plan_controls
    from accel.evals.runner import model_info, wanted_samples

    planned = plan_controls(asked.controls, asked.variants, model_info(loaded))
    wanted = wanted_samples(asked.variants, asked.tasks, asked.lengths, n=settings["samples"], controls=planned, batch_size=settings["batch_size"])
    folder.collect(wanted)
    return finish(loaded, folder, wanted, planned, asked.variants, settings, notices, dtype_reason=dtype_reason)


def _machine(loaded: LoadedModel) -> dict[str, str | None]:
    """What samples of one run should share, and times must: device, threads and versions."""
    head = describe_run("run", "", loaded, {}, dtype_reason="")
    return {"device": head["device"], **{key: head["env"].get(key) for key in ("accel", "git", "python", "torch", "transformers", "triton")}}


def _config(asked: _Asked, settings: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """What a run folder keeps, so that it can be repeated, and refuses to be resumed with anything else."""
    from accel.evals.controls import reference_label
    from accel.evals.summary.caches import cache_settings

    plain = {label: [{m.method_name(): m.changed_options()} for m in methods] for label, methods in asked.variants.items()}
    config: dict[str, Any] = {
        "command": "run", **{key: settings[key] for key in ("model", "device", "seed", "samples")}, "dtype": dtype, "tasks": asked.tasks,
        # through JSON: YAML files hold no tuples
        "lengths": asked.lengths, "controls": asked.controls, "reference": reference_label(asked.variants), "methods": json.loads(json.dumps(plain)),
        **({"keeps": parse_keeps(settings["keeps"])} if settings["keeps"] else {}), **cache_settings(asked.variants, asked.tasks, settings),
        **{key: settings[key] for key in ("threads", "batch_size", "warmup") if settings[key] != DEFAULTS[key]},
    }  # fmt: skip
    if files := {label: found for label, methods in asked.variants.items() if (found := by_content(methods)) != plain[label]}:
        config["files"] = json.loads(json.dumps(files))
    return config


class _Teller:
    """Prints lines on stderr, in one of several processes."""

    def __init__(self, is_heard: bool) -> None:
        self._is_heard = is_heard

    def __call__(self, text: str) -> None:
        if text and self._is_heard:
            print(text, file=sys.stderr)


@contextmanager
def _saying_what_is_saved(folder: RunFolder, tell: _Teller) -> Iterator[None]:
    """Says what is saved where the run fails or is interrupted, by Ctrl-C or by the SIGTERM of a launcher or batch system, and how to go on.

    It cannot go on where the mistake lies in what was asked for, nor need it where nothing is saved.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (KeyboardInterrupt, AccelError, OSError) as error:
        n = folder.n_saved()
        is_asked_wrongly = isinstance(error, OptionError | UnsupportedError)
        hint = f" Go on with `{go_on(folder)}`" if n and not is_asked_wrongly else ""
        tell(f"accel: {n or 'no'} {'sample is' if n < 2 else 'samples are'} saved.{hint}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _changes(earlier: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """How far the run that is resumed goes otherwise now; empty where it does not. AccelError where a profile, or another file of a method, was
    changed since the run that is resumed or run again.
    """
    for label, before in earlier.get("files", {}).items():
        now = config.get("files", {}).get(label)
        if label in config["methods"] and now != before:
            asked = f"{settings['out']} cannot be resumed" if settings["resume"] else "that run cannot be run again"
            raise AccelError(f"{asked}: a file of {label} is another one than it was begun with ({before}, now {now})")
    changed = [name for name in ("samples", "tasks", "lengths", "controls", "keeps") if name in earlier and earlier[name] != config.get(name)]
    if not changed or not settings["resume"]:
        return ""
    told = "; ".join(f"{name} was {earlier[name]}, is {config.get(name, 'none')}" for name in changed)
    return f"accel: the run goes on with other settings ({told}); samples that these leave out stay in its folder and out of its tables"


def _controls(asked: Any, variants: Mapping[str, Sequence[Method]]) -> list[str]:
    """Names of the controls: those asked for, or the usual ones of each kind of method; a method is no control of itself."""
    if asked is not None:
        return [] if asked == "none" else split_items(asked)
    found = []
    for kind, usual in CONTROLS.items():
        present = {m.method_name() for methods in variants.values() for m in methods if m.kind == kind}
        found += [name for name in split_items(usual) if present - {name}]
    return found


def _task_files() -> list[str]:
    """Names of the tasks, from their files: the help must not import what loading them would."""
    from accel.evals.tasks import task_names

    return task_names()
