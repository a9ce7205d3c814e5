"""Writes accel/__init__.pyi: the types of the names that `import accel` looks up when they are first used. Run: make stub."""

from __future__ import annotations

from pathlib import Path

import accel
from accel.registry import method_class, method_names

HEAD = "# Written by scripts/write_stub.py (make stub): types for the names that are looked up when they are first used."
STUB = Path(accel.__file__).with_suffix(".pyi")


def stub_text() -> str:
    """The stub: every public name with the module that holds it. Methods of other packages are left out."""
    names = dict(accel._HOMES) | dict.fromkeys(accel._MODULES, "accel")
    for name in method_names():
        cls = method_class(name)
        if cls.__module__ == f"accel.patches.{name}":
            names[cls.__name__] = cls.__module__
    lines = [f"from {home} import {name} as {name}" for home, name in sorted((home, name) for name, home in names.items())]
    return "\n".join([HEAD, "", *lines, "", "__version__: str", ""])


if __name__ == "__main__":
    STUB.write_text(stub_text(), encoding="utf-8")
    print(f"wrote {STUB}")
