"""What the measuring commands share: settings, quiet threads, the data type, the run folder and the finished result."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, OptionError

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel

# settings that are text, whatever YAML makes of a word
TEXTS = ("model", "recipe", "dtype", "device", "out", "objective", "data", "tokenizer", "prompts", "text_encoder", "features", "layout")
# OpenMP threads that wait by spinning lose a whole scheduler slice per operation where another process holds a core; passive waiting
# was 5–15 % faster on an idle machine too (kernels.md §2.1)
OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}


def merge_settings(args: argparse.Namespace, defaults: Mapping[str, Any], whole: Collection[str] = ()) -> dict[str, Any]:
    """Defaults, overridden by the file `args.config`, overridden by the flags that were given (those that are not None).

    Raises OptionError where the file sets what is no setting, anything but a whole number (or null, where that is its default) for one of `whole` or
    for a setting whose default is one, and anything but text for one of `TEXTS`.
    """
    settings = dict(defaults)
    if args.config:
        for key, value in _read_yaml(Path(args.config)).items():
            if key not in defaults:
                close = difflib.get_close_matches(str(key), list(defaults), n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise OptionError(f"{args.config} sets {key!r}, which is no setting of this command{hint} It has: {', '.join(defaults)}")
            is_optional = defaults[key] is None and value is None
            if (key in whole or type(defaults[key]) is int) and type(value) is not int and not is_optional:
                raise OptionError(f"{args.config}: {key} must be a whole number, got {value!r}")
            if key in TEXTS and not isinstance(value, str) and not is_optional:
                raise OptionError(f"{args.config}: {key} must be text, got {value!r}")
            settings[key] = value
    flags = {key: getattr(args, key) for key in defaults}
    return {**settings, **{key: value for key, value in flags.items() if value is not None}}


def print_settings(settings: Mapping[str, Any]) -> None:
    """The settings on stdout, as a file that `--config` takes."""
    import yaml

    print(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), end="")


def require_least(settings: Mapping[str, Any], **least: int) -> None:
    """Raises OptionError for a setting that is smaller than the number given under its name."""
    for name, smallest in least.items():
        if settings[name] is not None and settings[name] < smallest:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {smallest}, got {settings[name]}")


def check_model(name: str) -> None:
    """Raises OptionError for what can only be a mistyped embedded model, before anything is said or made."""
    from accel.evals.models import did_you_mean, embedded_names

    # a hub id has an owner
    if "/" not in name and name not in embedded_names() and not Path(name).exists() and (meant := did_you_mean(name)):
        raise OptionError(
            f"there is no model {name!r}{meant} Embedded models: {', '.join(embedded_names())}; else name a local folder, or a hub id with its owner"
        )


def load(settings: Mapping[str, Any], dtype: str, reason: str) -> LoadedModel:
    """The model of the settings; what is loaded, and why in this data type, is told on stderr."""
    from accel.evals.models import load_model

    print(f"loading {settings['model']} in {dtype} ({reason})", file=sys.stderr)
    return load_model(settings["model"], dtype=dtype, device=settings["device"])


def settle_threads(n_threads: int | None) -> None:
    """Sets the OpenMP waiting policy and, where asked for, the number of threads. Values in the environment win.

    Call it before anything imports torch: its OpenMP library reads the policy once, when it is loaded.
    """
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)
    if n_threads is not None:
        import torch

        if n_threads < 1:
            raise OptionError(f"threads must be at least 1, got {n_threads}")
        torch.set_num_threads(n_threads)


def check_device(device: str) -> None:
    """Raises OptionError for a device that torch does not know or does not find here."""
    if device == "cpu":
        return
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"there is no device {device!r}; write cpu, cuda or, for one of several, cuda:1") from error
    module: Any = getattr(torch, found.type, None)
    if found.type != "cpu" and not (hasattr(module, "is_available") and module.is_available()):
        raise OptionError(f"asked for the device {device}, and torch {torch.__version__} finds no {found.type} device here; run it on --device cpu")
    count = module.device_count() if hasattr(module, "device_count") else 1
    if found.index is not None and found.index >= count:
        raise OptionError(f"asked for the device {device}, and torch finds {count} here, numbered from 0")


def choose_dtype(asked: str, device: str) -> tuple[str, str]:
    """The data type to load a model in, and why: as asked for, or for "auto" the one that this device is fast in. OptionError for no such device."""
    check_device(device)
    if asked != "auto":
        return asked, "as asked for"
    if device != "cpu":
        return "bfloat16", f"usual on {device}"
    from accel.cli.env import is_bf16_fast

    if is_bf16_fast():
        return "bfloat16", "this processor multiplies bfloat16 faster than float32"
    return "float32", "this processor multiplies bfloat16 more slowly than float32"


@contextmanager
def new_folder(command: str, out: str | None) -> Iterator[Path]:
    """A fresh folder for one run, as `free_folder` names it, made; removed again where nothing was written to it."""
    folder = free_folder(command, out)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        # a folder that holds something is not removed
        with suppress(OSError):
            for path in made:
                path.rmdir()


def free_folder(command: str, out: str | None, *, may_hold: Collection[str] = ()) -> Path:
    """Where one run may write: `out`, or runs/<date>-<command>. One that holds other files than those of `may_hold` is refused; none is made.

    So is a run that could not write its reports in the end: AccelError names the missing packages before anything is measured.
    """
    from accel.evals.report.page import require_packages

    require_packages()
    folder = Path(out) if out else Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{command}"
    if folder.exists() and (not folder.is_dir() or any(file.name not in may_hold for file in folder.iterdir())):
        raise AccelError(f"{folder} exists already and is not an empty folder: choose another with --out")
    return folder


def finish_run(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes config.yaml, result.json and both reports, and says where on stderr."""
    import yaml

    from accel.evals.report.page import write_reports

    (folder / "config.yaml").write_text(yaml.safe_dump(dict(result["config"]), sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"report: {write_reports(folder).html}", file=sys.stderr)


def describe_run(command: str, title: str, loaded: LoadedModel | None, settings: Mapping[str, Any], *, dtype_reason: str) -> dict[str, Any]:
    """The head of a result.json: what ran, on what, with which settings. `loaded`: None where no model takes part."""
    from accel.cli.env import cpu_choice
    from accel.evals.results import SCHEMA, environment

    env = environment()
    if loaded is None:
        model, is_on_cpu = {}, True
    else:
        parameter = next(iter(loaded.model.parameters()))
        model, is_on_cpu = {"model": loaded.name, "dtype": str(parameter.dtype).removeprefix("torch.")}, parameter.device.type == "cpu"
    return {
        "schema": SCHEMA,
        "command": command,
        "title": title,
        **model,
        "device": f"{env['cpu']}, {env['threads']} threads" if is_on_cpu else env["device"],
        "created": f"{datetime.now():%d %B %Y, %H:%M}",
        "config": dict(settings),
        "env": {**env, **{name: os.environ.get(name, "not set") for name in OPENMP}, "dtype chosen": dtype_reason, "CPU kernel": cpu_choice()},
    }


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call it with what begins now. The bar counts what has ended."""
    from tqdm import tqdm

    with tqdm(total=total, file=sys.stderr, unit="pass", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]{postfix}") as bar:
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            if begun:
                # further rounds may follow: never a total below what has begun
                bar.total = max(total, begun + 1)
                bar.update()
            begun += 1
            bar.set_postfix_str(text)

        yield step
        bar.total = max(begun, 1)
        bar.update(begun - bar.n)
        bar.set_postfix_str("done")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"cannot read the settings in {path}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path} must hold settings, as `lengths: 4k,8k`, got {type(found).__name__}")
    return found
