"""Methods by name: `patches/<name>.py` holds the class of that name (`random_blocks`: `RandomBlocks`). No list to keep."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from accel.errors import OptionError
from accel.protocols import Method


@cache
def method_names() -> list[str]:
    """Registry names, sorted: the files in `patches/` and the entry points of group `accel.methods`."""
    return sorted({*_own_names(), *(point.name for point in entry_points(group="accel.methods"))})


@cache
def method_class(name: str) -> type[Method]:
    """The class of a method; an unknown name raises OptionError with the closest known one."""
    if name not in method_names():
        raise OptionError(f"no method is called {name!r}{did_you_mean(name, method_names())} Methods: {', '.join(method_names())}")
    points = list(entry_points(group="accel.methods", name=name))
    if len(points) + (name in _own_names()) > 1:
        raise OptionError(f"several methods are called {name!r}: {', '.join(point.value for point in points)}; rename or uninstall one")
    if points:
        found: Any = points[0].load()
    else:
        module = importlib.import_module(f"accel.patches.{name}")
        found = next((value for key, value in vars(module).items() if isinstance(value, type) and key.lower() == _bare(name)), None)
    if not (isinstance(found, type) and issubclass(found, Method) and found.method_name() == name):
        raise OptionError(f"the file {name}.py must hold a method class of that name without underscores, found {found!r}")
    return found


def class_for_attribute(attribute: str) -> type[Method] | None:
    """The method class that is called `attribute`, as in `accel.FlexPrefill`; None where no method has that name."""
    name = next((name for name in method_names() if _bare(name) == attribute.lower()), None)
    if name is None or attribute.lower() == attribute:
        return None
    found = method_class(name)
    return found if found.__name__ == attribute else None


def build(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method from its registry name and options; an unknown option raises OptionError with the closest known one."""
    cls = method_class(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options or {}:
        if option not in known:
            raise OptionError(f"{name} has no option {option!r}{did_you_mean(option, known)} It has: {', '.join(known)}")
    for field in fields(cls):
        if field.init and field.name not in (options or {}) and field.default is MISSING and field.default_factory is MISSING:
            raise OptionError(f"{name} needs the option {field.name!r}")
    try:
        return cls(**(options or {}))
    except TypeError as error:
        # an option of the wrong type that a method compares before it checks
        raise OptionError(f"{name}: an option has a value of the wrong type ({error}); got {options}") from error


def _own_names() -> set[str]:
    folder = Path(__file__).parent / "patches"
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def _bare(name: str) -> str:
    return name.replace("_", "")


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown word: what it resembles, or a full stop."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
