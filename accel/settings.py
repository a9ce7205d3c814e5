"""The environment variables that accel reads, but for the compiler's `CXX`. They say where measurements are kept and how errors look."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder of what was measured on this machine: `ACCEL_CACHE`, or else `accel` in the user's cache folder. It may not exist yet."""
    own = os.environ.get("ACCEL_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "accel"


def is_debugging() -> bool:
    """Whether `ACCEL_DEBUG` asks for full tracebacks where the command line shows one line."""
    return os.environ.get("ACCEL_DEBUG", "") not in ("", "0")
