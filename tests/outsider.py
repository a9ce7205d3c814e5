"""A method in somebody else's package, found through the entry-point group `accel.methods`: for tests of registry, recipes and tuning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from accel import registry

_METHOD = '''
import os
from dataclasses import dataclass

from accel.errors import OptionError
from accel.protocols import Choice, Objective, RunDense, SparseAttention, Uniform


def score(method, model, data):
    """Best at weight 0.25, mode "b"; `model` is a file that counts the calls, `data` the call after which the process dies."""
    with open(model, "a") as calls:
        calls.write(f"{method.weight} {method.size} {method.mode}\\\\n")
    with open(model) as calls:
        if len(calls.readlines()) == data:
            os._exit(9)
    return -((method.weight - 0.25) ** 2) - (method.mode != ("b", 1))


@dataclass(frozen=True, kw_only=True)
class Toy(SparseAttention):
    """A method for tests."""

    weight: float = 0.9
    size: int = 4
    mode: tuple = ("a", 1)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "mode", tuple(self.mode))
        if not 0 <= self.weight <= 1:
            raise OptionError(f"toy: weight must lie in [0, 1], got {self.weight!r}")

    def plan(self, q, keys, ctx):
        return RunDense("a toy")

    @classmethod
    def search_space(cls):
        return {"weight": Uniform(0.0, 1.0), "size": Uniform(1, 64, is_log=True, is_integer=True), "mode": Choice((("a", 1), ("b", 1)))}

    @classmethod
    def objectives(cls):
        return {"closeness": Objective("closeness", score)}
'''


def write_toy_package(folder: Path, *, module: str = "toy", name: str = "toy") -> None:
    """Makes `folder`, once it is on the path, an installed distribution with the method `toy`."""
    (folder / f"{module}.py").write_text(_METHOD.replace("\\\\n", "\\n"))
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[accel.methods]\n{name} = {module}:Toy\n")


@contextmanager
def installed_toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy package in `folder`, found by the registry of this process until the block ends."""
    folder.mkdir()
    write_toy_package(folder)
    monkeypatch.syspath_prepend(folder)

    def clear() -> None:
        registry.method_names.cache_clear()
        registry.method_class.cache_clear()
        sys.modules.pop("toy", None)

    clear()
    yield
    monkeypatch.undo()
    clear()
