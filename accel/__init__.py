"""accel: sparse attention, visual-token pruning and cache compression for Hugging Face models, in one reversible call, and for vLLM.

`import accel` loads neither torch nor transformers; names are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "apply": "accel.patching",
    "Handle": "accel.handle",
    "Method": "accel.protocols",
    "Recipe": "accel.recipe",
    "AccelError": "accel.errors",
    "OptionError": "accel.errors",
    "PatchError": "accel.errors",
    "UnsupportedError": "accel.errors",
}
# modules that are there without being imported by name
_MODULES = ("vllm",)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"accel.{name}")
    else:
        from accel.registry import class_for_attribute

        value = class_for_attribute(name)
        if value is None:
            raise AttributeError(f"module 'accel' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from accel.registry import method_class, method_names

    own = globals().keys() - {"Any", "annotations", "importlib"}
    return sorted({*own, *_HOMES, *_MODULES, *(method_class(name).__name__ for name in method_names())})
