"""Recipes: a list of methods with their options, as YAML or JSON. One file drives `apply`, `run`, `bench`, `serve` and `tune`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accel.errors import OptionError
from accel.protocols import Method
from accel.registry import build, method_class, method_names

SCHEMA = 1
_SUFFIXES = (".yaml", ".yml", ".json")
_KEYS = ("schema", "methods", "note")


@dataclass(frozen=True)
class Recipe:
    """Methods in the order in which they are applied. Whether they go together is decided by `accel.apply`, which knows the model.

    note: where the numbers come from, for people; written to the file, read by nothing.
    """

    methods: tuple[Method, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.methods, Method | str):
            raise OptionError(f"a recipe holds a list of methods; Recipe.of(…) makes one of a single one, got {self.methods!r}")
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise OptionError("a recipe needs at least one method")
        for method in self.methods:
            if not isinstance(method, Method):
                raise OptionError(f"a recipe holds methods, such as accel.FlexPrefill(); got {method!r}")

    @classmethod
    def of(cls, *methods: Method | str, note: str = "") -> Recipe:
        """A recipe of these methods; a name stands for the method with its defaults."""
        return cls(tuple(build(method) if isinstance(method, str) else method for method in methods), note)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a .yaml, .yml or .json file. Anything wrong in it raises OptionError, naming the file and the key.

        Options that are paths (fields with `metadata={"is_path": True}`) are taken from the folder of the recipe, unless they are absolute.
        """
        path = _known_suffix(Path(path))
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot read the recipe {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is not a text file in UTF-8: {error}") from error
        found = cls.from_dict(_parse(text, path), source=str(path))
        return cls(tuple(_with_paths(method, lambda option: str(path.parent / option)) for method in found.methods), found.note)

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "recipe") -> Recipe:
        """The recipe that `as_dict` wrote. `source` names it in errors."""
        if not isinstance(data, dict):
            raise OptionError(f"{source}: expected `schema: {SCHEMA}` and a list `methods:`, got {_kind(data)}")
        for key in data:
            if key not in _KEYS:
                raise OptionError(f"{source}: unknown key {key!r}. A recipe has: {', '.join(_KEYS)}")
        if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
            raise OptionError(f"{source}: schema is {data.get('schema')!r}, this version of accel reads `schema: {SCHEMA}`")
        entries = data.get("methods")
        if not isinstance(entries, list) or not entries:
            raise OptionError(f"{source}: methods must be a list with at least one method, got {_kind(entries)}")
        note = data.get("note", "")
        if not isinstance(note, str):
            raise OptionError(f"{source}: note must be text, got {_kind(note)}")
        return cls(tuple(_method(entry, f"{source}: methods[{i}]") for i, entry in enumerate(entries)), note)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; options at their defaults are left out."""
        written: dict[str, Any] = {"schema": SCHEMA, "methods": [_entry(method) for method in self.methods]}
        return {**written, "note": self.note} if self.note else written

    def save(self, path: str | Path) -> Path:
        """Writes the recipe as YAML or JSON, by suffix, and returns the path. A missing folder is made.

        Files in or below that folder are named by their place in it, so that both can be moved together; others by their whole path.
        """
        path = _known_suffix(Path(path))
        plain = Recipe(tuple(_with_paths(method, lambda option: _seen_from(path.parent, option)) for method in self.methods), self.note).as_dict()
        if path.suffix == ".json":
            text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def _known_suffix(path: Path) -> Path:
    if path.suffix not in _SUFFIXES:
        raise OptionError(f"a recipe is a {', '.join(_SUFFIXES)} file, got {str(path)!r}")
    return path


def _kind(value: Any) -> str:
    """What was found, in the words of the file and not of Python."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    if value == []:
        return "an empty list"
    return names.get(type(value), repr(value))


def _method(entry: Any, where: str) -> Method:
    """One entry: a name, or one name with a mapping of options."""
    if isinstance(entry, str):
        name, options = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        [(name, options)] = entry.items()
    else:
        raise OptionError(f"{where}: expected a method name, or one name with its options, as `flexprefill: {{gamma: 0.9}}`; got {entry!r}")
    if not isinstance(name, str) or not (options is None or isinstance(options, dict)):
        raise OptionError(f"{where}: the options of {name!r} must be a mapping of option to value, got {_kind(options)}")
    try:
        return build(name, options)
    except (OptionError, TypeError, ValueError) as error:       # TypeError: text where a method compares numbers
        message = str(error) if isinstance(error, OptionError) else f"{name}: {error}"
        raise OptionError(f"{where}: {message}") from error


def _with_paths(method: Method, change: Callable[[str], str]) -> Method:
    """The method with its options that are paths changed; the same object where it has none."""
    paths = [f.name for f in fields(method) if f.metadata.get("is_path") and getattr(method, f.name) is not None]
    return replace(method, **{name: change(getattr(method, name)) for name in paths}) if paths else method


def _seen_from(folder: Path, option: str) -> str:
    """A path as a recipe in `folder` names it."""
    own, whole = folder.resolve(), Path(option).resolve()
    return whole.relative_to(own).as_posix() if whole.is_relative_to(own) else str(whole)


def _entry(method: Method) -> str | dict[str, Any]:
    name = method.method_name()
    if name not in method_names() or method_class(name) is not type(method):
        raise OptionError(f"{type(method).__name__} cannot be written to a recipe: only the methods of `accel ls` are found again by name")
    options = {option: _plain(value, f"{name}: {option}") for option, value in method.changed_options().items()}
    return {name: options} if options else name


def _plain(value: Any, where: str) -> Any:
    """The value in types that YAML and JSON both know."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    raise OptionError(f"{where} is a {type(value).__name__}, which cannot be written to a recipe")


def _parse(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, str(path)))
        except json.JSONDecodeError as error:
            raise OptionError(f"{path} is not JSON: {error}") from error
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader(str(path)))
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is not YAML: {error}") from error


def _unique(pairs: list[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """The pairs as a dict; both JSON and YAML would keep the last of two equal keys and say nothing."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, Hashable):
            raise OptionError(f"{where}: {key!r} cannot be a key")
        if key in found:
            raise OptionError(f"{where}: {key!r} appears twice")
        found[key] = value
    return found


def _yaml_loader(source: str) -> Any:
    """PyYAML's safe loader, which also reads `1e-3` as a number (YAML 1.2 does, PyYAML makes it text) and refuses repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        pairs = [(loader.construct_object(key, deep=True), loader.construct_object(value, deep=True)) for key, value in node.value]
        return _unique(pairs, f"{source}, line {node.start_mark.line + 1}")

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
    return Loader
