"""Methods by name: the file `patches/<name>.py` holds the class whose name in lower case is `<name>`. No list to keep."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from accel.errors import OptionError
from accel.protocols import Method


@cache
def method_names() -> list[str]:
    """Registry names, sorted: the files in `patches/` and the entry points of group `accel.methods`."""
    folder = Path(__file__).parent / "patches"
    files = (path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return sorted({*files, *(point.name for point in entry_points(group="accel.methods"))})


@cache
def method_class(name: str) -> type[Method]:
    """The class of a method; an unknown name raises OptionError with the closest known one."""
    if name not in method_names():
        raise OptionError(f"no method is called {name!r}{_did_you_mean(name, method_names())} Methods: {', '.join(method_names())}")
    for point in entry_points(group="accel.methods", name=name):
        loaded: type[Method] = point.load()
        return loaded
    module = importlib.import_module(f"accel.patches.{name}")
    found: type[Method] = next(value for key, value in vars(module).items() if key.lower() == name and isinstance(value, type))
    return found


def class_for_attribute(attribute: str) -> type[Method] | None:
    """The method class that is called `attribute`, as in `accel.FlexPrefill`; None where no method has that name."""
    if attribute.lower() == attribute or attribute.lower() not in method_names():
        return None
    found = method_class(attribute.lower())
    return found if found.__name__ == attribute else None


def build(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method from its registry name and options; an unknown option raises OptionError with the closest known one."""
    cls = method_class(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options or {}:
        if option not in known:
            raise OptionError(f"{name} has no option {option!r}{_did_you_mean(option, known)} It has: {', '.join(known)}")
    return cls(**(options or {}))


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
