"""The flags that several commands share, and what they read from them: methods with options, and lengths."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.protocols import Method

_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def add_method_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --method, which may be repeated; `what` is its help."""
    parser.add_argument("--method", action="append", metavar="NAME[:OPTION=VALUE,…]", help=what)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, --device and --threads, without defaults: a flag that was not given must not override a settings file."""
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: whichever this machine is fast in")
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")


def add_settings_arguments(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Adds --config and --dry-run, for `merge_settings` and `print_settings`. also: what else the file may be."""
    parser.add_argument("--config", help=f"a YAML file with any of these settings{also}; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print the merged settings and stop")


def parse_method(text: str) -> Method:
    """The method in `flexprefill:gamma=0.9,min_budget=256`. Values are read as YAML: numbers, true, null, [0, 1], or words.

    Raises OptionError for an unknown method or option, with the closest known one.
    """
    import yaml

    from accel.registry import build

    name, _, given = text.partition(":")
    options = {}
    # a comma inside brackets belongs to the value
    for item in re.split(r",(?![^\[]*\])", given) if given.strip() else []:
        option, equals, value = item.partition("=")
        if not equals or not option.strip():
            raise OptionError(f"{text!r}: expected OPTION=VALUE, got {item!r}; for example flexprefill:gamma=0.9,min_budget=256")
        try:
            options[option.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"{text!r}: cannot read the value of {option.strip()}: {value!r}") from error
    return build(name.strip(), options)


def parse_keeps(given: Any) -> list[float | int]:
    """Shares (with a point: 0.25) and counts of visual tokens (whole: 36), from `"1.0,0.25"` or a list. Raises OptionError for anything else."""
    found: list[float | int] = []
    for item in split_items(given):
        try:
            keep: float | int = int(item) if item.isdigit() else float(item)
        except ValueError as error:
            raise OptionError(f"what to keep is a share such as 0.25 or a count such as 36, got {item!r}") from error
        if keep == 1 and isinstance(keep, int):
            raise OptionError("keeps: write 1.0 for everything; a whole number is a count of tokens")
        if not (keep > 1 if isinstance(keep, int) else 0 < keep <= 1):
            raise OptionError(f"what to keep is a share in (0, 1] or a count, got {item!r}")
        found.append(keep)
    return list(dict.fromkeys(found))


def parse_length(text: str) -> int:
    """Tokens in `4096`, `4k` (4096) or `1m`. Raises OptionError for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", text.lower())
    if found is None or int(found[1]) == 0:
        raise OptionError(f"a length is a positive number of tokens such as 4096 or 4k, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def split_items(given: Any) -> list[str]:
    """The items of a comma-separated text, a list, or a single value, as settings files and flags bring them."""
    items = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    return [str(item).strip() for item in items if str(item).strip()]


def parse_lengths(given: Any) -> list[int]:
    """Lengths in tokens, ascending, each once: `"2k,4k"`, `[2048, "4k"]` or `4096`. Raises OptionError for none."""
    # nothing is no length either
    return sorted({parse_length(item) for item in split_items(given) or [""]})


def by_content(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The methods as plain values, to tell settings apart: a file counts by a hash of what it holds, wherever it lies. OptionError for one that is
    not there.
    """
    found = []
    for method in methods:
        files = {f.name for f in fields(method) if f.metadata.get("is_path")}
        options = {
            name: content_hash(value, f"{name} of {method.method_name()}") if name in files and value is not None else value
            for name, value in method.changed_options().items()
        }
        found.append({method.method_name(): options})
    return found


def content_hash(path: str | Path, what: str) -> str:
    """A word that differs where a file does. OptionError, which says `what` the file is, for one that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise OptionError(f"cannot read {what}, {path}: {error.strerror or error}") from error


def read_variants(settings: Mapping[str, Any]) -> dict[str, list[Method]]:
    """Methods by label, from the settings `method` and `recipe`; without either the model's own recipe, or FlexPrefill where it has none.

    UnsupportedError for a recipe whose methods cannot stand beside each other.
    """
    from accel.evals.controls import add_variant
    from accel.evals.models import embedded_recipe
    from accel.patching import check_together
    from accel.recipe import Recipe
    from accel.registry import build

    methods = _given_methods(settings["method"])
    variants: dict[str, list[Method]] = {}
    for method in methods:
        add_variant(variants, [method])
    shipped = None if methods or settings["recipe"] else embedded_recipe(settings["model"])
    for path in (settings["recipe"], shipped):
        if path:
            recipe = Recipe.load(path)
            # told before a model is loaded
            check_together(recipe.methods)
            variants[" + ".join(m.method_name() for m in recipe.methods) + " (recipe)"] = list(recipe.methods)
    return variants or {"flexprefill": [build("flexprefill")]}


def _given_methods(given: Any) -> list[Method]:
    """Methods as flags write them (`name:option=value`) or as recipes do (a mapping of a name to its options), one or a list of them."""
    from accel.recipe import SCHEMA, Recipe

    items = given if isinstance(given, list) else [] if given is None else [given]
    found: list[Method] = []
    for item in items:
        if isinstance(item, str):
            found.append(parse_method(item))
        elif isinstance(item, Mapping) and len(item) == 1:
            found += Recipe.from_dict({"schema": SCHEMA, "methods": [dict(item)]}, source="method").methods
        else:
            raise OptionError(f"a method is written as fastervlm:keep=0.25 or, in a settings file, as {{fastervlm: {{keep: 0.25}}}}; got {item!r}")
    return found
