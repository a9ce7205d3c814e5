"""Kernels on CPU tensors, in Triton's interpreter: a process of its own, `TRITON_INTERPRET=1 pytest tests/interpret`."""

from __future__ import annotations

import os
from importlib.util import find_spec

# decided before the files are imported: a jit function is made for the interpreter or for the compiler when its module loads
if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
